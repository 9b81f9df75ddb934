"""Masks after an optimiser that chooses its step as a whole: how to find and heed them.

A step rule minimises a model of the loss over all arrays at once. If a mask then
freezes some of them, the rest of the step is not the one it chose. The wrapper finds
the arrays, among n, that do not move when told to, by a checksum of each, and sets
their gradients to 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bma_optax import _random, _tree, _xla
from bma_optax.newton._quadratic_model import ScaleByQuadraticModelState


class MaskedState(NamedTuple):
    """Which of n arrays have moved since the first update, and which are masked."""

    checksums: jax.Array  # shape (n,), uint32: of the parameters at the last update.
    moved: jax.Array  # shape (n,), bool: whether the array ever has.
    masked: jax.Array  # shape (n,), bool: whether it is taken for masked.
    told: jax.Array  # shape (n,), bool: whether the last update was to move it.


def heed(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns ``tx`` such that a mask may follow on its updates.

    The wrapper takes an array for masked if it has never moved, and stayed at an update
    that moved others and was to move it. An array without a gradient was not told to
    move. The wrapper sets the gradient of a masked array to 0, so that ``tx`` chooses
    its step for the others. It also gives the array an update of one rounding error
    downhill. If that update moves the array, there is no mask any more: the array takes
    part from then on.

    The state is the tuple of states of ``tx``, a chain, with a :class:`MaskedState`
    added.
    """
    tx = optax.with_extra_args_support(tx)

    def init_fn(params):
        state = tx.init(params)  # Raises the errors for wrong parameters.
        sums = _vector(_checksum, _tree.zeros_like(params), jnp.uint32)
        never = sums != sums
        return *state, MaskedState(sums, never, never | False, never & True)

    def update_fn(updates, state, params=None, **extra_args):
        inner, last = state[:-1], _as_made(state[-1])
        _tree.check_vectors(updates, "The gradient of")
        if params is not None and _tree.unlike(updates, params) is None:
            updates = _tree.same_order(updates, params)
        known = _tree.same_structure(updates, params)
        if not known or len(jax.tree.leaves(updates)) < 2:  # tx raises if unknown.
            result, inner = tx.update(updates, inner, params, **extra_args)
            return result, (*inner, last)
        params = _tree.arrays(params)
        checksums = _vector(_checksum, params, jnp.uint32)
        started = jnp.any(last.told | last.masked)
        changed = started & (checksums != last.checksums)
        moved = last.moved | changed
        masked = ~moved & (last.masked | last.told & jnp.any(changed))
        flags = jax.tree.unflatten(jax.tree.structure(updates), _xla.entries(masked))
        free = jax.tree.map(lambda m, g: jnp.where(m, 0, g), flags, updates)
        result, inner = tx.update(free, inner, params, **extra_args)
        result = _tree.in_order(result, updates)
        result = jax.tree.map(
            lambda m, u, g, p: jnp.where(m, _nudge(g, p).astype(u.dtype), u),
            flags,
            result,
            updates,
            params,
        )
        told = _vector(lambda g: jnp.sum(jnp.abs(g)) != 0, free, bool)
        inner = _without_value(inner, jnp.any(told & ~moved))
        return result, (*inner, MaskedState(checksums, moved, masked, told))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _without_value(states, unknown):
    """Forgets the loss that a step rule keeps for Optax, where a mask may be unknown.

    The rule evaluated it, and the gradient, where the step leads without the mask.
    """
    return tuple(
        state._replace(value=jnp.where(unknown, jnp.inf, state.value))
        if isinstance(state, ScaleByQuadraticModelState)
        else state
        for state in states
    )


def _as_made(state):
    """Returns the state in its own dtypes, which an average of states does not have."""
    checksums, *flags = state
    return MaskedState(checksums.astype(jnp.uint32), *(x.astype(bool) for x in flags))


def _vector(f, tree, dtype):
    """f of each leaf of a tree, shape (n,); ``dtype`` is for a tree without leaves."""
    entries = [f(leaf) for leaf in jax.tree.leaves(tree)]
    return jnp.stack(entries) if entries else jnp.zeros(0, dtype)


def _checksum(x):
    """A checksum of all bits of x, uint32 of shape ().

    Words are hashed before they are summed, or changes of opposite sign, as those of
    [1.5, 1.5] to [1.75, 1.25], would cancel.
    """
    bits = 8 * x.dtype.itemsize
    words = jax.lax.bitcast_convert_type(x, f"uint{bits}")
    if bits == 64:
        words = words ^ (words >> jnp.uint64(32))
    return jnp.sum(_random.mixed(words.astype(jnp.uint32)), dtype=jnp.uint32)


def _nudge(g, p):
    """The least change of p against the sign of g, in the shape and dtype of p."""
    info = jnp.finfo(p.dtype)
    # Where p is 0: normal numbers also after a rate behind the wrapper.
    least = max(float(info.tiny), 1e-30)
    size = 2 * float(info.eps) * jnp.abs(p) + least
    return -jnp.sign(g).astype(p.dtype) * size.astype(p.dtype)
