"""Branches and loops that use Python outside ``jax.jit`` and ``jax.lax`` inside it.

Outside ``jax.jit``, ``lax.cond`` and ``lax.scan`` would compile their functions anew at
each update, because each update makes new functions. There the predicate is known and
Python can branch and loop; operations that have been compiled once are then reused.
Inside ``jax.shard_map``, the functions here also make both branches, and a loop's carry
before and after a step, vary along the same axes, as JAX requires.
"""

import functools

import jax
import jax.numpy as jnp

from bma_optax import _sharding

# Decorates a method of a static, hashable object: one program, once for each object.
# Inside ``jax.jit`` it is a function of the caller's program, traced and lowered once
# however often it is called, and XLA makes it part of what calls it.
compiled = functools.partial(jax.jit, static_argnums=0)


def is_traced(*trees) -> bool:
    """Whether JAX traces operations on ``trees``.

    Under ``jax.jit`` it traces operations on constants, too.
    """
    leaves = jax.tree.leaves((trees, jnp.zeros(())))
    return any(isinstance(x, jax.core.Tracer) for x in leaves)


def cond(predicate, true_fn, false_fn, *operands):
    """Returns ``true_fn(*operands)`` if the predicate holds, else ``false_fn``'s."""
    if not isinstance(predicate, jax.core.Tracer):
        return true_fn(*operands) if predicate else false_fn(*operands)
    if _in_shard_map():
        true, false = (jax.eval_shape(fn, *operands) for fn in (true_fn, false_fn))
        true_fn, false_fn = _varying(true_fn, false), _varying(false_fn, true)
    return jax.lax.cond(predicate, true_fn, false_fn, *operands)


def renewed(predicate, f, last):
    """Returns ``f(last)``, a tree like ``last``, if the predicate holds, else ``last``.

    Inside ``jax.jit`` it is a loop of one step or none. XLA leaves in its place what a
    loop carries, and copies what a branch passes through. ``f`` must take from its
    argument what it needs of ``last``. The derivatives are those of a branch.
    """
    if not isinstance(predicate, jax.core.Tracer):
        return f(last) if predicate else last
    f, operands = jax.closure_convert(f, last)
    return _renewed(f, predicate, last, operands)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _renewed(f, predicate, last, operands):
    varying = (
        functools.partial(jax.tree.map, _sharding.varying_like)
        if _in_shard_map()
        else lambda tree, like: tree
    )

    def step(carry):
        predicate, last = carry
        return jnp.zeros_like(predicate), varying(f(last, *operands), last)

    if _in_shard_map():
        last = varying(last, jax.eval_shape(f, last, *operands))
    return jax.lax.while_loop(lambda carry: carry[0], step, (predicate, last))[1]


@_renewed.defjvp
def _renewed_jvp(f, primals, tangents):
    def branch(predicate, last, operands):
        return cond(predicate, lambda: f(last, *operands), lambda: last)

    return jax.jvp(branch, primals, tangents)


def repeat(condition, f, init):
    """Returns ``f(... f(init))``, once and then while ``condition(carry)`` holds.

    The result has no derivatives.
    """
    if not is_traced(init):
        carry = f(init)
        while condition(carry):
            carry = f(carry)
        return carry
    f, operands = jax.closure_convert(f, init)
    init, operands = jax.lax.stop_gradient((init, operands))
    first = jnp.asarray(True)
    if _in_shard_map():
        like = jax.eval_shape(f, init, *operands)
        init = jax.tree.map(_sharding.varying_like, init, like)
        first = _sharding.varying_like(first, jax.eval_shape(condition, init))

    def step(carry):
        carry = f(carry[1], *operands)
        return condition(carry), carry

    return jax.lax.while_loop(lambda carry: carry[0], step, (first, init))[1]


def scan(f, init, xs=None, length=None, operands=(), unroll=1):
    """Scans as ``jax.lax.scan`` does: ``f(carry, x)`` returns ``(carry, y)``.

    ``operands`` are the trees that ``f`` closes over: if one is traced, JAX loops, with
    ``unroll`` steps in each round.
    """
    if is_traced(init, xs, operands):
        if _in_shard_map():
            first = jax.tree.map(lambda x: x[0], xs)
            carry, _ = jax.eval_shape(f, init, first)
            init = jax.tree.map(_sharding.varying_like, init, carry)
        return jax.lax.scan(f, init, xs, length, unroll=unroll)
    carry, ys = init, []
    for i in range(_length(xs) if length is None else length):
        carry, y = f(carry, jax.tree.map(lambda x, i=i: x[i], xs))
        ys.append(y)
    return carry, jax.tree.map(lambda *y: jnp.stack(y), *ys)


def map(f, xs, batch_size, operands=()):  # noqa: A001 - as in jax.lax.
    """Maps as ``jax.lax.map`` does, ``batch_size`` elements of ``xs`` at a time.

    ``operands`` are the trees that ``f`` closes over, as in :func:`scan`.
    """
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
    """Returns ``fn`` with results that vary along the axes of ``like`` as well."""
    return lambda *operands: jax.tree.map(_sharding.varying_like, fn(*operands), like)
