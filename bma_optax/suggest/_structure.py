"""What products with a curvature G show of each array: neighbours, fields, stiffness.

A vector that is random up to a cut across one axis and 0 behind it shows the reach
along that axis: G v is 0 where nothing in front of the cut is met. A vector that is 1
on a lattice, wider than the reach, shows whole columns of G at its points. Vectors are
lists of NumPy arrays like the parameters.
"""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np

from bma_optax.partitions._rules import Path, Shape

Vector = list[np.ndarray]
Product = Callable[[Vector], Vector]

# Below this, of 1 for a loss of differences, the second moments of G are noise.
_STIFF = 1e-2
_PATTERN = 8  # elements after which a loss may repeat itself.
_SHORTEST = 5  # Along a shorter axis neighbours cannot be told from fields.


@dataclasses.dataclass(frozen=True)
class Axis:
    """How the entries of G lie along one axis of n elements."""

    length: int
    reach: int | None  # in elements, across the edge too; None: all may meet.
    periodic: bool  # whether elements meet across the edge.

    @property
    def is_space(self) -> bool:
        """Whether elements have neighbours along it."""
        return bool(self.reach) and self.length >= _SHORTEST

    @property
    def is_batch(self) -> bool:
        """Whether it counts several things of which no two meet."""
        return self.reach == 0 and self.length > 1

    @property
    def is_apart(self) -> bool:
        """Whether no two elements meet along it."""
        return self.reach == 0


@dataclasses.dataclass(frozen=True)
class Structure:
    """The structure of one array, as measured."""

    path: Path
    shape: Shape
    axes: tuple[Axis, ...]
    meets: tuple[int, ...]  # the other arrays that it meets, by position.
    empty: float  # the share of elements without curvature.
    stiffness: np.ndarray | None  # see :func:`_stiffness`, shape (spatial axes,).
    constant: float  # |G 1| over |G|, row by row: 0 where constants have no curvature.

    @property
    def is_fourth_order(self) -> bool:
        """Whether slopes have next to no curvature, as in losses of second differences.

        These reach two elements; a weight on each element alone reaches none.
        """
        far = any((self.axes[i].reach or 0) > 1 for i in self.space)
        if self.stiffness is None or not far:
            return False
        return float(np.max(np.abs(self.stiffness), initial=0)) < _STIFF

    @property
    def space(self) -> tuple[int, ...]:
        """The axes along which elements have neighbours; none if one is not local."""
        if any(axis.reach is None and axis.length >= _SHORTEST for axis in self.axes):
            return ()
        return tuple(i for i, axis in enumerate(self.axes) if axis.is_space)


class Probe:
    """A product that is counted, and the noise of its numbers.

    Args:
      product: v -> G v near the parameters.
      eps: of the numbers.
      vanishes: whether G is 0 at the parameters themselves for most elements that have
        curvature near them.
      is_flat: whether G is 0 near them, too.
    """

    def __init__(
        self,
        product: Product,
        eps: float,
        vanishes: bool = False,
        is_flat: bool = False,
    ):
        self._product, self.eps, self.count = product, eps, 0
        self.vanishes, self.is_flat = vanishes, is_flat

    def __call__(self, v: Vector) -> Vector:
        self.count += 1
        return self._product(v)


def structures(probe: Probe, paths: list[Path], shapes: list[Shape]) -> list[Structure]:
    """Measures every array.

    Args:
      probe: the products v -> G v.
      paths, shapes: of the arrays.
    """
    rng = np.random.default_rng(0)
    zeros = [np.zeros(shape) for shape in shapes]
    found: list[Structure] = []
    for position, (path, shape) in enumerate(zip(paths, shapes, strict=True)):
        same = [i for i, other in enumerate(shapes) if other == shape]
        meets: set[int] = set()
        axes = []
        for axis, n in enumerate(shape):
            looks: list[tuple[int | None, bool]] = []
            for cut in _cuts(n):
                if any(reach is None for reach, _ in looks):
                    break  # All may meet: a second look shows no more.
                x = rng.uniform(0.5, 1.5, shape) * rng.choice([-1.0, 1.0], shape)
                x[(slice(None),) * axis + (slice(cut, None),)] = 0
                y = probe(_only(position, x, zeros))
                meets |= _met(y, position, probe.eps)
                looks += [_behind_the_cut(y[i], axis, cut, probe.eps) for i in same]
            axes.append(_axis(n, looks))
        found.append(Structure(path, shape, tuple(axes), (), 0.0, None, 1.0))
        found[-1] = _columns(probe, found[-1], position, zeros, rng, meets)
    return found


