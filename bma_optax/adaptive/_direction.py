"""The direction of inputs that the units of an array share, learned from gradients.

G is the gradient of one array as a matrix, units x inputs, and q = y / ‖y‖ is a unit
vector over the inputs, in place of the constant one of plain block means. One step of
power iteration, y <- b y + (1 - b) Gᵀ G q / ‖Gᵀ G q‖, moves q towards the leading
eigenvector of the average of Gᵀ G. Arrays of a number a unit, or of a number an input,
keep all axes, with length 1 where summed.
"""

import jax
import jax.numpy as jnp

from bma_optax.adaptive import _moments


def turn(units, y, G, a, b, scale=1):
    """One step of power iteration: moves y towards scale Gᵀ a, where a = G (scale q).

    y stays as it is where Gᵀ a is zero or not finite. The norm of y stays below or at
    1, and away from 0.

    Args:
      units: the :class:`Units` of the array.
      y: a number an input.
      G: the array in the shape ``units.view``.
      a: a number a unit.
      b: the part of y that is kept, in [0, 1).
      scale: a number an input, by which the columns of G are multiplied.

    Returns:
      The new y.
    """
    target = scale * units.transposed_times(G, _over_largest(a, units.units)[0])
    target, usable = _over_largest(target, units.inputs)
    square = jnp.sum(jnp.square(target), axis=units.inputs, keepdims=True)
    target = target * jax.lax.rsqrt(jnp.where(usable, square, 1))
    return jnp.where(usable, _moments.decay(target, y, b), y)


def shrink(M, Lambda):
    """max(M / Λ, 1)^-½, a number a unit: the factor along q, at most 1."""
    larger = M > Lambda
    return jnp.where(
        larger, jnp.sqrt(jnp.where(larger, Lambda, 1) / jnp.where(larger, M, 1)), 1
    )


def _over_largest(x, axes):
    """x over its largest magnitude along ``axes``, and whether that can be divided by.

    It can be unless it is 0 or not finite. The division keeps squares of x in the range
    of the dtype.
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axes, keepdims=True))
    usable = (largest > 0) & jnp.isfinite(largest)
    return jnp.where(usable, x, 0) / jnp.where(usable, largest, 1), usable
