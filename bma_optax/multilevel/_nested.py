"""Arrays on one grid of tiles whose curvature has a reach: K by nested levels.

    K = B - (Λ n²)^-1,   B the approximate inverse of N + damping n²

N is a block stencil S[b, a, *offset, *cell], gathered by products with vectors on cells
of one color. ``_hierarchy`` gives B. Vectors over the blocks have shape
(fields, *grid).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _control_flow, _sharding, _tree
from bma_optax.curvature._probing import LinearOperator, Probed
from bma_optax.multilevel import _coarse_system, _local_entries
from bma_optax.multilevel._coarse_system import Inverted, Measured
from bma_optax.multilevel._hierarchy import Hierarchy, Levels
from bma_optax.multilevel._stencil import Stencil
from bma_optax.partitions._blocks import Partition
from bma_optax.partitions._grids import Grid
from bma_optax.partitions._systems import GridFields


class Correction(NamedTuple):
    """What K r needs, apart from the operator of the first level, which is N."""

    smoother: jax.Array  # shape (fields, *grid): Λ n² with the damped Λ.
    damping: jax.Array  # shape (fields, *grid): damping n², to add to N's diagonal.
    levels: Levels


@dataclasses.dataclass(frozen=True)
class Nested:
    """The coarse system of arrays on one grid; static."""

    fields: GridFields

    @functools.cached_property
    def stencil(self) -> Stencil:
        """The layout of N, in which every block is a cell."""
        return _stencil(self.fields.tiles)

    @functools.cached_property
    def hierarchy(self) -> Hierarchy:
        """The levels, of which the first has a cell for each block."""
        levels, bottom = self.fields.levels
        stencils = tuple((_stencil(grid), tile) for grid, tile in levels)
        return Hierarchy(stencils, _stencil(bottom), self.fields.num_cycled)

    @property
    def sizes(self) -> np.ndarray:
        """The number of elements of each block, shape (fields, *grid)."""
        return self.fields.sizes

    def like(self, dtype) -> tuple[Any, Any, Any]:
        """The shapes of N, of K and of Λ."""
        vector: Any = jax.ShapeDtypeStruct(self.sizes.shape, dtype)
        return (
            jax.ShapeDtypeStruct(self.stencil.shape, dtype),
            Correction(vector, vector, self.hierarchy.like(dtype)),
            vector,
        )

    def initial(self, zeros) -> tuple[Any, Any, Any]:
        """N = 0, K = 0 and Λ = 1, from zeros like numbers of blocks."""
        N = self.stencil.spread(zeros)
        return N, Correction(zeros, zeros, self.hierarchy.initial(zeros)), zeros + 1

    def shardings(self, leaves) -> tuple[Any, Any, Any]:
        """The shardings of N, K and Λ over explicit axes: as the first field's."""
        N, K, Lambda = self.like(jnp.float32)
        inverse = _sharding.replicated(K.levels.inverse, leaves)
        K = K._replace(levels=K.levels._replace(inverse=None))
        first = _sharding.of(leaves)[self.fields.positions[0]]
        N, K, Lambda = _sharding.of_cells(
            (N, K, Lambda), first, self.fields.arrays[0].shape
        )
        K = K._replace(levels=K.levels._replace(inverse=inverse))
        return N, K, Lambda

    def sums(self, leaves) -> jax.Array:
        """Sums over the elements of each block, shape (fields, *grid)."""
        dtype = _tree.common_statistic_dtype(leaves)
        arrays = (leaves[i].astype(dtype) for i in self.fields.positions)
        return jnp.stack([self.fields.arrays[0].sums(x) for x in arrays])

    def fill(self, values, leaves) -> dict[int, jax.Array]:
        """The arrays on the grid, by their positions: each block has its value."""
        tiles = self.fields.arrays[0]
        return {
            i: tiles.fill(x.astype(leaves[i].dtype))
            for i, x in zip(self.fields.positions, values, strict=True)
        }

    def measure(self, G: LinearOperator, key, diagonal: bool) -> Measured:
        """Gathers N and the diagonal by products with one color each."""
        found = _local_entries.gather(
            G, self.fields, self.stencil, key, diagonal=diagonal
        )
        N, values, check, rounding, products = found
        positions = self.fields.positions if values else ()
        diagonals = dict(zip(positions, values, strict=True))
        return Measured(N, diagonals, check, rounding, products)

    def rounding(self, G, found, n2, key) -> Probed:
        """How far rounding moves eigenvalues of M on the last level, shape ().

        An entry there is a sum of many entries of N, whose errors are independent.
        """
        del G, n2, key
        eps = float(jnp.finfo(found.N.dtype).eps)
        rounding = jnp.maximum(found.evidence.astype(found.N.dtype), eps)
        return Probed(rounding * self.hierarchy.share**0.5, jnp.int32(0))

    @_control_flow.compiled
    def invert(self, N, n2, damping, floor, rounding) -> Inverted:
        """K by nested levels, and the eigenvalues of M on the last one.

        Args:
          N: a stencil.
          n2: n², shape (fields, *grid).
          damping, floor, rounding: numbers of shape ().
        """
        stencil, s = self.stencil, self.sizes.astype(n2.dtype)
        diagonal, shift = stencil.diagonal(N), damping * n2
        Lambda = _coarse_system.smoother_mean(s, diagonal / n2)
        # Leave a block without any curvature out of the metric of coarser levels.
        metric = jnp.where(diagonal == 0, 0, n2)
        levels, eigenvalues = self.hierarchy.setup(
            stencil.add_diagonal(N, shift), metric, floor, rounding
        )
        return Inverted(
            Correction(jnp.maximum(Lambda + damping, floor) * n2, shift, levels),
            Lambda,
            *_coarse_system.spectrum(eigenvalues - damping, damping, floor, rounding),
        )

    @_control_flow.compiled
    def correct(self, N, K: Correction, r):
        """K r for block sums r, (fields, *grid), or 0 where -C g might not descend.

        It might not where rᵀ N^-1 r < 0, for an indefinite N. For the block sums r of
        g, gᵀ C g = rᵀ (N^-1 - (Λn²)^-1) r + gᵀ (Λ̄z²)^-1 g is at least rᵀ N^-1 r, by
        Cauchy and Schwarz.
        """

        def product(x):
            return self.stencil.matvec(N, x) + K.damping * x

        x = self.hierarchy.solve(product, K.levels, r)
        # The smoother is 0 where the declared reach is wrong.
        used = (jnp.sum(r * x) >= 0) & (K.smoother > 0)
        # Write x - r / smoother so that it ends in a division: XLA would compute
        # anything cheaper, and with it the sums r, again for each element of a block.
        return jnp.where(used, K.smoother * x - r, 0) / jnp.where(used, K.smoother, 1)

    def small_matrices(self, N, n2) -> list[jax.Array]:
        """No matrix: the eigenvalues of N are not known."""
        del N, n2
        return []


def nested_systems(blocks: Partition) -> tuple[Nested, ...]:
    """One system for each grid of a partition."""
    return tuple(map(Nested, blocks.grids))


def _stencil(grid: Grid) -> Stencil:
    return Stencil(grid.fields, grid.grid, grid.reach)
