"""An approximate inverse of a block stencil, by nested levels of block means.

Each level has a symmetric cycle of ``_cycles``. A few Chebyshev steps use the cycle as
preconditioner, so that its quality does not fall with the number of levels (algebraic
multilevel iteration, Axelsson and Vassilevski 1989). The inverse is linear and
symmetric, and positive definite where the matrix is. It works below the level of the
parameters, where products with the matrix cost little. Where few cells are left it is
itself a matrix, made once of the cycles below: one product with it takes the place of
dozens of small operations.

``_transfers`` gives restriction Pᵀ and prolongation P. The operator of the next level
is Pᵀ S P (Galerkin). Vectors of a level have shape (components, *grid); the smoother is
a small matrix for each cell and field, see ``_cell_matrices``.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _sharding
from bma_optax.algebra import _eigh, _symmetric_power
from bma_optax.multilevel import _cell_matrices, _cycles, _transfers
from bma_optax.multilevel._cycles import Level
from bma_optax.multilevel._stencil import Stencil
from bma_optax.partitions._rules import Shape

# The interval of eigenvalues of the cycle times the matrix that Chebyshev steps treat.
# The largest is about 1. Conjugate directions on the parameters treat those below 0.2.
_INTERVAL = (0.2, 1.1)
_STEPS = (2, 3)  # At the first level, and at those below, where they cost little.
# With slopes, for operators of fourth order. With (3, 4) a plate at 256² takes 90
# iterations for 99, and more seconds; with (2, 3) tiles of 3 do not converge.
_INTERVAL_WITH_SLOPES = (0.1, 1.1)
_STEPS_WITH_SLOPES = (2, 4)
# The smoother is this over the rows' absolute sums, which bound the eigenvalues. Every
# step converges for numbers below 2.
_RELAXATION = 1.6


class Levels(NamedTuple):
    """The arrays of a solve, apart from the operator S of the first level."""

    # Of the levels with cycles, small matrices for k columns: (fields k k, *grid).
    smoothers: tuple[jax.Array, ...]
    operators: tuple[jax.Array, ...]  # S of those levels but the first.
    inverse: jax.Array  # on the level below them, shape (n, n) for its n rows.


@dataclasses.dataclass(frozen=True)
class Hierarchy:
    """The layout of the levels; static."""

    levels: tuple[tuple[Stencil, Shape], ...]  # with the tiles that are the next cells.
    bottom: Stencil
    num_cycled: int  # The number of levels with cycles. The next one has a matrix.

    @property
    def share(self) -> float:
        """The number of cells of the last level over that of the first."""
        first = self.levels[0][0] if self.levels else self.bottom
        return self.bottom.num_cells / max(first.num_cells, 1)

    def like(self, dtype) -> Levels:
        """The shapes of the ``Levels`` that :meth:`setup` returns."""
        n, cycled = self._last.num_rows, self.levels[: self.num_cycled]
        stencils = [stencil for stencil, _ in cycled]

        def array(*shape):
            return jax.ShapeDtypeStruct(shape, dtype)

        return Levels(
            tuple(
                array(stencil.components * stencil.num_columns, *stencil.grid)
                for stencil in stencils
            ),
            tuple(array(*stencil.shape) for stencil in stencils[1:]),
            array(n, n),
        )

    def initial(self, zeros) -> Levels:
        """``Levels`` of zeros, from zeros of shape (components, *grid)."""
        smoothers, operators = [], []
        for stencil, tile in self.levels[: self.num_cycled]:
            smoothers.append(_cell_matrices.repeat(zeros, stencil.num_columns))
            operators.append(stencil.spread(zeros))
            zeros = _transfers.restrict(stencil, zeros, tile)
        n = self._last.num_rows
        inverse = jnp.sum(zeros) + jnp.zeros((n, n), zeros.dtype)
        return Levels(tuple(smoothers), tuple(operators[1:]), inverse)

    def setup(self, S, metric, floor, null) -> tuple[Levels, jax.Array]:
        """Computes the arrays of a solve, and the eigenvalues of M on the last level.

        Smoothers and M are computed in columns that are orthonormal in the metric,
        because the units of S can differ from field to field by any factor.

        Args:
          S: the operator of the first level.
          metric: of the first level, small matrices.
          floor: the least eigenvalue of the dense matrix, relative to the metric.
          null: eigenvalues of the dense matrix up to this size are taken for 0.
        """
        smoothers, operators = [], [S]
        for stencil, tile in self.levels:
            T = _cell_matrices.orthonormal(metric, stencil.num_columns)
            sums = stencil.absolute_row_sums(S, T)
            root = jnp.sqrt(_RELAXATION / jnp.where(sums > 0, sums, 1))
            smoothers.append(_cell_matrices.gram(T, root))
            _, S = stencil.coarsen(S, tile)
            operators.append(S)
            metric = _transfers.restrict_metric(stencil, metric, tile)
        S, metric = map(_sharding.replicate, (S, metric))  # These are few numbers.
        bottom, columns = self.bottom, self.bottom.num_columns
        shape = (bottom.components, *bottom.grid)
        T = _cell_matrices.orthonormal(metric, columns)
        M = _on_both_sides(_cell_matrices.transpose(T, columns), bottom.dense(S), shape)
        if columns > 1:  # Those that vanish are no directions of M.
            vanishing = _cell_matrices.diagonal(T, columns) == 0
            M = M + jnp.diag(vanishing.reshape(-1).astype(M.dtype))
        relative = _symmetric_power.resolution(M.shape[-1], M.dtype)
        inverse = _symmetric_power.matrix_power(
            M, -1, floor, relative, absolute=True, null=null
        )
        eigenvalues = _eigh.eigenvalues(jax.lax.stop_gradient(M))
        k, arrays = self.num_cycled, [*zip(smoothers, operators, strict=False)]
        matrix = self._matrix(arrays[k:], _on_both_sides(T, inverse, shape))
        return Levels(tuple(smoothers[:k]), tuple(operators[1:k]), matrix), eigenvalues

    @property
    def _last(self) -> Stencil:
        """The layout of the level below those with cycles."""
        return [*(stencil for stencil, _ in self.levels), self.bottom][self.num_cycled]

    def _matrix(self, below, inverse):
        """The inverse below the levels with cycles, symmetric.

        Args:
          below: a smoother and an operator for each further level but the last.
          inverse: of the last level's operator.
        """
        if not below:
            return inverse
        # Few numbers, which shards would exchange at each of many steps.
        below = jax.tree.map(_sharding.replicate, below)
        last, first = self._last, self.num_cycled
        levels = [
            self._level(i, smoother, functools.partial(self.levels[i][0].matvec, S))
            for i, (smoother, S) in enumerate(below, start=first)
        ]

        def column(r):
            return _cycles.solve(levels, inverse, r, (below, r))

        units = _sharding.replicate(jnp.eye(last.num_rows, dtype=inverse.dtype))
        columns = jax.vmap(column)(units.reshape(-1, last.components, *last.grid))
        columns = _sharding.replicate(columns.reshape(units.shape))
        return (columns + columns.T) / 2

    def solve(self, product, levels: Levels, r):
        """Applies the approximate inverse to r.

        Args:
          product: ``x -> S x`` on the first level.
          levels: the arrays that :meth:`setup` returned.
          r: shape (components, *grid) of the first level.
        """
        products = [product]
        for (stencil, _), S in zip(self.levels[1:], levels.operators, strict=False):
            products.append(functools.partial(stencil.matvec, S))
        pairs = zip(levels.smoothers, products, strict=False)
        cycled = [self._level(i, *pair) for i, pair in enumerate(pairs)]
        return _cycles.solve(cycled, levels.inverse, r, levels)

    def _level(self, i, smoother, multiply) -> Level:
        """The operations of one level."""
        stencil, tile = self.levels[i]
        return Level(
            multiply,
            smooth=lambda x: _cell_matrices.times(smoother, x),
            restrict=lambda x: _transfers.restrict(stencil, x, tile),
            prolong=lambda x: _transfers.prolong(stencil, x, tile),
            coefficients=_chebyshev(bool(stencil.slopes), i, smoother.dtype),
        )


def _chebyshev(slopes, level, dtype):
    """The coefficients a and b of d = a B r + b d, one of each a step."""
    low, high = _INTERVAL_WITH_SLOPES if slopes else _INTERVAL
    steps = (_STEPS_WITH_SLOPES if slopes else _STEPS)[level > 0]
    center, half = (high + low) / 2, (high - low) / 2
    a, b, rho = [1 / center], [0.0], half / center
    for _ in range(steps - 1):
        last, rho = rho, 1 / (2 * center / half - rho)
        a.append(2 * rho / half)
        b.append(rho * last)
    return np.asarray(a, dtype), np.asarray(b, dtype)


def _on_both_sides(T, matrix, shape):
    """T A Tᵀ for a matrix A, shape (n, n), whose rows are vectors of a shape."""
    for _ in range(2):
        left = functools.partial(_cell_matrices.times, T)
        rows = matrix.reshape(*shape, matrix.shape[-1])
        matrix = jax.vmap(left, -1, -1)(rows).reshape(matrix.shape).T
    return matrix
