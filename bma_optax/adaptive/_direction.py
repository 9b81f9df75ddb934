"""The direction of inputs that the units of an array share, learned from gradients.

G is the gradient of one array as a matrix, units x inputs, and q = y / ‖y‖ a unit
vector over the inputs, in the place of plain block means. Power iteration moves q
towards the leading eigenvector of GᵀG, averaged over steps. A unit has two numbers, M
along q and Λ for all that is orthogonal to it: eq. (2) with q as its weights. Arrays of
a number a unit, or a number an input, keep all axes, of length 1 where they are summed.
"""

import jax
import jax.numpy as jnp

from bma_optax.adaptive import _moments

MIN_LAMBDA = 1e-3  # times a block's mean square: the least Λ.


def turn(units, y, G, a, b):
    """One step of power iteration: moves y towards Gᵀ a, where a = G q.

    y stays as it is where Gᵀ a is zero or not finite. Its norm stays between 0 and 1,
    away from both.

    Args:
      units: the :class:`Units` of the array.
      y: a number an input.
      G: the array in the shape ``units.view``.
      a: a number a unit.
      b: the part of y that is kept.

    Returns:
      A number an input.
    """
    target = units.transposed_times(G, _over_largest(a, units.units)[0])
    target, usable = _over_largest(target, units.inputs)
    square = jnp.sum(jnp.square(target), axis=units.inputs, keepdims=True)
    target = target * jax.lax.rsqrt(jnp.where(usable, square, 1))
    return jnp.where(usable, _moments.decay(target, y, b), y)


def rest(nu, mean_nu, s):
    """(s - 1) Λ: what is not along q; numbers that overflowed leave no difference."""
    rest = jnp.where(nu > mean_nu, nu, 0) - jnp.where(nu > mean_nu, mean_nu, 0)
    return jnp.maximum(rest / (s - 1), jnp.asarray(MIN_LAMBDA / s, nu.dtype) * nu)


def shrink(M, Lambda):
    """max(M / Λ, 1)^-½."""
    larger = M > Lambda
    return jnp.where(
        larger, jnp.sqrt(jnp.where(larger, Lambda, 1) / jnp.where(larger, M, 1)), 1
    )


def _over_largest(x, axes):
    """x over its largest entry along ``axes``, and whether it is neither 0 nor inf."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axes, keepdims=True))
    usable = (largest > 0) & jnp.isfinite(largest)
    return jnp.where(usable, x, 0) / jnp.where(usable, largest, 1), usable
