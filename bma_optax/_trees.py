"""Parameter pytrees: names of leaves, dtypes of statistics, checks."""

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey, GetAttrKey

Path = tuple[str, ...]


def path_of(keys: tuple) -> Path:
    """A leaf's path in plain strings, the same however the tree spells it.

    Flax wraps a parameter into an object whose field ``value`` is the array, in some
    calls and not in others: the field is no part of the name.
    """
    wrapped = (
        len(keys) > 1
        and keys[-1] == GetAttrKey("value")
        and isinstance(keys[-2], DictKey)
    )
    return tuple(
        jax.tree_util.keystr((key,), simple=True)
        for key in (keys[:-1] if wrapped else keys)
    )


def name_of(path: Path) -> str:
    """A path as people read it."""
    return "/".join(path) or "params"


def named_leaves(tree) -> list[tuple[Path, jax.Array]]:
    """(path, leaf) of each array."""
    return [
        (path_of(keys), leaf)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def statistic_dtype(leaf) -> jnp.dtype:
    """float32 at least, float64 for float64."""
    return jnp.dtype(jnp.float64 if leaf.dtype == jnp.float64 else jnp.float32)


def common_statistic_dtype(tree) -> jnp.dtype:
    """The dtype in which statistics of different arrays meet."""
    dtypes = [statistic_dtype(leaf) for leaf in jax.tree.leaves(tree)]
    return jnp.dtype(jnp.float64 if jnp.float64 in dtypes else jnp.float32)


def typed_like(x, leaf):
    """``x`` on a mesh as ``leaf`` is, where that is part of its type.

    That is its sharding along explicit axes, and in ``jax.shard_map`` the axes along
    which devices hold different values.
    """
    sharding = jax.typeof(leaf).sharding
    if not sharding.mesh.empty and jax.typeof(x).sharding.spec != sharding.spec:
        x = jax.sharding.reshard(x, sharding)
    return varying_like(x, leaf)


def varying_like(x, leaf):
    """``x`` typed as varying at least along the axes along which ``leaf`` does."""
    missing = jax.typeof(leaf).mat.varying - jax.typeof(x).mat.varying
    return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def zeros_like(tree, dtype=lambda leaf: leaf.dtype):
    """Zeros typed like the leaves of ``tree``, which may be abstract.

    Of an array that a traced function closes over, ``jnp.zeros_like`` alone would lose
    the sharding.
    """
    return jax.tree.map(
        lambda x: typed_like(jnp.zeros_like(x, dtype=dtype(x)), x), tree
    )


def astype(tree, like):
    """``tree`` in the dtypes of ``like``."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def again(tree):
    """The same values under another name, for what is to be computed once more.

    XLA would store what two passes over an array share; without a share, each pass
    computes it on its way.
    """
    return jax.lax.optimization_barrier(tree)


def stored(tree, finite):
    """The same values, computed once for all that take them up.

    XLA on CPU would compute what is cheap again for each use, and for each element of a
    block. It does not with a division, here by a 1 that it cannot know: ``finite`` is
    any tree of this structure.
    """
    return jax.tree.map(lambda x, y: x / (0 * y + 1).astype(x.dtype), tree, finite)


def stored_for_sums(tree, finite):
    """As :func:`stored`, where all uses are sums, which take in divisions as well."""
    return jax.tree.map(lambda x, y: jnp.where(y == y, x, 0), tree, finite)


@jax.custom_jvp
def sqrt(x):
    """The root of x >= 0; its derivative is 0 at 0, where others were infinite.

    A bare root, without a comparison: XLA on CPU makes it a part of the sum over it.
    """
    return jnp.sqrt(x)


@sqrt.defjvp
def _sqrt_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    root = sqrt(x)
    return root, jnp.where(x > 0, tangent / (2 * jnp.where(x > 0, root, 1)), 0)


def size(tree) -> int:
    """The number of elements."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def all_finite(tree) -> jax.Array:
    """Whether every element of every leaf is finite.

    By sums of zeros or NaN: XLA on CPU takes far longer to reduce booleans.
    """
    finite = [jnp.isfinite(jnp.sum(0 * x)) for x in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(finite)) if finite else jnp.asarray(True)


def vdot(a, b) -> jax.Array:
    """The inner product of two trees, in the dtype of statistics."""
    dtype = common_statistic_dtype(a)
    products = jax.tree.map(
        lambda x, y: jnp.sum(x.astype(dtype) * y.astype(dtype)), a, b
    )
    return sum(jax.tree.leaves(products), jnp.zeros((), dtype))


def check_floating(tree) -> None:
    """Raises a TypeError naming the first leaf that is not a real floating array."""
    for path, leaf in named_leaves(tree):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None:
            raise TypeError(
                f"Parameter {name_of(path)!r} is a {type(leaf).__name__}; arrays of a "
                "floating dtype are accepted."
            )
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"Parameter {name_of(path)!r} has dtype {dtype}; real floating dtypes "
                "are accepted. Wrap the optimiser in "
                "optax.contrib.split_real_and_imaginary for complex parameters."
            )
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"Parameter {name_of(path)!r} has dtype {dtype}; floating dtypes are "
                "accepted. Keep other leaves from the optimiser with optax.masked."
            )


def check_same_shapes(updates, state) -> None:
    """Raises a ValueError that names the first leaf unlike the one seen by init."""
    new, old = dict(named_leaves(updates)), dict(named_leaves(state))
    for path in [*new, *old]:
        if path not in old or path not in new:
            where = "has no state: init" if path not in old else "is missing: update"
            raise ValueError(
                f"The gradient of {name_of(path)!r} {where} was given another tree. "
                "Gradients of the structure that init saw are accepted."
            )
        if new[path].shape != old[path].shape:
            raise ValueError(
                f"The gradient of {name_of(path)!r} has shape {new[path].shape}; "
                f"{old[path].shape}, the shape that init saw, is accepted."
            )
