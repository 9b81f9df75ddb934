"""An approximate inverse of a block stencil, by nested levels of block means.

Each level has a symmetric cycle of ``_cycles``. A few Chebyshev steps use the cycle as
preconditioner, so that its quality does not fall with the number of levels (algebraic
multilevel iteration, Axelsson and Vassilevski 1989). The inverse is linear and
symmetric, and positive definite where the matrix is. It works below the level of the
parameters, where products with the matrix cost little. Where few cells are left it is
itself a matrix, made once of the cycles below: one product with it takes the place of
dozens of small operations.

Restriction sums over tiles of cells, Pᵀ x. Prolongation P fills them. The operator of
the next level is Pᵀ S P (Galerkin). Vectors of a level have shape (fields, *grid).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _sharding
from bma_optax.algebra import _symmetric_power
from bma_optax.multilevel import _cycles
from bma_optax.multilevel._cycles import Level
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

    smoothers: tuple[jax.Array, ...]  # of the levels with cycles, (fields, *grid).
    operators: tuple[jax.Array, ...]  # S of those levels but the first.
    inverse: jax.Array  # on the level below them, shape (n, n) for its n cells.


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
        n, cycled = self._last.num_cells, self.levels[: self.num_cycled]
        stencils = [stencil for stencil, _ in cycled]

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
        for stencil, tile in self.levels[: self.num_cycled]:
            smoothers.append(zeros)
            operators.append(stencil.spread(zeros))
            zeros = _restrict(zeros, tile)
        n = self._last.num_cells
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
        smoothers, operators = [], [S]
        for stencil, tile in self.levels:
            sums = stencil.absolute_row_sums(S, _or_one(n2))
            smoothers.append(_RELAXATION / _or_one(sums))
            _, S = stencil.coarsen(S, tile)
            operators.append(S)
            n2 = _restrict(n2, tile)
        S, n2 = map(_sharding.replicate, (S, n2))  # These are few numbers.
        root = jnp.sqrt(_or_one(n2).reshape(-1))
        outer = root[:, None] * jnp.broadcast_to(root, (root.size, root.size))
        M = self.bottom.dense(S) / outer
        relative = _symmetric_power.resolution(M.shape[-1], M.dtype)
        inverse = _symmetric_power.matrix_power(
            M, -1, floor, relative, absolute=True, null=null
        )
        eigenvalues = _symmetric_power.eigenvalues(jax.lax.stop_gradient(M))
        k, arrays = self.num_cycled, [*zip(smoothers, operators, strict=False)]
        matrix = self._matrix(arrays[k:], inverse / outer)
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

        units = _sharding.replicate(jnp.eye(last.num_cells, dtype=inverse.dtype))
        columns = jax.vmap(column)(units.reshape(-1, last.fields, *last.grid))
        columns = _sharding.replicate(columns.reshape(units.shape))
        return (columns + columns.T) / 2

    def solve(self, product, levels: Levels, r):
        """Applies the approximate inverse to r.

        Args:
          product: ``x -> S x`` on the first level.
          levels: the arrays that :meth:`setup` returned.
          r: shape (fields, *grid) of the first level.
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
        shape = (stencil.fields, *stencil.grid)
        return Level(
            multiply,
            smooth=lambda x: smoother * x,
            restrict=lambda x: _restrict(x, tile),
            prolong=lambda x: _prolong(x, tile, shape),
            coefficients=_chebyshev(_STEPS[i > 0], smoother.dtype),
        )


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
