"""An array as a matrix, units × inputs: its blocks, and the weights they share.

Where all blocks of an array have one shape, the array is a matrix G with a row for each
block (a unit) and a column for each position inside it (an input). A direction q over
the inputs, of norm 1, is then one set of weights for all units: G q are their weighted
means, shape (units,).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bma_optax import _names, _sharding, _xla, _xla_sums
from bma_optax.partitions._rules import Shape
from bma_optax.partitions._tiles import Tiles


@dataclasses.dataclass(frozen=True)
class Units:
    """The blocks of one array, all of one shape, as the rows of a matrix G.

    Each axis counts units, or inputs (positions inside a block), or stacked matrices.
    Results keep all axes, of length 1 where they are summed, so that they broadcast.
    """

    shape: Shape  # the array's.
    view: Shape  # the array's, where an axis that tiles cut is two axes.
    units: tuple[int, ...]  # axes of the view.
    inputs: tuple[int, ...]

    @property
    def num_inputs(self) -> int:
        """s, the size of every block."""
        return math.prod(self.view[i] for i in self.inputs)

    @property
    def num_units(self) -> int:
        """The number of blocks that share their weights."""
        return math.prod(self.view[i] for i in self.units)

    @property
    def num_matrices(self) -> int:
        """The number of stacked matrices, each with weights of its own."""
        return math.prod(self.shape) // (self.num_inputs * self.num_units)

    @property
    def num_statistics(self) -> int:
        """The numbers that mini-BMA stores: two a unit and two an input."""
        return 2 * self.num_matrices * (self.num_units + self.num_inputs)

    @property
    def unit_shape(self) -> Shape:
        """The shape of a number a unit."""
        return tuple(1 if i in self.inputs else n for i, n in enumerate(self.view))

    @property
    def input_shape(self) -> Shape:
        """The shape of a number an input."""
        return tuple(1 if i in self.units else n for i, n in enumerate(self.view))

    def split(self, x: jax.Array) -> jax.Array:
        """An array in the shape of the view."""
        if self.view == self.shape:
            return x
        kept, spec = self._spec(x)
        return _sharding.reshape(_sharding.reshard(x, kept), self.view, spec)

    def join(self, x: jax.Array, like: jax.Array) -> jax.Array:
        """The inverse of :meth:`split`, sharded as the array is."""
        if self.view == self.shape:
            return x
        kept, _ = self._spec(like)
        return _sharding.typed_like(_sharding.reshape(x, self.shape, kept), like)

    def _spec(self, x: jax.Array) -> tuple[list[Any], list[Any]]:
        """Returns the explicit sharding that an array keeps, and that of its view.

        An axis that tiles cut in two keeps its shards if they are whole tiles.
        """
        sharding = jax.typeof(x).sharding
        kept: list[Any] = []
        spec: list[Any] = []
        for n, axis in zip(self.shape, sharding.spec, strict=True):
            first, last = len(spec), len(spec) + 1
            while math.prod(self.view[first:last]) < n:
                last += 1
            whole = self.view[first] % _sharding.num_shards(sharding.mesh, axis) == 0
            kept.append(axis if whole else None)
            spec += [kept[-1], *[None] * (last - first - 1)]
        return kept, spec

    def mean_squares(self, x: jax.Array) -> jax.Array:
        """Means of squares over the inputs: a number a unit."""
        return _xla_sums.total_of(jnp.square, self.inputs, x) / self.num_inputs

    def input_mean_squares(self, x: jax.Array) -> jax.Array:
        """Means of squares over the units: a number an input."""
        return _xla_sums.total_of(jnp.square, self.units, x) / self.num_units

    def times(self, x: jax.Array, q: jax.Array) -> jax.Array:
        """G q: a number a unit, for a matrix x and a number an input."""
        return _xla_sums.sum_of_products(x, q, self.inputs, self.units)

    def transposed_times(self, x: jax.Array, a: jax.Array) -> jax.Array:
        """Gᵀ a: a number an input, for a number a unit."""
        return _xla_sums.sum_of_products(x, a, self.units, self.inputs)

    def constant(self, x: jax.Array) -> jax.Array:
        """The unit vector of plain block means, typed as a sum over units is."""
        sums = jnp.sum(x, axis=self.units, keepdims=True)
        return jnp.full_like(sums, 1 / math.sqrt(self.num_inputs))

    def direction(self, y: jax.Array) -> jax.Array:
        """q = y / ‖y‖, for a y that is not 0."""
        square = jnp.sum(jnp.square(y), axis=self.inputs, keepdims=True)
        # Apart: XLA on a GPU tries many kernels for a vector over its norm, which takes
        # seconds an array to compile.
        return y * _xla.second_pass(jax.lax.rsqrt(square))


def map_arrays(kind: Any, f: Callable, arrays: Any, tree: Any, *rest: Any) -> Any:
    """``f(units, *leaves)`` for each array; the units are None where it is no matrix.

    ``f`` gives NamedTuples of this kind, and the result is one: of trees.
    """
    leaves, treedef = jax.tree.flatten(tree)
    columns = [jax.tree.leaves(other) for other in rest]
    results = [
        f(units_of(array), *parts)
        for array, *parts in zip(arrays, leaves, *columns, strict=True)
    ]
    return kind(
        *(
            jax.tree.unflatten(treedef, [getattr(result, field) for result in results])
            for field in kind._fields
        )
    )


def check_state(arrays: Any, nu: Any, rule: Any) -> None:
    """Raises a ValueError for numbers of units that another rule has made."""
    for array, numbers in zip(arrays, jax.tree.leaves(nu), strict=True):
        units = units_of(array)
        expected = array.shape if units is None else units.unit_shape
        if numbers.shape != expected:
            raise ValueError(
                f"{_names.name_of(array.path)!r}: the state has numbers of shape "
                f"{numbers.shape} for its units; {rule} makes {expected}. Pass a state "
                "of the same partition instead."
            )


def num_statistics(tiles: Tiles) -> int:
    """Counts the numbers that mini-BMA stores of an array beside the momentum."""
    units = units_of(tiles)
    return math.prod(tiles.shape) if units is None else units.num_statistics


def num_weights(tiles: Tiles) -> int:
    """The numbers of a learned direction: one an input, or a placeholder."""
    units = units_of(tiles)
    return 1 if units is None else units.num_matrices * units.num_inputs


def placeholder(zeros: jax.Array) -> jax.Array:
    """One unused number with the axes of an array, on its mesh."""
    return jnp.sum(zeros, keepdims=True)


def same_shapes(tiles: Tiles) -> bool:
    """Whether all blocks of an array have one shape."""
    pairs = zip(tiles.shape, tiles.tile or tiles.shape, strict=True)
    return 0 in tiles.shape or all(n % t == 0 for n, t in pairs)


@functools.lru_cache(maxsize=1024)
def units_of(tiles: Tiles) -> Units | None:
    """The blocks of an array as a matrix; None for fewer than two rows or columns."""
    if tiles.tile is None or 0 in tiles.shape:
        return None
    view: list[int] = []
    units: list[int] = []
    inputs: list[int] = []
    for axis, (n, t) in enumerate(zip(tiles.shape, tiles.tile, strict=True)):
        if axis in tiles.stacked_axes:
            view.append(n)
            continue
        if n % t:
            raise ValueError(
                f"{_names.name_of(tiles.path)!r} of shape {tiles.shape}: blocks that "
                f"share weights must be of one shape, and tiles of {tiles.tile} do not "
                "divide it. Pass tiles that do instead."
            )
        for length, kind in ((n // t, units), (t, inputs)):
            if length > 1:
                kind.append(len(view))
                view.append(length)
        if n == 1:
            view.append(1)
    result = Units(tiles.shape, tuple(view), tuple(units), tuple(inputs))
    return result if result.num_units > 1 and result.num_inputs > 1 else None
