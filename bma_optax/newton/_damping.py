"""Levenberg and Marquardt's rule for the damping."""

import jax
import jax.numpy as jnp

from bma_optax import _tree

_LEAST, _MOST = 1e-8, 1e8


def levenberg_marquardt(damping, value_fn, linearize, previous, params):
    """Half or twice the damping by the decrease of the loss from previous to params.

    The quadratic model at ``previous`` foretells -(gᵀδ + δᵀGδ/2) for the step δ. Where
    that is below the rounding of the loss it says nothing, and the damping stays.
    """
    step = jax.tree.map(jnp.subtract, params, previous)
    old, gradient = jax.value_and_grad(value_fn)(previous)
    curved = linearize(previous)(step)
    foretold = -(_tree.vdot(gradient, step) + _tree.vdot(step, curved) / 2)
    old, new = old.astype(damping.dtype), value_fn(params).astype(damping.dtype)
    foretold, decrease = foretold.astype(damping.dtype), old - new
    noise = 10 * float(jnp.finfo(damping.dtype).eps) * jnp.abs(old)
    known = jnp.abs(foretold) > noise
    # A step that should not have helped, or has led out of the loss's domain, is bad.
    bad = known & ~((foretold > 0) & (decrease >= foretold / 4))
    good = known & (foretold > 0) & (decrease > 3 * foretold / 4)
    factor = jnp.where(bad, 2, jnp.where(good, 0.5, 1)).astype(damping.dtype)
    return jnp.clip(damping * factor, _LEAST, _MOST)
