"""The sharding that is part of an array's type, and how to give it to another array.

On a mesh with explicit axes, JAX puts each array's sharding into its type; inside
``jax.shard_map``, also the axes along which devices hold different values ("varying").
Operations on two arrays, tangents, and states before and after a step must agree in
both. Arrays may have any shape.
"""

import math

import jax

try:
    from jax.experimental.shard_alike import shard_alike
except ImportError:  # JAX 0.12.0.1 has it no more.

    def shard_alike(x, y):
        """Returns ``x`` and ``y``. XLA shards alike what a select takes."""
        first = jax.lax.optimization_barrier(True)
        like = y.astype(x.dtype)
        return jax.lax.select(jax.lax.broadcast(first, x.shape), x, like), y


def typed_like(x, leaf):
    """Returns ``x`` with the sharding that is part of the type of ``leaf``.

    This is the sharding over a mesh's explicit axes, and inside ``jax.shard_map`` the
    axes along which devices hold different values. ``x`` has the shape of ``leaf``.
    """
    sharding = jax.typeof(leaf).sharding
    if not sharding.mesh.empty and jax.typeof(x).sharding.spec != sharding.spec:
        x = jax.sharding.reshard(x, sharding)
    return varying_like(x, leaf)


def alike(x, leaf):
    """Returns ``x``, sharded as ``leaf`` is, over automatic axes as well.

    Over these no type tells how ``leaf`` is sharded: under ``jax.jit`` XLA is told that
    the two are sharded alike. ``x`` has the shape of ``leaf``, which may be abstract.
    """
    x = typed_like(x, leaf)
    if isinstance(leaf, jax.ShapeDtypeStruct):  # There is no array to be like.
        return x
    traced = isinstance(x, jax.core.Tracer) or isinstance(leaf, jax.core.Tracer)
    kinds = jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Manual
    meshes = jax.sharding.get_abstract_mesh(), jax.typeof(x).sharding.mesh
    if not traced or any(kind in kinds for m in meshes for kind in m.axis_types):
        return x
    return _alike(x, jax.lax.stop_gradient(leaf))


def automatic(f, *args, out):
    """``f(*args)`` with automatic axes in the place of a mesh's explicit ones.

    JAX does not slice or roll along an axis that a type says is sharded. Along an
    automatic one XLA does, and finds which shards have to meet.

    Args:
      f: a function.
      args: trees of arrays.
      out: a function that returns a tree of shardings like the result, see :func:`of`.
        It is called if there are explicit axes.
    """
    mesh = _explicit_mesh(args)
    if mesh is None:
        return f(*args)
    run = jax.sharding.auto_axes(f, axes=mesh.explicit_axes, out_sharding=out())
    return run(*args)


def explicit(f, like):
    """``f``, for use inside :func:`automatic`: it sees the axes as the user made them.

    Args:
      f: a function of a tree like ``like``.
      like: the user's arrays, in whose shardings ``f`` gets its argument.
    """
    mesh = _explicit_mesh(like)
    if mesh is None:
        return f
    axes, shardings = mesh.explicit_axes, (of(like),)
    return jax.sharding.explicit_axes(f, axes=axes, in_sharding=shardings)


def of(tree):
    """The sharding in the type of each array of a tree."""
    mesh = _explicit_mesh(tree)

    def one(x):
        sharding = jax.typeof(x).sharding
        if mesh is None or not sharding.mesh.empty:
            return sharding
        return jax.sharding.NamedSharding(mesh, jax.P())

    return jax.tree.map(one, tree)


def replicated(like, tree):
    """For each array of ``like`` the sharding that has it on all devices of a tree."""
    everywhere = jax.sharding.NamedSharding(_explicit_mesh(tree), jax.P())
    return jax.tree.map(lambda _: everywhere, like)


