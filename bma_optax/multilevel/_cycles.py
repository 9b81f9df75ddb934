"""A solve with nested levels, from their operations: cycles, and Chebyshev steps.

A cycle is symmetric: smooth, correct by the level below, smooth. A few Chebyshev steps
use it as preconditioner. Vectors of a level have shape (components, *grid).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bma_optax import _control_flow, _xla

# The number of levels that are written step by step off the CPU. Each one makes the
# program two or three times larger.
_UNROLLED = 2


class Level(NamedTuple):
    """The operations of a cycle on one level, as functions of a vector."""

    multiply: Callable[[Any], jax.Array]  # the operator S.
    smooth: Callable[[Any], jax.Array]
    restrict: Callable[[Any], jax.Array]  # to the level below, Pᵀ.
    prolong: Callable[[Any], jax.Array]  # from there, P.
    coefficients: tuple[Any, Any]  # a and b of the Chebyshev steps.


def solve(levels: Sequence[Level], inverse, r, operands=()):
    """The approximate inverse of the first level's operator times r.

    On CPU steps are loops, or the program would grow by a factor at each level.
    Elsewhere the last levels are written step by step: what a loop carries is copied,
    and each of its kernels takes longer to launch than to run.

    Args:
      levels: those with cycles.
      inverse: of the operator on the level below these, shape (n, n) for its n cells.
      r: a vector of the first level.
      operands: the arrays that the functions of the levels close over.
    """

    def run(loops, r):
        return _solve(tuple(levels), inverse, r, (operands, inverse), loops)

    return _xla.by_platform(run, len(levels), len(levels) - _UNROLLED, r)


def _solve(levels, inverse, r, operands, loops):
    """Solves as :func:`solve` does, with loops for so many of the first levels."""
    if not levels:
        return _xla.product(inverse, r.reshape(-1)).reshape(r.shape)
    (multiply, smooth, restrict, prolong, coefficients), *below = levels

    def cycle(r):
        """One symmetric cycle: smooth, correct by the level below, smooth.

        Each part is stored: XLA on CPU would compute it again for each of the
        neighbours that a product takes up.
        """
        x = _stored(smooth(r))
        residual = _stored(restrict(_stored(r - multiply(x))))
        below_it = _solve(below, inverse, residual, operands, loops - 1)
        x = _stored(x + prolong(below_it))
        return x + smooth(_stored(r - multiply(x)))

    def step(carry, numbers):
        """One Chebyshev step, x + d for d = a B r + b d with the cycle B."""
        x, d, r = carry
        a, b = numbers
        r = _control_flow.cond(b > 0, lambda: r - multiply(d), lambda: r)
        d = a * cycle(r) + b * d
        return (x + d, d, r), None

    if loops > 0:
        zero = jnp.zeros_like(r)
        carry, _ = _control_flow.scan(
            step, (zero, zero, r), coefficients, operands=operands
        )
        return carry[0]
    (a, _), *others = zip(*coefficients, strict=True)
    x = d = a * cycle(r)
    for a, b in others:
        r = r - multiply(d)
        d = a * cycle(r) + b * d
        x = x + d
    return x


def _stored(x):
    return _xla.materialize(x, x)
