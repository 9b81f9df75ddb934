"""Operations on parameter pytrees: dtypes, zeros, inner products, checks.

Statistics have a leaf's shape and the dtype ``statistic_dtype(leaf)``: float32 at
least, float64 for float64. The checks compare what ``update`` is given with what
``init`` saw. They look at paths, shapes and dtypes, which are known at trace time, and
their errors name the first leaf that differs.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _sharding
from bma_optax._names import containers, name_of, named_leaves


def dtype_of(leaf) -> jnp.dtype:
    """Returns the dtype that a leaf has as a JAX array.

    For instance, NumPy's float64 becomes float32 where x64 is off.
    """
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.dtype(type(leaf))
    return jax.dtypes.canonicalize_dtype(dtype)


def statistic_dtype(leaf) -> jnp.dtype:
    """Returns the dtype of a leaf's statistics: float64 for float64, else float32."""
    return _at_least_32_bits(dtype_of(leaf))


def _at_least_32_bits(dtype) -> jnp.dtype:
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def common_statistic_dtype(tree) -> jnp.dtype:
    """Returns the dtype for numbers made of several arrays: the widest of theirs."""
    dtypes = [statistic_dtype(leaf) for leaf in jax.tree.leaves(tree)]
    return jnp.dtype(jnp.float64 if jnp.float64 in dtypes else jnp.float32)


def zeros_like(tree, dtype=dtype_of):
    """Returns zeros in the shapes and shardings of ``tree``; leaves may be abstract.

    ``dtype`` maps a leaf to the dtype of its zeros. ``jnp.zeros_like`` alone loses the
    sharding of an array that a traced function closes over.
    """
    return jax.tree.map(
        lambda x: _sharding.alike(jnp.zeros_like(x, dtype=dtype(x)), x), tree
    )


def arrays(tree):
    """Returns ``tree`` with every leaf as a JAX array of dtype ``dtype_of(leaf)``.

    Converts NumPy's arrays, Python's numbers, and float64 arrays that were made before
    x64 was switched off.
    """

    def array(x):
        dtype = dtype_of(x)
        same = isinstance(x, jax.Array) and x.dtype == dtype
        return x if same else jnp.asarray(x, dtype)

    return jax.tree.map(array, tree)


def whole(state, *integers, flags=()):
    """Returns a state with the fields ``integers`` as int32 and ``flags`` as bool.

    An average of states holds counters and flags as floating numbers.
    """
    changes = {name: getattr(state, name).astype(jnp.int32) for name in integers}
    changes |= {name: getattr(state, name).astype(bool) for name in flags}
    return state._replace(**changes)


def no_steps(zeros):
    """The count 0, on the devices of a tree of zeros, where a step leaves it."""
    counts = [jnp.sum(x).astype(jnp.int32) for x in jax.tree.leaves(zeros)]
    return sum(counts, jnp.zeros((), jnp.int32))


def astype(tree, like):
    """Returns ``tree`` in the dtypes of ``like``."""
    return jax.tree.map(lambda x, y: x.astype(dtype_of(y)), tree, like)


def zero_like(tree, like):
    """Returns ``tree`` with 0 in each array that is 0 everywhere in ``like``.

    The gradient ``like`` is 0 everywhere in an array that the user froze. A tree of one
    array is returned as it is, because nothing could move in its place.
    """
    if len(jax.tree.leaves(like)) < 2:
        return tree
    return jax.tree.map(
        lambda x, y: jnp.where(jnp.sum(jnp.abs(y)) == 0, 0, x), tree, like
    )


