"""The sharding that is part of an array's type, and how to give it to another array.

On a mesh with explicit axes, JAX puts each array's sharding into its type; inside
``jax.shard_map``, also the axes along which devices hold different values ("varying").
Operations on two arrays, tangents, and states before and after a step must agree in
both. Arrays may have any shape.
"""

import jax
from jax.experimental.shard_alike import shard_alike


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
    the two are sharded alike. ``x`` has the shape of ``leaf``.
    """
    x = typed_like(x, leaf)
    traced = isinstance(x, jax.core.Tracer) or isinstance(leaf, jax.core.Tracer)
    kinds = jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Manual
    meshes = jax.sharding.get_abstract_mesh(), jax.typeof(x).sharding.mesh
    if not traced or any(kind in kinds for m in meshes for kind in m.axis_types):
        return x
    return _alike(x, jax.lax.stop_gradient(leaf))


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


def everywhere(x: jax.Array) -> jax.Array:
    """Returns ``x`` as held by every device, where XLA would choose by itself.

    It does so on automatic axes, and may shard a vector of few numbers, whose parts
    devices then exchange one by one. It can be told better if a mesh is set, as by
    ``jax.set_mesh``.
    """
    mesh = jax.sharding.get_abstract_mesh()
    traced = isinstance(x, jax.core.Tracer)
    if not traced or mesh.empty or not mesh.are_all_axes_auto:
        return x
    return jax.lax.with_sharding_constraint(x, jax.P())


def replicated(x: jax.Array) -> jax.Array:
    """Returns ``x`` on every device, if its type says that an axis is sharded."""
    sharding = jax.typeof(x).sharding
    if all(axis is None for axis in sharding.spec):
        return x
    everywhere = jax.sharding.NamedSharding(sharding.mesh, jax.P())
    return jax.sharding.reshard(x, everywhere)
