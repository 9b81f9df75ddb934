"""Matrices on grids whose entries meet only near neighbours, as block stencils.

The matrix has an entry S[b, a, *offset, *cell] between component b at a cell and
component a at the cell plus the offset:

    (S x)[b, cell] = Σ_a Σ_offset S[b, a, offset, cell] x[a, cell + offset].

Offsets run from -reach to reach along each axis, and cells wrap around. S has the shape
(components, components, *offsets, *grid), vectors have the shape (components, *grid).
Components are the fields, or with slopes the columns of each field. Small matrices, one
for each cell, are those of ``_cell_matrices``.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _control_flow, _xla
from bma_optax.multilevel import _cell_matrices, _transfers
from bma_optax.partitions import _tiles
from bma_optax.partitions._grids import Grid
from bma_optax.partitions._rules import Shape

_FEW = 8  # So few components that a term for each makes no large program.


@dataclasses.dataclass(frozen=True)
class Stencil(Grid):
    """The layout of a :class:`Grid`, with operations on its matrix S."""

    @_control_flow.compiled
    def matvec(self, S, x):
        """S x for x of shape (components, *grid)."""
        offsets = [
            [self.offset(axis, i) for i in range(m)]
            for axis, m in enumerate(self.width)
        ]
        total = jnp.zeros_like(x)
        every = itertools.product(*map(range, self.width))
        for index, near in zip(every, _xla.neighbours(x, offsets), strict=True):
            part = S[(slice(None), slice(None), *index)]
            if self.components > _FEW:
                total = total + jnp.sum(part * near[None], axis=1)
                continue
            # XLA on CPU takes fifty times longer for a sum over a short axis.
            for a in range(self.components):
                total = total + part[:, a] * jnp.broadcast_to(near[a], x.shape)
        return total

    def spread(self, x):
        """A matrix with x, shape (components, *grid), in the place of its entries.

        It is sharded as x is.
        """
        axes = range(1, 2 + len(self.grid))
        return jnp.broadcast_to(jnp.expand_dims(x, axes), self.shape)

    def diagonal(self, S):
        """The diagonal of the matrix, shape (components, *grid)."""
        zero = (0,) * len(self.grid)
        return jnp.stack([S[(a, a, *zero)] for a in range(self.components)])

    def within_cells(self, S):
        """The entries within each cell and field: small matrices."""
        k, zero = self.num_columns, (0,) * len(self.grid)
        every = itertools.product(range(self.fields), range(k), range(k))
        return jnp.stack([S[(f * k + i, f * k + j, *zero)] for f, i, j in every])

    def add(self, S, matrices):
        """S with the small matrices added within each cell and field."""
        k, zero = self.num_columns, (0,) * len(self.grid)
        parts = matrices.reshape(-1, k, k, *self.grid)
        for field, i, j in itertools.product(range(self.fields), range(k), range(k)):
            S = S.at[(field * k + i, field * k + j, *zero)].add(parts[field, i, j])
        return S

    def absolute_row_sums(self, S, T):
        """Bounds of the row sums of |TᵀST|, shape (components, *grid), for matrices T.

        They are the row sums of |Tᵀ||S||T|, which equal those where T is diagonal.
        """
        T, k = jnp.abs(T), self.num_columns
        ones = jnp.ones((self.components, *self.grid), S.dtype)
        sums = self.matvec(jnp.abs(S), _cell_matrices.times(T, ones))
        return _cell_matrices.times(_cell_matrices.transpose(T, k), sums)

    def coarsen(self, S, tile: Shape):
        """The Galerkin operator PᵀSP: its layout and S."""
        for axis, t in enumerate(tile):
            if t > 1:
                self, S = self._coarsen_axis(S, axis, t)
        return self, S

    def _coarsen_axis(self, S, axis, t):
        """Coarsens along one axis, by tiles of t cells."""
        coarse = _transfers.coarse_along(self, axis, t)
        g, m = self.grid[axis], coarse.width[axis]
        offset_axis, cell_axis = 2 + axis, 2 + len(self.grid) + axis
        parts: dict[int, list] = {i: [] for i in range(m)}
        for i in range(self.width[axis]):
            cells = np.arange(g)
            neighbours = (cells + self.offset(axis, i)) % g
            step = neighbours // t - cells // t
            # If the neighbour is across the edge, take the shorter way around.
            n = coarse.grid[axis]
            step = np.where(step > coarse.reach[axis], step - n, step)
            step = np.where(step < -coarse.reach[axis], step + n, step)
            values = jax.lax.index_in_dim(S, i, offset_axis, keepdims=False)
            values = _transfers.columns(self, values, 0, axis, t)
            values = _transfers.columns(self, values, 1, axis, t, neighbours)
            for target in np.unique(step % m):
                mask = (step % m == target).astype(S.dtype)
                shape = [1] * values.ndim
                shape[cell_axis - 1] = g
                masked = values * jnp.broadcast_to(mask.reshape(shape), values.shape)
                parts[int(target)].append(_tiles.axis_sums(masked, cell_axis - 1, t))
        kept = (*S.shape[:offset_axis], *S.shape[offset_axis + 1 :])
        empty = (*kept[: cell_axis - 1], coarse.grid[axis], *kept[cell_axis:])
        stacked = [
            sum(group[1:], group[0]) if group else jnp.zeros(empty, S.dtype)
            for group in parts.values()
        ]
        return coarse, jnp.stack(stacked, axis=offset_axis)

    def dense(self, S):
        """The matrix itself, shape (n, n); its rows are in the order of vectors."""
        dim, n = len(self.grid), self.num_rows
        cell = np.arange(math.prod(self.grid)).reshape(self.grid)
        rows, columns = np.zeros(self.shape, int), np.zeros(self.shape, int)
        for index in itertools.product(*map(range, self.width)):
            shift = [-self.offset(axis, i) for axis, i in enumerate(index)]
            neighbour = np.roll(cell, shift, axis=range(dim))
            for b, a in itertools.product(range(self.components), repeat=2):
                rows[(b, a, *index)] = b * cell.size + cell
                columns[(b, a, *index)] = a * cell.size + neighbour
        flat = jnp.zeros((n, n), S.dtype)
        return flat.at[rows.ravel(), columns.ravel()].add(S.reshape(-1))
