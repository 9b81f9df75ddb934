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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _control_flow
from bma_optax.algebra import _symmetric_power
from bma_optax.multilevel._stencil import Stencil
from bma_optax.partitions import _tiles
from bma_optax.partitions._rules import Shape

MAX_DENSE = 64
_COARSENING = 4
_MAX_EXACT = 1000
# Of the cycle times the matrix: its eigenvalues are at most about 1, and a part of
# those below the lower end is left to the finest level's conjugate directions.
_INTERVAL = (0.2, 1.1)
_STEPS = (2, 3)  # At the first level, and at those below, where they cost little.
# Of the rows' absolute sums, which bound the eigenvalues: below 2 every step converges.
RELAXATION = 1.6


class _Level(NamedTuple):
    stencil: Stencil
    tile: Shape  # Of its cells, to the next level.


@dataclasses.dataclass(frozen=True)
class Levels:
    """The layout of the levels below the finest one; static."""

    levels: tuple[_Level, ...]
    bottom: Stencil

    @property
    def packed_size(self) -> int:
        """The length of what ``pack`` returns."""
        return self._starts[-1] + self.bottom.num_cells**2

    @property
    def share(self) -> float:
        """The cells of the last level over those of the first."""
        first = self.levels[0].stencil if self.levels else self.bottom
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
            stencil, start = self.levels[level].stencil, self._starts[level]
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
            math.prod(level.stencil.shape) + level.stencil.num_cells
            for level in self.levels
        ]
        return list(itertools.accumulate(sizes, initial=0))


def levels_below(stencil: Stencil, first_tile: Shape, fields: Shape, tiles) -> Levels:
    """From the first level down to at most 64 blocks, or by the tiles given.

    Axes that tiles of one element cut stay as they are while the dense matrix at the
    bottom has no more than 1000 rows: with one-element tiles alone that is Newton's
    method.

    Args:
      stencil: the layout of the first level.
      first_tile: the tile that is a cell of the first level.
      fields: axes that are never coarsened, as their entries are not neighbours.
      tiles: "auto", or the shapes of the tiles of each level.
    """
    levels = []
    grid = [axis for axis in range(len(stencil.grid)) if axis not in fields]
    if tiles == "auto":
        long = {axis for axis in grid if first_tile[axis] > 1}
        while stencil.num_cells > MAX_DENSE:
            tile = _auto_tile(stencil, long)
            if math.prod(tile) == 1 and stencil.num_cells > _MAX_EXACT:
                tile = _auto_tile(stencil, grid)
            if math.prod(tile) == 1:
                break
            levels.append(_Level(stencil, tile))
            stencil = stencil.coarse(tile)
    else:
        for tile in tiles:
            along = dict(zip(grid, tile, strict=False))
            full = tuple(along.get(axis, 1) for axis in range(len(stencil.grid)))
            levels.append(_Level(stencil, full))
            stencil = stencil.coarse(full)
    return Levels(tuple(levels), stencil)


def _auto_tile(stencil, axes) -> Shape:
    """Tiles of 4 or the reach along some axes."""
    return tuple(
        min(max(_COARSENING, k), g) if axis in axes else 1
        for axis, (k, g) in enumerate(zip(stencil.reach, stencil.grid, strict=True))
    )


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
