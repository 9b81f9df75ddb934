"""Restriction Pᵀ and prolongation P between the levels of a grid.

P fills tiles of cells with what the columns of a tile are on each cell: a mean fills
them, and a slope is linear on each cell. Both work axis by axis. Without slopes P
holds the indicators of tiles. Vectors have the shape (components, *grid).
"""

import jax
import numpy as np

from bma_optax.partitions import _tiles
from bma_optax.partitions._grids import Grid
from bma_optax.partitions._rules import Shape


def restrict(grid: Grid, x, tile: Shape):
    """Pᵀx for a vector x on a grid: the vector on its tiles of cells."""
    for axis, t in enumerate(tile):
        if t > 1:
            x = _tiles.axis_sums(columns(grid, x, 0, axis, t), 1 + axis, t)
            grid = coarse_along(grid, axis, t)
    return x


def prolong(grid: Grid, x, tile: Shape):
    """P x for a vector x on the tiles of cells of a grid: the vector on its cells."""
    steps = []
    for axis, t in enumerate(tile):
        if t > 1:
            steps.append((grid, axis, t))
            grid = coarse_along(grid, axis, t)
    for finer, axis, t in reversed(steps):
        x = _tiles.axis_fill(x, 1 + axis, t, finer.grid[axis])
        x = _on_cells(finer, x, axis, t)
    return x


def restrict_metric(grid: Grid, metric, tile: Shape):
    """PᵀWP for small matrices W on a grid: those on its tiles of cells."""
    k = grid.num_columns
    for axis, t in enumerate(tile):
        if t > 1:
            W = metric.reshape(-1, k, k, *grid.grid)
            W = columns(grid, columns(grid, W, 1, axis, t), 2, axis, t)
            metric = _tiles.axis_sums(W.reshape(metric.shape), 1 + axis, t)
            grid = coarse_along(grid, axis, t)
    return metric


def coarse_along(grid: Grid, axis: int, t: int):
    """The grid of tiles of t cells along one axis."""
    tile = [1] * len(grid.grid)
    tile[axis] = t
    return grid.coarse(tuple(tile))


def columns(grid: Grid, x, where: int, axis: int, t: int, cells=None):
    """Turns products with the columns of cells into those with the columns of tiles.

    They stay apart cell by cell: their sums over a tile are the tile's products.

    Args:
      grid: the cells.
      x: an array of such products. Its last axes are those of the grid.
      where: the axis of x that counts components, or columns of one field.
      axis, t: tiles of t cells along this axis.
      cells: the cells along it, one for each position of x; by default all in order.
    """
    found = _slope(grid, axis, t)
    if found is None:
        return x
    column, shift, ratio = found
    own, other = np.ones((2, grid.num_columns, len(shift)))
    own[column], other[:], other[column] = ratio, 0, shift
    return _mixed(grid, x, where, axis, 0, own, other, cells)


def _on_cells(grid, x, axis, t):
    """The coefficients of the columns of cells, from those of their tiles."""
    found = _slope(grid, axis, t)
    if found is None:
        return x
    column, shift, ratio = found
    own, other = np.ones((2, grid.num_columns, len(shift)))
    own[column], other[:], other[0] = ratio, 0, shift
    return _mixed(grid, x, 0, axis, column, own, other)


def _slope(grid, axis, t):
    """The column of the slope along an axis, and what a tile's is on cells; or None."""
    for column, slope in enumerate(grid.slopes, start=1):
        if slope.axis == axis:
            return column, *slope.within(t)
    return None


def _mixed(grid, x, where, axis, source, own, other, cells=None):
    """Each column times ``own``, plus the column ``source`` times ``other``.

    Args:
      grid, x, where, axis, cells: see :func:`columns`.
      source: the position of a column.
      own, other: shape (columns, cells along the axis).
    """
    k = grid.num_columns
    split = x.reshape(*x.shape[:where], -1, k, *x.shape[where + 1 :])
    shape = [1] * split.ndim
    shape[where + 1] = k
    along = split.ndim - len(grid.grid) + axis
    shape[along] = split.shape[along]
    own, other = (
        (v if cells is None else v[:, cells]).reshape(shape).astype(x.dtype)
        for v in (own, other)
    )
    one = jax.lax.slice_in_dim(split, source, source + 1, axis=where + 1)
    return (own * split + other * one).reshape(x.shape)
