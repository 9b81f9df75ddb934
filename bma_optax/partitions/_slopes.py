"""Linear functions on cells: columns beside the mean, along one axis of a grid.

A cell of ``length`` elements has the function x - its center, over the root mean square
of that: 0 where the cell has a single element. Such a function of a tile of cells is
linear on each cell, so coarser levels take no products. All of this is plain NumPy.
"""

import dataclasses
from typing import Self

import numpy as np


@dataclasses.dataclass(frozen=True)
class Slope:
    """The cells along one axis of n elements; the last one may be shorter."""

    axis: int
    n: int
    length: int

    @property
    def lengths(self) -> np.ndarray:
        """The number of elements of each cell."""
        first = np.arange(0, self.n, self.length)
        return np.minimum(first + self.length, self.n) - first

    @property
    def _centers(self) -> np.ndarray:
        return np.arange(0, self.n, self.length) + (self.lengths - 1) / 2

    @property
    def _scales(self) -> np.ndarray:
        return np.sqrt((self.lengths**2 - 1) / 12)

    @property
    def values(self) -> np.ndarray:
        """The functions on the elements of their own cell, shape (n,)."""
        shift, _ = dataclasses.replace(self, length=1).within(self.length)
        return shift

    def coarse(self, t: int) -> Self:
        """The slope on tiles of t cells."""
        return dataclasses.replace(self, length=self.length * t)

    def within(self, t: int) -> tuple[np.ndarray, np.ndarray]:
        """Splits the function of a tile of t cells into functions on each of them.

        Returns:
          The factors of the constant and of the cell's own function.
        """
        tiles = self.coarse(t)
        own = np.arange(len(self._centers)) // t
        scale = tiles._scales[own]
        scale = np.where(scale > 0, scale, np.inf)
        return (self._centers - tiles._centers[own]) / scale, self._scales / scale
