"""Which blocks see each other: dense groups of them, and fields on grids.

A dense group of L blocks has an L × L matrix. On a grid each block meets a few
neighbours: a stencil holds those numbers, and coarser stencils below it stand for its
inverse, so that no dense matrix of the grid exists. All of this is plain Python,
computed from shapes.
"""

import dataclasses
import functools
import math

import numpy as np

from bma_optax.partitions import _grids
from bma_optax.partitions._coloring import Axis, num_products
from bma_optax.partitions._grids import Grid
from bma_optax.partitions._rules import Shape
from bma_optax.partitions._slopes import Slope
from bma_optax.partitions._tiles import Tiles

_MAX_MATRIX = 1024  # Rows of an inverse that is held as a matrix.

Spans = tuple[tuple[int, int], ...]  # Positions of consecutive blocks.


@dataclasses.dataclass(frozen=True)
class GridFields:
    """Arrays of one shape, tile and reach: fields on one grid."""

    positions: tuple[int, ...]  # Those of the arrays in the tree.
    arrays: tuple[Tiles, ...]

    @property
    def spans(self) -> Spans:
        """The positions of the blocks of each field."""
        return tuple((a.start, a.start + a.num_blocks) for a in self.arrays)

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """The number of elements of each block, shape (fields, *grid)."""
        array = self.arrays[0]
        one = array.block_sizes.reshape(array.grid)
        return np.broadcast_to(one, (len(self.arrays), *array.grid))

    @functools.cached_property
    def ranks(self) -> np.ndarray:
        """The number of columns of each block that do not vanish, as ``sizes``."""
        ranks = np.ones(self.sizes.shape, int)
        for slope in self.tiles.slopes:
            shape = [1] * ranks.ndim
            shape[1 + slope.axis] = -1
            ranks += (slope.lengths > 1).reshape(shape)
        return ranks

    @functools.cached_property
    def elements(self) -> Grid:
        """The grid whose cells are the elements."""
        array = self.arrays[0]
        lengths = enumerate(zip(array.shape, array.tile or (), strict=True))
        slopes = tuple(
            Slope(axis, n, 1) for axis, (n, t) in lengths if array.slopes and t > 1
        )
        return Grid(len(self.arrays), array.shape, array.reach or (), slopes)

    @functools.cached_property
    def tiles(self) -> Grid:
        """The grid whose cells are the blocks: the first level."""
        return self.elements.coarse(self.arrays[0].tile or ())

    @functools.cached_property
    def levels(self) -> tuple[tuple[tuple[Grid, Shape], ...], Grid]:
        """Each level with the tile that is a cell of the next; and the last, dense."""
        array = self.arrays[0]
        return _grids.levels_below(self.tiles, array.tile or (), array.stacked_axes)

    @functools.cached_property
    def num_cycled(self) -> int:
        """How many levels have cycles; on the one below, the inverse is a matrix.

        The first level that is small, so that neither the matrix nor making it costs
        much beside a refresh.
        """
        levels, _ = self.levels
        most = min(_MAX_MATRIX, math.isqrt(self.elements.num_cells) // 2)
        small = [grid.num_rows <= most for grid, _ in levels]
        return [*small, True].index(True)

    def axes(self, *, elements: bool, share: bool = False) -> tuple[Axis, ...]:
        """The axes with the colors of elements, or those of blocks."""
        array, tiles = self.arrays[0], self.tiles
        slopes = {slope.axis: slope for slope in tiles.slopes}
        lengths = zip(array.shape, array.tile or (), array.reach or (), strict=True)
        return tuple(
            Axis(
                n=n,
                reach=reach,
                tile=tile,
                block_reach=tiles.reach[axis],
                width=tiles.width[axis],
                fields=axis in array.stacked_axes,
                cell=1 if elements else tile,
                share=share,
                slope=slopes.get(axis),
            )
            for axis, (n, tile, reach) in enumerate(lengths)
        )

    def probes(self, *, diagonal: bool) -> tuple[tuple[Axis, ...], ...]:
        """The axes with the colors that take the fewest products for N and diag G.

        Elements give both, if no element is near two of one color. Blocks give N, and
        elements that share neighbours the diagonal; then there are two kinds of probes.
        With slopes elements give both.
        """
        one = (self.axes(elements=True),)
        if self.tiles.slopes:
            return one
        two: tuple[tuple[Axis, ...], ...] = (self.axes(elements=False),)
        if diagonal:
            two = (*two, self.axes(elements=True, share=True))
        return min(one, two, key=lambda kinds: sum(map(num_products, kinds)))

    @property
    def num_products(self) -> int:
        """The products of a refresh, those that check the reach among them."""
        kinds = self.probes(diagonal=True)
        return len(self.arrays) * sum(map(num_products, kinds))

    @property
    def num_statistics(self) -> int:
        """The numbers that a state holds: the stencil, and all that inverts it."""
        levels, bottom = self.levels
        last = [*(grid for grid, _ in levels), bottom][self.num_cycled]
        cycled = [grid for grid, _ in levels[: self.num_cycled]]
        # Small matrices: two on the first level, and the smoothers of all levels with
        # cycles.
        small = (self.tiles, self.tiles, *cycled)
        return (
            sum(math.prod(grid.shape) for grid in (self.tiles, *cycled[1:]))
            + sum(grid.num_rows * grid.num_columns for grid in small)
            + last.num_rows**2
        )
