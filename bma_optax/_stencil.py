"""Matrices on grids whose entries meet only near neighbours, as block stencils."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _flow, _tiles
from bma_optax._rules import Shape


@dataclasses.dataclass(frozen=True)
class Stencil:
    """The layout S[b, a, *offset, *cell]: the entry from field a at cell + offset to b.

    Offsets along an axis of g cells are those from -reach to reach, kept modulo their
    number m = 2 reach + 1; all g of them where the axis is shorter than that. Cells
    wrap around: entries across the edge are zero unless the grid is periodic.
    """

    fields: int
    grid: Shape
    reach: Shape

    @property
    def colors(self) -> Shape:
        """m for each axis: cells of equal index modulo m share no neighbour."""
        return tuple(
            min(2 * k + 1, g) for k, g in zip(self.reach, self.grid, strict=True)
        )

    @property
    def apart(self) -> Shape:
        """For each axis: cells of equal index modulo this do not meet."""
        return tuple(min(k + 1, g) for k, g in zip(self.reach, self.grid, strict=True))

    @property
    def shape(self) -> Shape:
        """The shape of S."""
        return (self.fields, self.fields, *self.colors, *self.grid)

    @property
    def num_cells(self) -> int:
        """The number of rows of the matrix."""
        return self.fields * math.prod(self.grid)

    def offset(self, axis: int, index: int) -> int:
        """The offset at a position of the stencil."""
        m, k = self.colors[axis], self.reach[axis]
        return index if index <= k or m == self.grid[axis] else index - m

    @_flow.compiled
    def from_colors(self, Y):
        """S from responses Y[a, *color, b, *cell]: color is (cell + offset) mod m."""
        S = Y.transpose(self._from_colors_order())
        for axis, (m, g) in enumerate(zip(self.colors, self.grid, strict=True)):
            color_axis, cell_axis = 2 + axis, 2 + len(self.grid) + axis
            offset, cell = np.arange(m)[:, None], np.arange(g)
            shape = [1] * S.ndim
            shape[color_axis], shape[cell_axis] = m, g
            total = jnp.zeros_like(S)
            for color in range(m):
                mask = ((cell + offset) % m == color).astype(S.dtype)
                part = jax.lax.slice_in_dim(S, color, color + 1, axis=color_axis)
                mask = jnp.broadcast_to(mask.reshape(shape), S.shape)
                total = total + mask * jnp.broadcast_to(part, S.shape)
            S = total
        return S

    def _from_colors_order(self):
        """From (a, *color, b, *cell) to (b, a, *color, *cell)."""
        dim = len(self.grid)
        return (1 + dim, 0, *range(1, 1 + dim), *range(2 + dim, 2 + 2 * dim))

    @_flow.compiled
    def matvec(self, S, x):
        """S x for x of shape (fields, *grid)."""
        pads, starts = [(0, 0)], []
        for axis, m in enumerate(self.colors):
            offsets = [self.offset(axis, i) for i in range(m)]
            pads.append((max(0, -min(offsets)), max(0, max(offsets))))
            starts.append([pads[-1][0] + o for o in offsets])
        padded = x
        for axis, (before, after) in enumerate(pads):
            padded = _wrap(padded, axis, before, after)
        total = jnp.zeros_like(x)
        for index in itertools.product(*map(range, self.colors)):
            window = tuple(
                slice(starts[axis][i], starts[axis][i] + g)
                for axis, (i, g) in enumerate(zip(index, self.grid, strict=True))
            )
            near = padded[(slice(None), *window)]
            part = S[(slice(None), slice(None), *index)]
            if self.fields == 1:
                total = total + part[0] * near
            else:
                total = total + jnp.sum(part * near[None], axis=1)
        return total

    def diagonal(self, S):
        """The diagonal, shape (fields, *grid)."""
        zero = (0,) * len(self.grid)
        return jnp.stack([S[(a, a, *zero)] for a in range(self.fields)])

    def add_diagonal(self, S, values):
        """S with values of shape (fields, *grid) added to its diagonal."""
        zero = (0,) * len(self.grid)
        for a in range(self.fields):
            S = S.at[(a, a, *zero)].add(values[a])
        return S

    def absolute_row_sums(self, S):
        """Σ |entries| of each row, shape (fields, *grid)."""
        return jnp.sum(jnp.abs(S), axis=range(1, 2 + len(self.grid)))

    def coarsen(self, S, tile: Shape):
        """PᵀSP for the indicators P of tiles: the coarser layout and its S."""
        for axis, t in enumerate(tile):
            if t > 1:
                self, S = self._coarsen_axis(S, axis, t)
        return self, S

    def coarse(self, tile: Shape) -> "Stencil":
        """The layout that ``coarsen`` gives."""
        grid = tuple(-(-g // t) for g, t in zip(self.grid, tile, strict=True))
        reach = tuple(-(-k // t) for k, t in zip(self.reach, tile, strict=True))
        return Stencil(self.fields, grid, reach)

    def _coarsen_axis(self, S, axis, t):
        tile = [1] * len(self.grid)
        tile[axis] = t
        coarse = self.coarse(tuple(tile))
        g, m = self.grid[axis], coarse.colors[axis]
        offset_axis, cell_axis = 2 + axis, 2 + len(self.grid) + axis
        parts: dict[int, list] = {i: [] for i in range(m)}
        for i in range(self.colors[axis]):
            cells = np.arange(g)
            neighbours = (cells + self.offset(axis, i)) % g
            step = neighbours // t - cells // t
            # The shorter way round, where the neighbour is across the edge.
            n = coarse.grid[axis]
            step = np.where(step > coarse.reach[axis], step - n, step)
            step = np.where(step < -coarse.reach[axis], step + n, step)
            values = jnp.take(S, i, axis=offset_axis)
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
        """The matrix itself, with rows (field, *cell)."""
        dim, n = len(self.grid), self.num_cells
        cell = np.arange(math.prod(self.grid)).reshape(self.grid)
        rows, columns = np.zeros(self.shape, int), np.zeros(self.shape, int)
        for index in itertools.product(*map(range, self.colors)):
            shift = [-self.offset(axis, i) for axis, i in enumerate(index)]
            neighbour = np.roll(cell, shift, axis=range(dim))
            for b, a in itertools.product(range(self.fields), repeat=2):
                rows[(b, a, *index)] = b * cell.size + cell
                columns[(b, a, *index)] = a * cell.size + neighbour
        flat = jnp.zeros((n, n), S.dtype)
        return flat.at[rows.ravel(), columns.ravel()].add(S.reshape(-1))


def _wrap(x, axis, before, after):
    """x with its last elements before it along an axis, and its first ones after it.

    One concatenation: ``jnp.pad`` makes one for each end, and they are not fused.
    """
    n = x.shape[axis]
    first = jax.lax.slice_in_dim(x, n - before, n, axis=axis)
    last = jax.lax.slice_in_dim(x, 0, after, axis=axis)
    return jnp.concatenate([first, x, last], axis=axis) if before + after else x
