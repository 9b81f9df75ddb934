"""An approximate inverse of a block stencil by nested block means.

Below the finest level, where products with the matrix cost little: on each level a
symmetric cycle (smooth, correct the block means, smooth), and a few Chebyshev steps
with it, so that its quality does not fall with the number of levels (algebraic
multilevel iteration, Axelsson and Vassilevski 1989). Linear, symmetric, and positive
definite where the matrix is.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _control_flow
from bma_optax.algebra import _symmetric_power
from bma_optax.multilevel._stencil import Stencil
from bma_optax.partitions import _tiles
from bma_optax.partitions._rules import Shape

# Of the cycle times the matrix: its eigenvalues are at most about 1, and a part of
# those below the lower end is left to the finest level's conjugate directions.
_INTERVAL = (0.2, 1.1)
_STEPS = (2, 3)  # At the first level, and at those below, where they cost little.
# Of the rows' absolute sums, which bound the eigenvalues: below 2 every step converges.
RELAXATION = 1.6


@dataclasses.dataclass(frozen=True)
class Levels:
    """The layout of the levels below the finest one; static."""

    levels: tuple[tuple[Stencil, Shape], ...]  # With the tile to the next one.
    bottom: Stencil

    @property
    def packed_size(self) -> int:
        """The length of what ``pack`` returns."""
        return self._starts[-1] + self.bottom.num_cells**2

    @property
    def share(self) -> float:
        """The cells of the last level over those of the first."""
        first = self.levels[0][0] if self.levels else self.bottom
        return self.bottom.num_cells / max(first.num_cells, 1)

    @_control_flow.compiled
    def pack(self, S, n2, floor, null):
        """Everything ``solve`` needs in one vector; and M's eigenvalues at the bottom.

        Smoothers and M are taken in the units of the metric: those of S may differ
        from field to field by any factor.

        Args:
          S: the stencil of the first level.
          n2: the diagonal of the metric there, shape (fields, *grid).
          floor: the least eigenvalue of the dense matrix relative to the metric.
          null: an eigenvalue of it that is no larger is taken for 0.
        """
        parts = []
        for stencil, tile in self.levels:
            sums = stencil.absolute_row_sums(S, _or_one(n2))
            smoother = RELAXATION / _or_one(sums)
            parts += [S.reshape(-1), smoother.reshape(-1)]
            _, S = stencil.coarsen(S, tile)
            n2 = _sums(n2, tile)
        root = jnp.sqrt(_or_one(n2).reshape(-1))
        outer = root[:, None] * jnp.broadcast_to(root, (root.size, root.size))
        M = self.bottom.dense(S) / outer
        relative = _symmetric_power.resolution(M.shape[-1], M.dtype)
        inverse = _symmetric_power.matrix_power(
            M, -1, floor, relative, absolute=True, null=null
        )
        parts.append((inverse / outer).reshape(-1))
        eigenvalues = jnp.linalg.eigvalsh(jax.lax.stop_gradient(M))
        return jnp.concatenate(parts), eigenvalues

    @_control_flow.compiled
    def solve(self, packed, r):
        """The approximate inverse times r of shape (fields, *grid)."""
        n = self.bottom.num_cells

        def factors(level):
            # Taken where they are used: from outside a loop they would be copied.
            stencil, start = self.levels[level][0], self._starts[level]
            split = start + math.prod(stencil.shape)
            S = packed[start:split].reshape(stencil.shape)
            smoother = packed[split : split + stencil.num_cells]
            return S, smoother.reshape(stencil.fields, *stencil.grid)

        def solve(level, r):
            if level == len(self.levels):
                inverse = packed[self._starts[level] :].reshape(n, n)
                x = jnp.matmul(
                    inverse, r.reshape(-1), precision=jax.lax.Precision.HIGHEST
                )
                return x.reshape(r.shape)
            stencil, tile = self.levels[level]

            def cycle(r):
                S, smoother = factors(level)
                x = smoother * r
                coarse = solve(level + 1, _sums(r - stencil.matvec(S, x), tile))
                x = x + _fill(coarse, tile, r.shape)
                return x + smoother * (r - stencil.matvec(S, x))

            # A loop, not copies: those would double at every level.
            def step(carry, coefficients):
                x, d, r = carry
                a, b = coefficients
                r = _control_flow.cond(
                    b > 0, lambda: r - stencil.matvec(factors(level)[0], d), lambda: r
                )
                d = a * cycle(r) + b * d
                return (x + d, d, r), None

            zero = jnp.zeros_like(r)
            coefficients = _chebyshev(_STEPS[level > 0], r.dtype)
            carry, _ = _control_flow.scan(
                step, (zero, zero, r), coefficients, operands=packed
            )
            return carry[0]

        return solve(0, r)

    @property
    def _starts(self) -> list[int]:
        """Where each level's part of the vector begins; the last is the bottom's."""
        sizes = [
            math.prod(stencil.shape) + stencil.num_cells for stencil, _ in self.levels
        ]
        return list(itertools.accumulate(sizes, initial=0))


def _chebyshev(steps, dtype):
    """The coefficients of so many steps: d = a B r + b d."""
    low, high = _INTERVAL
    center, half = (high + low) / 2, (high - low) / 2
    a, b, rho = [1 / center], [0.0], half / center
    for _ in range(steps - 1):
        last, rho = rho, 1 / (2 * center / half - rho)
        a.append(2 * rho / half)
        b.append(rho * last)
    return np.asarray(a, dtype), np.asarray(b, dtype)


def _or_one(x):
    """x > 0, and 1 where it is 0: what belongs to a row of zeros."""
    return jnp.where(x > 0, x, 1)


def _sums(x, tile):
    for axis, t in enumerate(tile):
        if t > 1:
            x = _tiles.axis_sums(x, 1 + axis, t)
    return x


def _fill(x, tile, shape):
    for axis, t in enumerate(tile):
        if t > 1:
            x = _tiles.axis_fill(x, 1 + axis, t, shape[1 + axis])
    return x
