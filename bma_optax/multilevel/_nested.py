"""Arrays on one grid of tiles whose curvature has a reach: K by nested levels.

    K = B - (Λ n²)^-1,   B the approximate inverse of N + damping n²

N is a block stencil S[b, a, *offset, *cell], gathered by products with vectors on cells
of one color. ``_hierarchy`` gives B. Numbers of blocks have the shape (fields, *grid).

With slopes a block has k columns φ in the place of its indicator: 1, and along each
axis a linear function. Then N = φᵀ G φ, and the small matrix W = φᵀ Z² φ of each block
stands in the place of n². Vectors have the shape (fields k, *grid).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _control_flow, _sharding, _tree, _xla
from bma_optax.curvature._probing import LinearOperator, Probed
from bma_optax.multilevel import _cell_matrices, _coarse_system, _local_entries
from bma_optax.multilevel._coarse_system import Inverted, Measured
from bma_optax.multilevel._hierarchy import Hierarchy, Levels
from bma_optax.multilevel._stencil import Stencil
from bma_optax.partitions._blocks import Partition
from bma_optax.partitions._grids import Grid
from bma_optax.partitions._systems import GridFields


class Correction(NamedTuple):
    """The arrays of K r, apart from the operator of the first level, which is N."""

    # Small matrices for k columns, shape (fields k k, *grid), see _cell_matrices.
    smoother: jax.Array  # (Λ W)^-1 with the damped Λ.
    damping: jax.Array  # damping W, to add to N.
    levels: Levels


@dataclasses.dataclass(frozen=True)
class Nested:
    """The coarse system of arrays on one grid; static."""

    fields: GridFields
    has_diagonal = True  # :meth:`measure` gives it.

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
        k, (fields, *grid) = self.stencil.num_columns, self.sizes.shape
        small: Any = jax.ShapeDtypeStruct((fields * k * k, *grid), dtype)
        return (
            jax.ShapeDtypeStruct(self.stencil.shape, dtype),
            Correction(small, small, self.hierarchy.like(dtype)),
            jax.ShapeDtypeStruct(self.sizes.shape, dtype),
        )

    def initial(self, zeros) -> tuple[Any, Any, Any]:
        """N = 0, K = 0 and Λ = 1, from zeros like numbers of blocks."""
        k = self.stencil.num_columns
        vector = _cell_matrices.repeat(zeros, k)
        small = _cell_matrices.repeat(vector, k)
        levels = self.hierarchy.initial(vector)
        N = self.stencil.spread(vector)
        return N, Correction(small, small, levels), zeros + 1

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

    def replicate(self, K) -> Correction:
        """K with the matrix of the last level on all devices."""
        inverse = _sharding.replicate(K.levels.inverse)
        return K._replace(levels=K.levels._replace(inverse=inverse))

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

    def restrict(self, leaves) -> jax.Array:
        """φᵀ times arrays: a vector, shape (fields k, *grid)."""
        dtype = _tree.common_statistic_dtype(leaves)
        sums = self.fields.arrays[0].sums
        arrays = (leaves[i].astype(dtype) for i in self.fields.positions)
        return jnp.stack([sums(w * x) for x in arrays for w in self._columns(dtype)])

    def prolong(self, values, leaves) -> dict[int, jax.Array]:
        """The arrays φ times a vector, by their positions."""
        k, tiles = self.stencil.num_columns, self.fields.arrays[0]
        filled = {}
        for field, i in enumerate(self.fields.positions):
            x = values[field * k : (field + 1) * k].astype(leaves[i].dtype)
            parts = [
                w * tiles.fill(y)
                for w, y in zip(self._columns(x.dtype), x, strict=True)
            ]
            filled[i] = sum(parts[1:], parts[0])
        return filled

    def metric(self, leaves) -> jax.Array:
        """φᵀ times diagonal matrices times φ: small matrices."""
        dtype = _tree.common_statistic_dtype(leaves)
        sums, columns = self.fields.arrays[0].sums, self._columns(dtype)
        arrays = [leaves[i].astype(dtype) for i in self.fields.positions]
        return jnp.stack(
            [sums(w * (v * x)) for x in arrays for w in columns for v in columns]
        )

    def _columns(self, dtype) -> list:
        """Each column φ of all blocks side by side: an array of few numbers, or 1."""
        array = self.fields.arrays[0]
        slopes = []
        for slope in self.stencil.slopes:
            shape = [1] * len(array.shape)
            shape[slope.axis] = slope.n
            slopes.append(jnp.asarray(slope.values.reshape(shape), dtype))
        return [1, *slopes]

    def measure(self, G: LinearOperator, key, diagonal: bool, n2=None) -> Measured:
        """Gathers N and the diagonal by products with one color each."""
        del n2
        found = _local_entries.gather(
            G, self.fields, self.stencil, key, diagonal=diagonal
        )
        N, values, check, rounding, products = found
        positions = self.fields.positions if values else ()
        diagonals = dict(zip(positions, values, strict=True))
        return Measured(N, diagonals, check, rounding, products)

    def rounding(self, G, found, W, key) -> Probed:
        """How far rounding moves eigenvalues of M on the last level, shape ().

        An entry there is a sum of many entries of N, whose errors are independent.
        """
        del G, W, key
        eps = float(jnp.finfo(found.N.dtype).eps)
        rounding = jnp.maximum(found.evidence.astype(found.N.dtype), eps)
        return Probed(rounding * self.hierarchy.share**0.5, jnp.int32(0))

    @_control_flow.compiled
    def invert(self, N, W, damping, floor, rounding) -> Inverted:
        """K by nested levels, and the eigenvalues of M on the last one.

        Args:
          N: a stencil.
          W: small matrices; without slopes n².
          damping, floor, rounding: numbers of shape ().
        """
        stencil, k = self.stencil, self.stencil.num_columns
        diagonal, shift = stencil.diagonal(N), damping * W
        T = _cell_matrices.orthonormal(W, k)
        s, rank = (x.astype(W.dtype) for x in (self.sizes, self.fields.ranks))
        inverse = _cell_matrices.gram(T, jnp.ones_like(diagonal))
        trace = _cell_matrices.inner(stencil.within_cells(N), inverse, k)
        Lambda = _coarse_system.smoother_mean(s, trace, rank)
        # Leave a block without any curvature out of the metric of coarser levels.
        metric = _cell_matrices.without(W, diagonal == 0, k)
        levels, eigenvalues = self.hierarchy.setup(
            stencil.add(N, shift), metric, floor, rounding
        )
        damped = jnp.maximum(Lambda + damping, floor)
        inverse = _cell_matrices.gram(T, _cell_matrices.repeat(damped**-0.5, k))
        return Inverted(
            Correction(inverse, shift, levels),
            Lambda,
            *_coarse_system.spectrum(eigenvalues - damping, damping, floor, rounding),
        )

    @_control_flow.compiled
    def correct(self, N, K: Correction, r):
        """K r for a vector r = φᵀ g, or 0 where -C g might not descend.

        It might not where rᵀ N^-1 r < 0, for an indefinite N. For r = φᵀ g,
        gᵀ C g = rᵀ (N^-1 - (Λ W)^-1) r + gᵀ (Λ̄z²)^-1 g is at least rᵀ N^-1 r, by
        Cauchy and Schwarz.
        """

        def product(x):
            return self.stencil.matvec(N, x) + _cell_matrices.times(K.damping, x)

        x = self.hierarchy.solve(product, K.levels, r)
        k = self.stencil.num_columns
        # The smoother is 0 where the declared reach is wrong.
        known = _cell_matrices.diagonal(K.smoother, k)[::k] > 0
        used = (jnp.sum(r * x) >= 0) & _cell_matrices.repeat(known, k)
        x = jnp.where(used, x - _cell_matrices.times(K.smoother, r), 0)
        # Stored: XLA would compute it, and with it the sums r, for each element again.
        return _xla.materialize(x, r)

    def small_matrices(self, N, W) -> list[jax.Array]:
        """No matrix: the eigenvalues of N are not known."""
        del N, W
        return []


def nested_systems(blocks: Partition) -> tuple[Nested, ...]:
    """One system for each grid of a partition."""
    return tuple(map(Nested, blocks.grids))


def _stencil(grid: Grid) -> Stencil:
    return Stencil(grid.fields, grid.grid, grid.reach, grid.slopes)