def size(tree) -> int:
    """Returns the number of elements in all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def all_finite(tree) -> jax.Array:
    """Whether every element of every leaf is finite: a boolean array, shape ().

    It sums 0 * x, which is 0 or NaN: XLA on CPU takes far longer to reduce booleans.
    """
    finite = [jnp.isfinite(jnp.sum(0 * x)) for x in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(finite)) if finite else jnp.asarray(True)


def vdot(a, b) -> jax.Array:
    """Returns the inner product of two trees, shape (), in the dtype of statistics."""
    dtype = common_statistic_dtype(a)
    products = jax.tree.map(
        lambda x, y: jnp.sum(x.astype(dtype) * y.astype(dtype)), a, b
    )
    return sum(jax.tree.leaves(products), jnp.zeros((), dtype))


def parameters(tree):
    """Returns ``tree`` as ``init`` needs it: every leaf real, floating, with a shape.

    JAX's arrays and ``jax.ShapeDtypeStruct`` stay; other leaves become the latter.
    Raises a TypeError that names the first leaf that is not real floating.
    """
    for path, leaf in named_leaves(tree):
        name = f"Parameter {name_of(path)!r}"
        if not isinstance(leaf, (float, int)) and not hasattr(leaf, "dtype"):
            raise TypeError(
                f"{name} is a {type(leaf).__name__}. Pass floating arrays: keep other "
                "leaves from the optimiser with optax.masked, or with "
                "eqx.filter(model, eqx.is_inexact_array) in Equinox."
            )
        if jnp.issubdtype(getattr(leaf, "dtype", float), jax.dtypes.extended):
            raise TypeError(
                f"{name} has dtype {leaf.dtype}. Pass floating arrays: keep other "
                "leaves from the optimiser with optax.masked."
            )
        if jnp.issubdtype(dtype_of(leaf), jnp.complexfloating):
            raise TypeError(
                f"{name} has dtype {dtype_of(leaf)}. Pass real arrays: real and "
                "imaginary parts apart, as optax.contrib.split_real_and_imaginary does "
                "for optimisers whose `update` needs no `value_fn`."
            )
        if not jnp.issubdtype(dtype_of(leaf), jnp.floating):
            raise TypeError(
                f"{name} has dtype {dtype_of(leaf)}. Pass floating arrays: keep other "
                "leaves from the optimiser with optax.masked."
            )

    def abstract(x):
        if isinstance(x, (jax.Array, jax.ShapeDtypeStruct)) and x.dtype == dtype_of(x):
            return x
        return jax.ShapeDtypeStruct(np.shape(x), dtype_of(x))

    return jax.tree.map(abstract, tree)


def is_floating(leaf) -> bool:
    """Whether ``leaf`` is a real floating array or a Python float."""
    dtype = getattr(leaf, "dtype", bool)
    return isinstance(leaf, float) or jnp.issubdtype(dtype, jnp.floating)


def check_vectors(tree, what: str) -> None:
    """Raises a TypeError that names the first leaf that is not real floating.

    The error begins with ``what`` and the leaf's name: "The gradient of 'w'".
    """
    if all(map(is_floating, jax.tree.leaves(tree))):
        return  # Finding the names costs more than the check itself.
    path, leaf = next(pair for pair in named_leaves(tree) if not is_floating(pair[1]))
    dtype = getattr(leaf, "dtype", type(leaf).__name__)
    advice = "a real floating array instead, such as x.astype(jnp.float32)"
    if hasattr(leaf, "dtype") and jnp.issubdtype(dtype, jnp.complexfloating):
        advice = "the real and the imaginary part instead, each as an array"
    raise TypeError(f"{what} {name_of(path)!r} has dtype {dtype}. Pass {advice}.")


def unlike(tree, like) -> tuple[str, Any, Any] | None:
    """Returns (name, leaf, other leaf) of the first leaf in which two trees differ.

    Leaves differ if their shapes do, or if one is missing: it is then None. Returns
    None if the trees have the same paths and shapes.
    """
    if same_structure(tree, like):
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True)
        if all(np.shape(x) == np.shape(y) for x, y in pairs):
            return None  # Finding the names costs more than the check itself.
    found, wanted = dict(named_leaves(tree)), dict(named_leaves(like))
    for path in [*found, *wanted]:
        x, y = found.get(path), wanted.get(path)
        if x is None or y is None or np.shape(x) != np.shape(y):
            return name_of(path), x, y
    return None


def same_structure(tree, like) -> bool:
    """Whether two trees have the same containers, keys and static fields."""
    structure: Any = jax.tree.structure(like)
    return jax.tree.structure(tree) == structure


def in_order(tree, like):
    """Returns ``tree`` in the structure of ``like``; both have the same paths."""
    if same_structure(tree, like):
        return tree
    structure: Any = jax.tree.structure(like)
    leaves = dict(named_leaves(tree))
    return structure.unflatten([leaves[path] for path, _ in named_leaves(like)])


def same_order(tree, like):
    """Returns ``tree``, in ``like``'s structure if its leaves come in another order.

    Trees whose containers differ but whose leaves have one order, such as trees with
    and without Flax's boxes, keep their own structure.
    """
    if same_structure(tree, like):
        return tree
    names, wanted = ([path for path, _ in named_leaves(t)] for t in (tree, like))
    return tree if names == wanted else in_order(tree, like)


def like_init(tree, state, what="The gradient of"):
    """Returns ``tree`` in the order of ``state``, a tree like the parameters.

    Raises an error that names the first leaf that ``init`` did not see, or saw with
    another shape or in another container. The error begins with ``what`` and the leaf's
    name.
    """
    check_vectors(tree, what)
    if (difference := unlike(tree, state)) is None:
        tree = same_order(tree, state)
        if not same_structure(tree, state):
            _check_containers(tree, state, what)
        return tree
    name, new, old = difference
    if new is None or old is None:
        where = "has no state: init" if old is None else "is missing: update"
        raise ValueError(
            f"{what} {name!r} {where} was given another tree. Pass a tree of the "
            "structure that init saw."
        )
    raise ValueError(
        f"{what} {name!r} has shape {np.shape(new)}; init saw {old.shape}. Pass arrays "
        "of the shapes that init saw."
    )


def _check_containers(tree, state, what):
    """Raises a ValueError that names the first leaf in another container than before.

    Flax's boxes are containers too.
    """
    found, seen = containers(tree), containers(state)
    for (path, _), new, old in zip(named_leaves(tree), found, seen, strict=True):
        if new != old:
            raise ValueError(
                f"{what} {name_of(path)!r} is in {' in '.join(new)}; init saw "
                f"{' in '.join(old)}. Pass a tree of the structure that init saw."
            )
    raise ValueError(
        "The containers of a tree have other static data than init saw, or are empty: "
        f"{jax.tree.structure(tree)}. Pass a tree of the structure that init saw."
    )


def check_statistics(params, statistics) -> None:
    """Raises a ValueError if ``params`` need statistics of another dtype.

    This happens to a state of other parameters, or one saved under another setting of
    x64. ``statistics`` is a tree like ``params``; shapes may differ.
    """
    leaves, like = jax.tree.leaves(params), jax.tree.leaves(statistics)
    for path, x in () if leaves else named_leaves(statistics):
        if x.dtype != dtype_of(x):
            raise ValueError(
                f"{name_of(path)!r}: the state has {x.dtype}, which jax_enable_x64 "
                "does not allow. Pass a state that is cast to the one that init makes."
            )
    if len(leaves) != len(like):  # Not parameters, and ``update`` does not use them.
        return
    for position, (p, x) in enumerate(zip(leaves, like, strict=True)):
        if (dtype := statistic_dtype(p)) != _at_least_32_bits(x.dtype):
            path, _ = named_leaves(params)[position]
            raise ValueError(
                f"Parameter {name_of(path)!r} has dtype {dtype_of(p)}, with statistics "
                f"of {dtype}; the state has {x.dtype}, from other parameters or "
                "another jax_enable_x64. Pass the state that init makes of these "
                "parameters; a restored one can be cast to it: "
                "jax.tree.map(lambda x, y: x.astype(y.dtype), state, tx.init(params))."
            )
