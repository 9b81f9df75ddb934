"""Partition rules of elements and tiles, and from a function.

Tiles along the leading axes of an array are blocks of neighbours: pixels of an image,
cells of a volume. With a ``reach`` they are the cells of a grid on which the curvature
is a stencil.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from bma_optax import _names
from bma_optax._checks import is_integer
from bma_optax.partitions._rules import (
    Path,
    Rule,
    Shape,
    without_parentheses,
)


@dataclasses.dataclass(frozen=True)
class _PerElement(Rule):
    """One block for each element; AdaGrad-BMA with it is AdaGrad-Full.

    Example:
      >>> import jax.numpy as jnp, bma_optax as bma
      >>> bma.partition(jnp.ones(3), bma.per_element).sizes
      (1, 1, 1)
    """

    def tile(self, path, shape):
        return (1,) * len(shape)

    def __repr__(self):
        return "per_element"


@dataclasses.dataclass(frozen=True)
class _PerTile(Rule):
    leading: Shape
    distance: Shape | None  # The reach along each of the leading axes.
    linear: bool = False  # Whether blocks have slopes beside means.

    def tile(self, path, shape):
        if math.prod(shape) <= 1:  # A number has no neighbours; or there is none.
            return shape
        fits = len(self.leading) <= len(shape) and all(
            t <= n for t, n in zip(self.leading, shape, strict=False)
        )
        if not fits:
            raise ValueError(
                f"{_names.name_of(path)!r}: {self} does not fit axes of {shape}: its "
                "tiles lie along the leading axes, and fields along those after them. "
                "Pass a shorter tile, bma.stacked(bma.per_tile(...)) where fields come "
                "first, or bma.by_path with another rule for this array."
            )
        return (*self.leading, *(1 for _ in shape[len(self.leading) :]))

    def stacked_axes(self, path, shape):
        if math.prod(shape) <= 1:
            return ()
        return tuple(range(len(self.leading), len(shape)))

    def reach(self, path, shape):
        if self.distance is None or math.prod(shape) <= 1:
            return None
        return (*self.distance, *shape[len(self.leading) :])

    def slopes(self, path, shape):
        return self.linear

    def __repr__(self):
        if self.distance is None:
            return f"per_tile({self.leading})"
        one = len(set(self.distance)) == 1
        reach = self.distance[0] if one else self.distance
        more = ", slopes=True" if self.linear else ""
        return f"per_tile({self.leading}, reach={reach}{more})"


@dataclasses.dataclass(frozen=True)
class _ByFunction(Rule):
    function: Callable[[Path, Shape], Shape | None]

    def tile(self, path, shape):
        return self.function(path, shape)

    def __repr__(self):
        return f"by_function({getattr(self.function, '__name__', self.function)})"


per_element: Rule = _PerElement()
without_parentheses(per_element)


def per_tile(
    tile: int | tuple[int, ...],
    *,
    reach: int | tuple[int, ...] | None = None,
    slopes: bool = False,
) -> Rule:
    """Blocks are tiles of the leading axes of each array.

    The axes after them count fields (the channels of an image, the components of a
    flow), with blocks of their own; where fields come first, pass
    ``bma.stacked(bma.per_tile(tile))``. To have all fields in one block, write their
    number in the tile: (4, 4, 3). Where a tile does not divide an axis, the last blocks
    are smaller and count with their true size. A single number is one block.

    Args:
      tile: the positive length of a tile along each leading axis; an integer where
        there is one.
      reach: for methods with curvature, a declaration: entries of G further apart than
        this along an axis of the tile do not meet. An integer >= 0, or one for each of
        these axes. It is 1 for a loss of differences between neighbours. For a filter
        of 2 r + 1 elements it is r if G is the filter itself, and 2 r if the loss
        squares what comes out of it. With a reach of r, M and the diagonal cost
        (2 r + 1)^dim products and one to check them, whatever the size of the array, or
        fewer where the reach is large; ``bma.partition`` prints how many. M is inverted
        by nested levels of tiles of tiles. Along an axis that
        is a single tile the reach is not used and each element takes products of its
        own: there a tile of half the axis is far cheaper. All entries may meet along
        axes after the tile and those of ``stacked``, which count fields: each field
        takes products of its own. Arrays of one shape are fields on one grid too,
        and see each other; M between these and other arrays is taken for zero. Periodic
        grids may be of any size; where 2 r + 1 does not divide it, the first products
        fail their check, and as many or more follow. Methods check the declaration, see
        :func:`scale_by_newton_bma`. None where all entries may meet.
      slopes: whether a block has slopes beside its mean, one along each axis where the
        tile is longer than 1; it needs a reach. For losses of second differences (thin
        plates, minimum curvature, smoothing splines), whose curvature is of fourth
        order: with means alone the number of steps doubles with the size. M is
        (1 + axes)² times as large, and so is what a step costs beside the gradient. An
        array that is a single tile has no grid, and its block has the mean alone.

    Returns:
      A :class:`Rule`. Partitioning raises a ValueError for an array with fewer axes
      than the tile, or with an axis shorter than it.

    Raises:
      TypeError: if ``tile`` or ``reach`` is not an integer or a tuple of them, or if
        ``slopes`` is not a bool.
      ValueError: if a number of ``tile`` is not positive or one of ``reach`` negative,
        or their numbers differ, or if there are slopes without a reach.

    Example:
      >>> import jax, bma_optax as bma
      >>> image = jax.ShapeDtypeStruct((6, 4, 2), "float32")
      >>> blocks = bma.partition(image, bma.per_tile((4, 4)))
      >>> blocks.names[:2], blocks.sizes
      (('params[0:4, :, 0]', 'params[0:4, :, 1]'), (16, 16, 8, 8))
      >>> bma.per_tile((4, 4), reach=1)
      per_tile((4, 4), reach=1)
    """
    lengths: Any = (tile,) if is_integer(tile) else tile
    if not isinstance(lengths, (tuple, list)):
        raise TypeError(
            f"`tile` must be a tuple of integers, got {tile!r}. Pass one for each "
            "leading axis, such as bma.per_tile((4, 4))."
        )
    if not lengths or not all(is_integer(t) and t > 0 for t in lengths):
        raise ValueError(f"`tile` must hold positive integers, got {tile}.")
    lengths = tuple(map(int, lengths))
    if not isinstance(slopes, bool):
        raise TypeError(f"`slopes` must be True or False, got {slopes!r}.")
    if slopes and reach is None:
        raise ValueError(
            "`slopes` need a `reach`: without one M is dense. Pass how far apart "
            "elements are that meet, as bma.per_tile((4, 4), reach=2, slopes=True)."
        )
    distance = None if reach is None else _distance(reach, lengths)
    return _PerTile(lengths, distance, slopes)


def _distance(reach: Any, tile: Shape) -> Shape:
    """A reach along each axis of the tile."""
    distance = (reach,) * len(tile) if is_integer(reach) else reach
    if not isinstance(distance, (tuple, list)) or not all(map(is_integer, distance)):
        raise TypeError(
            f"`reach` must be an integer or a tuple of them, got {reach!r}. Pass "
            "bma.per_tile((4, 4), reach=1), or None where all entries may meet."
        )
    if any(k < 0 for k in distance):
        raise ValueError(f"`reach` must not be negative, got {reach}.")
    if len(distance) != len(tile):
        raise ValueError(
            f"`reach`={reach} has {len(distance)} numbers for a tile along {len(tile)} "
            "axes. Pass one number for each of these, or a single one for all; a reach "
            "does not apply along axes after a tile."
        )
    return tuple(map(int, distance))


def by_function(function: Callable[[Path, Shape], Shape | None]) -> Rule:
    """A rule of your own, from the path and the shape of an array to its tile.

    Args:
      function: takes the path, a tuple of strings, and the shape; returns a tile, one
        positive integer for each axis, or None for no blocks. It must depend on
        nothing else.

    Returns:
      A :class:`Rule`, equal to another one if the function is the same.

    Raises:
      TypeError: if ``function`` is not callable.

    Example:
      >>> import jax, bma_optax as bma
      >>> by_row = bma.by_function(lambda path, shape: (1,) + shape[1:])
      >>> bma.partition(jax.ShapeDtypeStruct((2, 5), "float32"), by_row).names
      ('params[0, :]', 'params[1, :]')
    """
    if not callable(function):
        raise TypeError(f"by_function takes a function, got {function!r}.")
    return _ByFunction(function)
