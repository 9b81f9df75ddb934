"""The columns of E: which elements a block holds, and with which weights it sums them.

Lu et al. 2018 sum the elements of a block as they are. With *learned* weights the units
of an array, s inputs each, share a unit vector q over their inputs, and a block sums
W = √s q times its elements. W has mean square 1 in every block, so that all else stays
as it is: v are sums of W² z, M = S^½ U / (v vᵀ) S^½, and E has the columns q, in place
of 1/√s. q follows the leading direction of Z^-1 g, see ``_direction``. Numbers of an
array's inputs keep all of its axes, of length 1 where units are counted.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bma_optax import _names, _xla_sums
from bma_optax.adaptive import _direction
from bma_optax.partitions import _units

WEIGHTS = ("constant", "learned")
# Elements. What is smaller is still in the cache when it is read again.
_LARGE = 2**16
KEPT = 0.95  # The part of y that a step keeps, as in mini-BMA.


def start(weights, blocks, zeros):
    """The directions y before the first step: None, or a tree of plain means.

    Args:
      weights: "constant" or "learned".
      blocks: the partition.
      zeros: a tree like the parameters, in the dtype of statistics.

    Returns:
      None for constant weights. Else a tree with a number an input, and with one
      unused number for an array that has not two units of one shape.
    """
    if weights == "constant":
        return None

    def one(units, x):
        x = jnp.zeros_like(x)
        y = _units.placeholder(x) if units is None else units.constant(units.split(x))
        return _Array(y)

    return _units.map_arrays(_Array, one, blocks.arrays, zeros).y


def check_state(weights, blocks, y):
    """Raises a ValueError for directions that other weights or another rule made."""
    if blocks.arrays and (y is None) != (weights == "constant"):
        other = "constant" if y is None else "learned"
        raise ValueError(
            f"The state has {other} weights, and `weights` is {weights!r}. Pass a "
            "state of the same weights instead."
        )
    for array, found in zip(blocks.arrays, jax.tree.leaves(y), strict=False):
        units = _units.units_of(array)
        expected = (1,) * len(array.shape) if units is None else units.input_shape
        if found.shape != expected:
            raise ValueError(
                f"{_names.name_of(array.path)!r}: the state has a direction of shape "
                f"{found.shape}; {blocks.rule} makes {expected}. Pass a state of the "
                "same partition instead."
            )


class Columns:
    """E with the weights of one step: sums over blocks, and back."""

    def __init__(self, blocks, y):
        """Takes a partition, and directions y of :func:`start`."""
        self.blocks, self.y = blocks, y
        none = [None] * len(blocks.arrays)
        self.units = none if y is None else list(map(_units.units_of, blocks.arrays))
        directions = none if y is None else jax.tree.leaves(y)
        self.weights = [
            None if units is None else _mean_square_one(units, direction)
            for units, direction in zip(self.units, directions, strict=True)
        ]

    def sums(self, tree):
        """Sums of W x over blocks, shape (L,), for x like the parameters."""
        return self._join(_sums, tree)

    def sums_of(self, f, r, *trees):
        """Does what :meth:`sums` does for a tree r = f(x, ...), without storing it.

        From f and the trees of x, ... sums over units of large arrays compute r again.
        """

        def one(array, units, W, r, *x):
            if units is None and r.size >= _LARGE:
                return _sums_of(f, array, *x)
            return _sums(array, units, W, r)

        return self._join(one, r, *trees)

    def root_sums(self, h):
        """Sums of W² √h over blocks, shape (L,), for a tree h."""

        def weighted(x, W):
            return _xla_sums.sqrt(x) * jnp.square(W).astype(x.dtype)

        def one(array, units, W, x):
            if units is not None:
                return _xla_sums.total_of(weighted, units.inputs, units.split(x), W)
            return _sums_of(_xla_sums.sqrt, array, x)

        return self._join(one, h)

    def expand(self, values, like):
        """W times the value of its block, for each element of a tree ``like``."""
        filled = self.blocks.expand(values, like)
        if self.y is None:
            return filled
        scaled = [
            x if units is None else units.join(units.split(x) * W.astype(x.dtype), x)
            for _, units, W, x in self._each(filled)
        ]
        return jax.tree.unflatten(jax.tree.structure(filled), scaled)

    def turned(self, r, sums):
        """The next directions: y moves towards Rᵀ R q in each array of a tree r.

        Args:
          r: a tree like the parameters.
          sums: :meth:`sums` of r.
        """
        if self.y is None:
            return None
        leaves, treedef = jax.tree.flatten(self.y)
        parts = self.blocks.split_arrays(jnp.where(jnp.isfinite(sums), sums, 0))
        turned = []
        for y, a, (_, units, _, r_array) in zip(
            leaves, parts, self._each(r), strict=True
        ):
            if units is not None:
                a = a.reshape(units.unit_shape).astype(y.dtype)
                y = _direction.turn(units, y, units.split(r_array), a, KEPT)
            turned.append(y)
        return jax.tree.unflatten(treedef, turned)

    def _join(self, one, *trees):
        return self.blocks.join_arrays(
            [one(*each) for each in self._each(*trees)], trees[0]
        )

    def _each(self, *trees):
        """The array, its units, W and its leaves of trees, for each array."""
        leaves = map(jax.tree.leaves, trees)
        return zip(self.blocks.arrays, self.units, self.weights, *leaves, strict=True)


def _sums(array, units, W, x):
    """Sums of W x over the blocks of one array; None if it has none."""
    if units is not None:
        return units.times(units.split(x), W.astype(x.dtype))
    return array.sums(x, _xla_sums.total) if array.num_blocks else None


def _sums_of(f, array, *x):
    """Sums of f(x, ...) over the blocks of one array; None if it has none."""
    if not array.num_blocks:
        return None
    return array.sums(x[0], lambda _, axes: _xla_sums.total_of(f, axes, *x))


class _Array(NamedTuple):
    y: jax.Array


def _mean_square_one(units, y):
    """W = √s q of one array, a number an input."""
    return math.sqrt(units.num_inputs) * units.direction(y)