def _cuts(n: int) -> list[int]:
    """Where an axis is cut.

    Elements may meet by a pattern that repeats: pixels that are averaged in squares, or
    the nodes of an element. Of eight cuts in a row each such pattern is cut somewhere.
    """
    half = n // 2
    return sorted({n // 3, *range(half - _PATTERN + 1, half + 1)} & {*range(1, n)})


def _only(position: int, x: np.ndarray, zeros: Vector) -> Vector:
    """The vector that is x on one array and 0 on the others."""
    return [x if i == position else zero for i, zero in enumerate(zeros)]


def _met(y: Vector, position: int, eps: float) -> set[int]:
    """The arrays, other than that of the vector, on which G v is not 0."""
    largest = max((np.max(np.abs(x), initial=0) for x in y), default=0)
    return {
        i
        for i, x in enumerate(y)
        if i != position and np.max(np.abs(x), initial=0) > eps**0.5 * largest
    }


def _behind_the_cut(y, axis: int, cut: int, eps: float) -> tuple[int | None, bool]:
    """The reach that G v shows behind a cut, and whether it comes across the edge.

    The reach is None if everything behind the cut is met.
    """
    n = y.shape[axis]
    others = tuple(i for i in range(y.ndim) if i != axis)
    profile = np.max(np.abs(y), axis=others, initial=0)
    behind = profile[cut:]
    # Where sums are exact, what is not met is 0; after a transform it is rounding.
    noise = 0.0 if np.any(behind == 0) else eps**0.5 * np.max(profile, initial=0)
    met = cut + np.flatnonzero(behind > noise)
    if len(met) == n - cut and n >= _SHORTEST:
        return None, False
    from_cut, from_edge = met - cut + 1, n - met
    reach = int(np.max(np.minimum(from_cut, from_edge), initial=0))
    return reach, bool(np.any(from_edge < from_cut)) and n >= _SHORTEST


def _axis(n: int, looks: list[tuple[int | None, bool]]) -> Axis:
    """Joins what all cuts across an axis have shown."""
    reaches = [reach for reach, _ in looks if reach is not None]
    if len(reaches) < len(looks):
        return Axis(n, None, False)
    return Axis(n, max(reaches, default=0), any(periodic for _, periodic in looks))


def _columns(probe, array: Structure, position, zeros, rng, meets) -> Structure:
    """The array with what whole columns of G, and G times ones, show of it."""
    shape, space = array.shape, array.space
    array = dataclasses.replace(array, meets=tuple(sorted(meets)))
    if not space:
        return array
    sums = probe(_only(position, np.ones(shape), zeros))[position]
    reach = [axis.reach or 0 if i in space else 0 for i, axis in enumerate(array.axes)]
    pitch = [min(2 * reach[i] + 1, n) if i in space else n for i, n in enumerate(shape)]
    first = [int(rng.integers(p)) for p in pitch]
    points = np.stack(
        np.meshgrid(
            *(np.arange(f, n, p) for f, n, p in zip(first, shape, pitch, strict=True)),
            indexing="ij",
        ),
        axis=-1,
    ).reshape(-1, len(shape))
    inside = np.ones(len(points), bool)
    for i in space:
        if not array.axes[i].periodic:
            inside &= (points[:, i] >= reach[i]) & (points[:, i] < shape[i] - reach[i])
    x = np.zeros(shape)
    x[tuple(points.T)] = 1
    y = probe(_only(position, x, zeros))[position]
    diagonal = y[tuple(points.T)]
    size = np.max(np.abs(diagonal), initial=0)
    array = dataclasses.replace(
        array,
        empty=float(np.mean(np.abs(diagonal) <= probe.eps * size)),
        constant=float(np.max(np.abs(sums), initial=0) / (size or 1)),
    )
    points = points[inside]
    if not len(points):
        return array
    offsets = [range(-reach[i], reach[i] + 1) for i in range(len(shape))]
    moments = np.zeros(len(space))
    weights = np.abs(y[tuple(points.T)])
    for offset in itertools.product(*offsets):
        near = (points + np.asarray(offset)) % np.asarray(shape)
        column = y[tuple(near.T)]
        share = np.sum(column) / (np.sum(weights) or 1)
        moments += np.array([-(offset[i] ** 2) * share / 2 for i in space])
    return dataclasses.replace(array, stiffness=np.asarray(moments))
