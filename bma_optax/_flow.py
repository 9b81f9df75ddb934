"""Branches and loops, by Python where nothing is traced and by JAX otherwise.

Outside ``jax.jit`` a ``lax.cond`` or ``lax.scan`` compiles its functions, which are new
ones at each update, each time anew. There the predicate is known, and a loop of Python
compiles nothing that it has met before.
"""

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _trees


def is_traced(*trees) -> bool:
    """Whether JAX traces what is computed of these: under ``jit`` also of constants."""
    leaves = jax.tree.leaves((trees, jnp.zeros(())))
    return any(isinstance(x, jax.core.Tracer) for x in leaves)


def cond(predicate, true_fn, false_fn, *operands):
    """``true_fn(*operands)`` if the predicate holds, else ``false_fn(*operands)``."""
    if not isinstance(predicate, jax.core.Tracer):
        return true_fn(*operands) if predicate else false_fn(*operands)
    if _in_shard_map():
        true, false = (jax.eval_shape(fn, *operands) for fn in (true_fn, false_fn))
        true_fn, false_fn = _varying(true_fn, false), _varying(false_fn, true)
    return jax.lax.cond(predicate, true_fn, false_fn, *operands)


def scan(f, init, xs=None, length=None, operands=()):
    """``jax.lax.scan``; ``operands`` are what ``f`` closes over and may be traced."""
    if is_traced(init, xs, operands):
        if _in_shard_map():
            first = jax.tree.map(lambda x: x[0], xs)
            carry, _ = jax.eval_shape(f, init, first)
            init = jax.tree.map(_trees.varying_like, init, carry)
        return jax.lax.scan(f, init, xs, length)
    rows = _rows(xs) if length is None else [None] * length
    carry, ys = init, []
    for x in rows:
        carry, y = f(carry, x)
        ys.append(y)
    return carry, jax.tree.map(lambda *y: jnp.stack(y), *ys)


def map(f, xs, batch_size, operands=()):  # noqa: A001 - as in jax.lax.
    """``jax.lax.map``, ``batch_size`` at a time; ``operands`` as for :func:`scan`."""
    if is_traced(xs, operands):
        return jax.lax.map(f, xs, batch_size=batch_size)
    length = len(jax.tree.leaves(xs)[0])
    parts = [
        jax.vmap(f)(jax.tree.map(lambda x, i=i: x[i : i + batch_size], xs))
        for i in range(0, length, batch_size)
    ]
    return jax.tree.map(lambda *y: jnp.concatenate(y), *parts)


def _rows(xs):
    """The slices of each array along its first axis."""
    leaves, treedef = jax.tree.flatten(xs)
    columns = [list(x) if isinstance(x, np.ndarray) else jnp.unstack(x) for x in leaves]
    return [jax.tree.unflatten(treedef, row) for row in zip(*columns, strict=True)]


def _in_shard_map() -> bool:
    return jax.sharding.AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types


def _varying(fn, like):
    return lambda *operands: jax.tree.map(_trees.varying_like, fn(*operands), like)