def of_cells(like, sharding, shape):
    """The shardings of arrays by cell, for the cells into which an array is cut.

    Their last axes are those of the array, with a number for each cell. An axis stays
    on all devices if these would not have equally many cells, or fewer than two.

    Args:
      like: a tree of arrays by cell.
      sharding, shape: those of the array.
    """
    mesh, dim = sharding.mesh, len(shape)
    spec = (*sharding.spec, *[None] * (dim - len(sharding.spec)))

    def one(x):
        first = len(x.shape) - dim
        kept = [
            axis if n % (2 * num_shards(mesh, axis)) == 0 else None
            for axis, n in zip(spec, x.shape[first:], strict=True)
        ]
        return jax.sharding.NamedSharding(mesh, jax.P(*[None] * first, *kept))

    return jax.tree.map(one, like)


def num_shards(mesh, axis) -> int:
    """Into how many parts an entry of a sharding's ``spec`` cuts an axis."""
    names = axis if isinstance(axis, tuple) else () if axis is None else (axis,)
    return math.prod(mesh.shape[name] for name in names)


def _explicit_mesh(tree):
    """The mesh of a tree's arrays if it has explicit axes, else None."""
    meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree)]
    return next((mesh for mesh in meshes if mesh.explicit_axes), None)


@jax.custom_jvp
def _alike(x, leaf):
    return shard_alike(x, leaf)[0]


@_alike.defjvp
def _alike_jvp(primals, tangents):
    return _alike(*primals), tangents[0]


def varying_like(x, leaf):
    """Returns ``x`` marked as varying over the mesh axes over which ``leaf`` varies.

    Outside ``jax.shard_map`` no array varies, and ``x`` is returned as it is.
    """
    missing = jax.typeof(leaf).mat.varying - jax.typeof(x).mat.varying
    return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def is_whole(x: jax.Array) -> bool:
    """Whether every axis of ``x`` is on one device: there is no other, nor a mesh.

    Under ``jax.jit`` the type of an array does not tell its shards on automatic axes,
    and to cut an axis of shards would gather them.
    """
    sharding = jax.typeof(x).sharding
    return jax.device_count() == 1 and all(axis is None for axis in sharding.spec)


def replicate(x: jax.Array) -> jax.Array:
    """Returns ``x`` as held by every device.

    On automatic axes XLA would choose by itself, and may shard a vector of few numbers,
    whose parts devices then exchange one by one. It can be told better if a mesh is
    set, as by ``jax.set_mesh``.
    """
    x, mesh = reshard(x), jax.sharding.get_abstract_mesh()
    traced = isinstance(x, jax.core.Tracer)
    if not traced or mesh.empty or not mesh.are_all_axes_auto:
        return x
    return jax.lax.with_sharding_constraint(x, jax.P())


def reshard(x: jax.Array, spec=()) -> jax.Array:
    """``x``, sharded by ``spec`` where its type tells a sharding: on explicit axes.

    Without ``spec``, every device holds it.
    """
    sharding = jax.typeof(x).sharding
    wanted = (*spec, *[None] * (x.ndim - len(spec)))
    if tuple(sharding.spec) == wanted:
        return x
    return jax.sharding.reshard(
        x, jax.sharding.NamedSharding(sharding.mesh, jax.P(*wanted))
    )


def reshape(x: jax.Array, shape: tuple[int, ...], spec) -> jax.Array:
    """``x`` in another shape, sharded by ``spec`` where the type tells a sharding.

    On explicit axes JAX does not reshape an axis that is sharded unless it is told what
    becomes of the shards.
    """
    sharding = jax.typeof(x).sharding
    if all(axis is None for axis in sharding.spec):
        return x.reshape(shape)
    out = jax.sharding.NamedSharding(sharding.mesh, jax.P(*spec))
    return jax.lax.reshape(x, shape, out_sharding=out)


def shard_shape(x) -> tuple[int, ...]:
    """The shape of what one device has of ``x``, as far as that is known.

    Under ``jax.jit`` no type tells how automatic axes are sharded: it is then the shape
    of all of ``x``.
    """
    traced = isinstance(x, jax.core.Tracer)
    sharding = jax.typeof(x).sharding if traced else getattr(x, "sharding", None)
    if sharding is None or (traced and sharding.mesh.empty):
        return x.shape
    if traced and jax.sharding.AxisType.Manual in sharding.mesh.axis_types:
        return x.shape  # Inside ``jax.shard_map`` it is that of one device already.
    return sharding.shard_shape(x.shape)
