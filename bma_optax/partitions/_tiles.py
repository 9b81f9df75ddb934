"""How blocks lie in one array, and the sums over them and back.

An array of shape (n_1, ..., n_k) with a tile (t_1, ..., t_k) has a grid of ⌈n_i / t_i⌉
blocks along axis i. ``sums`` takes the array to that grid and ``fill`` takes a number
for each block back to the array. Both work axis by axis, so that an axis that is one
tile is never reshaped, however it is sharded.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _names, _sharding
from bma_optax.partitions._rules import Path, Shape

_MAX_SLICES = 16


def _total(x: jax.Array, axes: Shape) -> jax.Array:
    return jnp.sum(x, axis=axes, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of one array: each is a block."""

    path: Path
    shape: Shape
    tile: Shape | None  # None: no blocks.
    owner: Path
    start: int = 0  # The position of its first block.
    stacked_axes: tuple[int, ...] = ()  # Each entry along these axes is an array.
    group: Path = ()  # Blocks of arrays with the same group see each other.
    alone: bool = False  # Whether none of its blocks sees another.
    reach: Shape | None = None  # Along each axis; None: all entries may meet.
    slopes: bool = False  # Whether blocks of a grid have slopes beside their means.

    @property
    def grid(self) -> Shape:
        """The number of blocks along each axis."""
        if self.tile is None:
            return (0,)
        return tuple(-(-n // t) for n, t in zip(self.shape, self.tile, strict=True))

    @property
    def num_blocks(self) -> int:
        """The number of tiles."""
        return math.prod(self.grid)

    @property
    def is_grid(self) -> bool:
        """Whether its blocks are cells of a grid, with a stencil for a matrix."""
        return self.reach is not None and self.num_blocks > 1

    @property
    def block_sizes(self) -> np.ndarray:
        """The number of elements of each block, in the order of the grid."""
        if self.tile is None:
            return np.zeros(0, int)
        lengths = [
            np.minimum(t, n - t * np.arange(g))
            for n, t, g in zip(self.shape, self.tile, self.grid, strict=True)
        ]
        return functools.reduce(np.multiply.outer, lengths, np.asarray(1)).ravel()

    @property
    def block_names(self) -> list[str]:
        """A readable name for each block, in the order of the grid."""
        if self.tile is None:
            return []
        name = _names.name_of(self.owner)
        if self.tile == self.shape:
            return [name]
        axes = [
            [":"]
            if g == 1
            else [
                str(i) if t == 1 else f"{i * t}:{min(n, (i + 1) * t)}" for i in range(g)
            ]
            for n, t, g in zip(self.shape, self.tile, self.grid, strict=True)
        ]
        return [f"{name}[{', '.join(index)}]" for index in itertools.product(*axes)]

    def sums(self, x: jax.Array, total: Callable = _total) -> jax.Array:
        """Sums over the tiles of one array, in the shape of its grid.

        Whole axes are summed as they are: sharded ones then need no reshape.

        Args:
          x: the array.
          total: sums an array over axes, which keep length 1.
        """
        tile = self.tile or ()
        whole = [g == 1 for g in self.grid]
        x = total(x, tuple(i for i, w in enumerate(whole) if w))
        if all(w or t == 1 for w, t in zip(whole, tile, strict=True)):
            return x

        def cut(x):
            for axis, (w, t) in enumerate(zip(whole, tile, strict=True)):
                if not w and t > 1:
                    x = axis_sums(x, axis, t)
            return x

        return _sharding.automatic(cut, x, out=lambda: _sharding.replicated(x, x))

    def fill_like(self, values: jax.Array, leaf: jax.Array) -> jax.Array:
        """Does what :meth:`fill` does, in the dtype and the sharding of ``leaf``."""
        values = values.astype(leaf.dtype)
        if not any(1 < t < n for t, n in zip(self.tile or (), self.shape, strict=True)):
            return self.fill(values)
        arrays = values, leaf
        return _sharding.automatic(
            lambda values, _: self.fill(values),
            *arrays,
            out=lambda: _sharding.of(arrays)[1],
        )

    def fill(self, values: jax.Array) -> jax.Array:
        """Each tile of one array filled with its value."""
        x = values.reshape(self.grid)
        for axis, (n, t, g) in enumerate(
            zip(self.shape, self.tile or (), self.grid, strict=True)
        ):
            if g > 1 and t > 1:
                x = axis_fill(x, axis, t, n)
        return jnp.broadcast_to(x, self.shape)


def axis_sums(x: jax.Array, axis: int, t: int) -> jax.Array:
    """Sums over consecutive pieces of t elements of one axis, the last may be shorter.

    Strided slices: XLA on CPU takes many times longer for a reshape and a reduction
    over a short axis.
    """
    n = x.shape[axis]
    pieces = -(-n // t)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, pieces * t - n)
    x = jnp.pad(x, padding) if pieces * t > n else x
    if t > _MAX_SLICES:
        shape = (*x.shape[:axis], pieces, t, *x.shape[axis + 1 :])
        return jnp.sum(x.reshape(shape), axis=axis + 1)
    slices = [
        jax.lax.slice_in_dim(x, i, pieces * t, stride=t, axis=axis) for i in range(t)
    ]
    return sum(slices[1:], slices[0])


def axis_fill(x: jax.Array, axis: int, t: int, n: int) -> jax.Array:
    """Every element of one axis t times, the last fewer so that there are n.

    Not ``jnp.repeat``: its gather costs more than all else in an update.
    """
    whole = (*x.shape[: axis + 1], t, *x.shape[axis + 1 :])
    filled = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), whole)
    shape = (*x.shape[:axis], x.shape[axis] * t, *x.shape[axis + 1 :])
    return jax.lax.slice_in_dim(filled.reshape(shape), 0, n, axis=axis)
