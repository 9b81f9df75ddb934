"""Branches and loops, by Python where nothing is traced and by JAX otherwise.

Outside ``jax.jit`` a ``lax.cond`` or ``lax.scan`` compiles its functions, which are new
ones at each update, each time anew. There the predicate is known, and a loop of Python
compiles nothing that it has met before.
"""

import functools

import jax
import jax.numpy as jnp

from bma_optax import _tree

# A method of a static layout as one program: un-jitted, it is compiled once for each
# layout. Under ``jit`` it is a part of the caller's, as if it were not here.
compiled = functools.partial(jax.jit, static_argnums=0, inline=True)


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
            init = jax.tree.map(_tree.varying_like, init, carry)
        return jax.lax.scan(f, init, xs, length)
    carry, ys = init, []
    for i in range(_length(xs) if length is None else length):
        carry, y = f(carry, jax.tree.map(lambda x, i=i: x[i], xs))
        ys.append(y)
    return carry, jax.tree.map(lambda *y: jnp.stack(y), *ys)


def map(f, xs, batch_size, operands=()):  # noqa: A001 - as in jax.lax.
    """``jax.lax.map``, ``batch_size`` at a time; ``operands`` as for :func:`scan`."""
    if is_traced(xs, operands):
        return jax.lax.map(f, xs, batch_size=batch_size)
    parts = [
        jax.vmap(f)(jax.tree.map(lambda x, i=i: x[i : i + batch_size], xs))
        for i in range(0, _length(xs), batch_size)
    ]
    return jax.tree.map(lambda *y: jnp.concatenate(y), *parts)


def _length(xs) -> int:
    return len(jax.tree.leaves(xs)[0])


def _in_shard_map() -> bool:
    return jax.sharding.AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types


def _varying(fn, like):
    return lambda *operands: jax.tree.map(_tree.varying_like, fn(*operands), like)
