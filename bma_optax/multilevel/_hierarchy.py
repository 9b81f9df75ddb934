"""An approximate inverse of a block stencil, by nested levels of block means.

Each level has a symmetric cycle: smooth, correct the block means, smooth. A few
Chebyshev steps use the cycle as preconditioner, so that its quality does not fall with
the number of levels (algebraic multilevel iteration, Axelsson and Vassilevski 1989).
The inverse is linear and symmetric, and positive definite where the matrix is. It works
below the level of the parameters, where products with the matrix cost little.

Restriction sums over tiles of cells, Pᵀ x. Prolongation P fills them. The operator of
the next level is Pᵀ S P (Galerkin). Vectors of a level have shape (fields, *grid).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _control_flow, _xla
from bma_optax.algebra import _symmetric_power
from bma_optax.multilevel._stencil import Stencil
from bma_optax.partitions import _tiles
from bma_optax.partitions._rules import Shape

# The interval of eigenvalues of the cycle times the matrix that Chebyshev steps treat.
# The largest is about 1. Conjugate directions on the parameters treat those below 0.2.
_INTERVAL = (0.2, 1.1)
_STEPS = (2, 3)  # At the first level, and at those below, where they cost little.
# The smoother is this over the rows' absolute sums, which bound the eigenvalues. Every
# step converges for numbers below 2.
_RELAXATION = 1.6


class Levels(NamedTuple):
    """The arrays of a solve, apart from the operator S of the first level."""

    smoothers: tuple[jax.Array, ...]  # of all levels but the last, (fields, *grid).
    operators: tuple[jax.Array, ...]  # S of all levels but the first and last.
    inverse: jax.Array  # of the last level's operator, shape (n, n) for its n cells.


@dataclasses.dataclass(frozen=True)
class Hierarchy:
    """The layout of the levels; static."""

    levels: tuple[tuple[Stencil, Shape], ...]  # with the tiles that are the next cells.
    bottom: Stencil

    @property
    def share(self) -> float:
        """The number of cells of the last level over that of the first."""
        first = self.levels[0][0] if self.levels else self.bottom
        return self.bottom.num_cells / max(first.num_cells, 1)

    def like(self, dtype) -> Levels:
        """The shapes of the ``Levels`` that :meth:`setup` returns."""
        n, stencils = self.bottom.num_cells, [stencil for stencil, _ in self.levels]

        def array(*shape):
            return jax.ShapeDtypeStruct(shape, dtype)

        return Levels(
            tuple(array(stencil.fields, *stencil.grid) for stencil in stencils),
            tuple(array(*stencil.shape) for stencil in stencils[1:]),
            array(n, n),
        )

    def initial(self, zeros) -> Levels:
        """``Levels`` of zeros, from zeros of shape (fields, *grid)."""
        smoothers, operators = [], []
        for stencil, tile in self.levels:
            smoothers.append(zeros)
            operators.append(stencil.spread(zeros))
            zeros = _restrict(zeros, tile)
        n = self.bottom.num_cells
        inverse = jnp.sum(zeros) + jnp.zeros((n, n), zeros.dtype)
        return Levels(tuple(smoothers), tuple(operators[1:]), inverse)

    def setup(self, S, n2, floor, null) -> tuple[Levels, jax.Array]:
        """Computes the arrays of a solve, and the eigenvalues of M on the last level.

        Smoothers and M are computed in the units of the metric, because the units of S
        can differ from field to field by any factor.

        Args:
          S: the operator of the first level.
          n2: the diagonal of the metric on the first level, shape (fields, *grid).
          floor: the least eigenvalue of the dense matrix, relative to the metric.
          null: eigenvalues of the dense matrix up to this size are taken for 0.
        """
        smoothers, operators = [], []
        for stencil, tile in self.levels:
            sums = stencil.absolute_row_sums(S, _or_one(n2))
            smoothers.append(_RELAXATION / _or_one(sums))
            _, S = stencil.coarsen(S, tile)
            operators.append(S)
            n2 = _restrict(n2, tile)
        root = jnp.sqrt(_or_one(n2).reshape(-1))
        outer = root[:, None] * jnp.broadcast_to(root, (root.size, root.size))
        M = self.bottom.dense(S) / outer
        relative = _symmetric_power.resolution(M.shape[-1], M.dtype)
        inverse = _symmetric_power.matrix_power(
            M, -1, floor, relative, absolute=True, null=null
        )
        eigenvalues = _symmetric_power.eigenvalues(jax.lax.stop_gradient(M))
        found = Levels(tuple(smoothers), tuple(operators[:-1]), inverse / outer)
        return found, eigenvalues

    def solve(self, product, levels: Levels, r):
        """Applies the approximate inverse to r.

        Args:
          product: ``x -> S x`` on the first level.
          levels: the arrays that :meth:`setup` returned.
          r: shape (fields, *grid) of the first level.
        """

        def multiply(level, x):
            """The operator of a level times x."""
            if level == 0:
                return product(x)
            return self.levels[level][0].matvec(levels.operators[level - 1], x)

        def solve(level, r):
            if level == len(self.levels):
                return _xla.product(levels.inverse, r.reshape(-1)).reshape(r.shape)
            tile, smoother = self.levels[level][1], levels.smoothers[level]

            def cycle(r):
                """One symmetric cycle: smooth, correct by the next level, smooth."""
                x = smoother * r
                residual = r - multiply(level, x)
                coarse = solve(level + 1, _restrict(residual, tile))
                x = x + _prolong(coarse, tile, r.shape)
                return x + smoother * (r - multiply(level, x))

            # A loop over steps: unrolled, the program would double at every level.
            def step(carry, coefficients):
                """One Chebyshev step, x + d for d = a B r + b d with the cycle B."""
                x, d, r = carry
                a, b = coefficients
                r = _control_flow.cond(b > 0, lambda: r - multiply(level, d), lambda: r)
                d = a * cycle(r) + b * d
                return (x + d, d, r), None

            zero = jnp.zeros_like(r)
            coefficients = _chebyshev(_STEPS[level > 0], r.dtype)
            carry, _ = _control_flow.scan(
                step, (zero, zero, r), coefficients, operands=levels
            )
            return carry[0]

        return solve(0, r)


def _chebyshev(steps, dtype):
    """The coefficients a and b of d = a B r + b d, one of each a step."""
    low, high = _INTERVAL
    center, half = (high + low) / 2, (high - low) / 2
    a, b, rho = [1 / center], [0.0], half / center
    for _ in range(steps - 1):
        last, rho = rho, 1 / (2 * center / half - rho)
        a.append(2 * rho / half)
        b.append(rho * last)
    return np.asarray(a, dtype), np.asarray(b, dtype)


def _or_one(x):
    """x where it is positive, and 1 where it is 0, as for a row of zeros."""
    return jnp.where(x > 0, x, 1)


def _restrict(x, tile):
    """Sums x over tiles of cells: the vector on the next level."""
    for axis, t in enumerate(tile):
        if t > 1:
            x = _tiles.axis_sums(x, 1 + axis, t)
    return x


def _prolong(x, tile, shape):
    """Fills tiles with the numbers of x: the vector of this shape, a level finer."""
    for axis, t in enumerate(tile):
        if t > 1:
            x = _tiles.axis_fill(x, 1 + axis, t, shape[1 + axis])
    return x
