"""The layout of matrices on grids: which cells meet, and the levels below.

A matrix whose entries meet only between near neighbours is a stencil: an array of (2
reach + 1)^dim numbers for each cell. Tiles of cells are the cells of a coarser grid,
level by level, until a dense matrix costs nothing. All of this is plain Python,
computed from shapes.
"""

import dataclasses
import math
from typing import Self

from bma_optax.partitions._rules import Shape
from bma_optax.partitions._slopes import Slope

_MAX_DENSE = 64  # Cells of the last level, whose matrix is dense.
_COARSENING = 4  # The length of a tile of cells, along each axis.
_COARSENING_WITH_SLOPES = 2  # With 4, fourth-order operators are not independent of n.
_MAX_EXACT = 1000  # Cells of a dense last level where tiles have one element.


@dataclasses.dataclass(frozen=True)
class Grid:
    """The layout of a stencil S[b, a, *offset, *cell], for cells of several fields.

    S holds the entry of the matrix between component b at a cell and component a at the
    cell + offset. A component is a column of a field: its mean, or one of its slopes;
    those of the first field come first. Offsets along an axis of g cells run from
    -reach to reach, modulo their number m = min(2 reach + 1, g). Cells wrap around:
    entries across the edge are zero unless the grid is periodic.
    """

    fields: int
    grid: Shape  # The number of cells along each axis.
    reach: Shape  # In cells, along each axis.
    slopes: tuple[Slope, ...] = ()  # The columns of a cell beside its mean.

    @property
    def width(self) -> Shape:
        """m for each axis, the number of offsets."""
        return tuple(
            min(2 * k + 1, g) for k, g in zip(self.reach, self.grid, strict=True)
        )

    @property
    def shape(self) -> Shape:
        """The shape of S."""
        return (self.components, self.components, *self.width, *self.grid)

    @property
    def num_columns(self) -> int:
        """k, the number of columns of each cell."""
        return 1 + len(self.slopes)

    @property
    def components(self) -> int:
        """The number of columns of all fields."""
        return self.fields * self.num_columns

    @property
    def num_cells(self) -> int:
        """The number of cells of all fields."""
        return self.fields * math.prod(self.grid)

    @property
    def num_rows(self) -> int:
        """The number of rows of the matrix."""
        return self.components * math.prod(self.grid)

    def offset(self, axis: int, index: int) -> int:
        """The offset at a position of the stencil."""
        m, k = self.width[axis], self.reach[axis]
        return index if index <= k or m == self.grid[axis] else index - m

    def coarse(self, tile: Shape) -> Self:
        """The layout of the Galerkin operator PᵀSP for the indicators P of tiles."""
        grid = tuple(-(-g // t) for g, t in zip(self.grid, tile, strict=True))
        # Across a last tile that is shorter than the reach, on a periodic grid, cells
        # meet one tile further.
        reach = tuple(
            -(-k // t) + (0 < g % t < k)
            for k, t, g in zip(self.reach, tile, self.grid, strict=True)
        )
        slopes = tuple(slope.coarse(tile[slope.axis]) for slope in self.slopes)
        return type(self)(self.fields, grid, reach, slopes)


def levels_below(
    grid: Grid, first_tile: Shape, fields: tuple[int, ...]
) -> tuple[tuple[tuple[Grid, Shape], ...], Grid]:
    """From the first level down to at most 64 blocks, by tiles of 4 or the reach.

    With slopes tiles are half as long. Axes that tiles of one element cut stay as they
    are while the dense matrix at the bottom has no more than 1000 rows: with tiles of
    one element alone that is Newton's method.

    Args:
      grid: the layout of the first level.
      first_tile: the tile that is a cell of the first level.
      fields: axes that are never coarsened, as their entries are not neighbours.

    Returns:
      Each level with the tile of its cells that is a cell of the next; the last one.
    """
    levels = []
    axes = [axis for axis in range(len(grid.grid)) if axis not in fields]
    long = [axis for axis in axes if first_tile[axis] > 1]
    while grid.num_cells > _MAX_DENSE:
        tile = _coarsening(grid, long)
        if math.prod(tile) == 1 and grid.num_cells > _MAX_EXACT:
            tile = _coarsening(grid, axes)
        if math.prod(tile) == 1:
            break
        levels.append((grid, tile))
        grid = grid.coarse(tile)
    return tuple(levels), grid


def _coarsening(grid: Grid, axes: list[int]) -> Shape:
    """Tiles of 4 or the reach along some axes, or of 2 with slopes."""
    least = _COARSENING_WITH_SLOPES if grid.slopes else _COARSENING
    return tuple(
        min(max(least, k), g) if axis in axes else 1
        for axis, (k, g) in enumerate(zip(grid.reach, grid.grid, strict=True))
    )
