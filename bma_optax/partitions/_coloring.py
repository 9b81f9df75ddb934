"""Colors of cells: how few products give what every cell contributes to G x.

Entries of G between elements further apart than the reach are 0. If no element is near
two cells of one color, then a product with a vector on all cells of that color gives,
at each element, the contribution of a single cell. Cells are elements or blocks. The
colors of a grid are those of its axes, combined. All of this is plain NumPy.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np

from bma_optax.partitions._slopes import Slope


class Colors(NamedTuple):
    """The colors of the cells along an axis of n elements; static."""

    of_element: np.ndarray  # shape (n,): the color of the cell of each element.
    near: np.ndarray  # shape (colors, n): the near cell of each color, -1 if none.
    clash: bool  # whether elements of a periodic axis are near two cells of a color.


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of the arrays on a grid: its blocks, and the cells of probes; static.

    - With ``share``, elements may be near two cells of a color, as long as these are
      not their own. Cells are elements then, and each counts as near itself alone.
    - With ``around``, there are as many colors as a periodic axis needs. Without it,
      cells whose positions agree modulo the number of colors have the same color, and
      cells at the two ends may be too close on a periodic axis.
    """

    n: int
    reach: int  # in elements.
    tile: int  # the length of a block; the last one may be shorter.
    block_reach: int  # in blocks.
    width: int  # the number of offsets between blocks that meet.
    fields: bool  # whether its entries count as fields of their own.
    cell: int = 1  # the length of a cell: 1, or that of a block.
    share: bool = False
    around: bool = False
    slope: Slope | None = None  # of the blocks, if they have one along this axis.

    @property
    def num_blocks(self) -> int:
        """The number of blocks."""
        return -(-self.n // self.tile)

    @property
    def num_cells(self) -> int:
        """The number of cells."""
        return -(-self.n // self.cell)

    @property
    def own(self) -> np.ndarray:
        """The cell of each element, shape (n,)."""
        return np.arange(self.n) // self.cell

    @property
    def apart(self) -> int:
        """The number of cells in a row that need different colors."""
        if self.share:
            return min(self.reach + 1, self.n)
        if 2 * self.reach + 1 >= self.n and self.around:
            return self.num_cells
        low, high = (np.arange(self.n) + k for k in (-self.reach, self.reach))
        across = (low < 0) | (high >= self.n)
        if not self.around:
            low, high = np.maximum(low, 0), np.minimum(high, self.n - 1)
            across = np.zeros(self.n, bool)
        first, last = low % self.n // self.cell, high % self.n // self.cell
        touched = last - first + 1 + np.where(across, self.num_cells, 0)
        return min(int(np.max(touched)), self.num_cells)

    @property
    def num_colors(self) -> int:
        """The number of colors."""
        if not self.around:
            return self.apart
        return -(-self.num_cells // (self.num_cells // self.apart))

    @property
    def num_tests(self) -> int:
        """The number of test vectors: one for each color, or one for all."""
        return self.num_colors if self.share or self.fields else 1

    @functools.cached_property
    def colors(self) -> Colors:
        """The colors of the cells."""
        own, reach = self.own, min(self.reach, self.n - 1)
        of_cell = np.arange(self.num_cells) % self.apart
        if self.around:
            # Runs of `apart` cells, and some longer ones, in the colors 0, 1, 2, ...
            count = self.num_cells // self.apart
            runs = np.array_split(np.arange(self.num_cells), count)
            of_cell = np.concatenate([np.arange(len(run)) for run in runs])
        element = np.arange(self.n)
        there = element + np.arange(-reach, reach + 1)[:, None]
        inside, cells = (there >= 0) & (there < self.n), there % self.n // self.cell
        near = np.full((self.num_colors, self.n), -1)
        if self.share:
            near[of_cell[own], element] = own
            same = of_cell[cells] == of_cell[own]
            return Colors(of_cell[own], near, bool(np.any(same & (cells != own))))
        for wanted in (False, True):  # Cells across the edge give way to those inside.
            for row, fits in zip(cells, inside == wanted, strict=True):
                near[of_cell[row[fits]], element[fits]] = row[fits]
        clash = bool(np.any(near[of_cell[cells], element] != cells))
        return Colors(of_cell[own], near, clash)

    @property
    def offsets(self) -> np.ndarray:
        """The offset to the block of each near cell, -1 if none: (colors, n)."""
        near = self.colors.near
        step = near * self.cell // self.tile - np.arange(self.n) // self.tile
        # If the near block is across the edge, take the shorter way around.
        step = np.where(step > self.block_reach, step - self.num_blocks, step)
        step = np.where(step < -self.block_reach, step + self.num_blocks, step)
        return np.where(near < 0, -1, step % self.width)


def num_products(axes: tuple[Axis, ...]) -> int:
    """The products for one field with each color, and those that check them."""
    return math.prod(axis.num_colors for axis in axes) + num_tests(axes)


def num_tests(axes: tuple[Axis, ...]) -> int:
    """The products for one field that check the others."""
    return math.prod(axis.num_tests for axis in axes)
