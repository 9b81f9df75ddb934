"""Probing vectors on the cells of one color of a grid, and the products G x with them.

A probe x has random signs on the cells of one color of one field, and is 0 elsewhere.
Its signs are products of signs along the axes: if the declared reach is wrong, the
other cells of the color then add noise without bias. A cell is a tile of arrays that
share a grid; it may be a single element. A vector over cells has shape (fields, *grid).
The arrays have shape (n_1, ..., n_dim), with n_i elements along an axis of g_i cells.
"""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _control_flow, _sharding, _tree
from bma_optax.curvature._probing import LinearOperator
from bma_optax.multilevel._stencil import Stencil
from bma_optax.partitions import _tiles
from bma_optax.partitions._tiles import Tiles

# As many products run side by side as have no more elements than this in all.
BATCH_ELEMENTS = 2**16


class Cells(NamedTuple):
    """Arrays of one shape, the fields, on one grid whose cells are tiles; static."""

    arrays: tuple[int, ...]  # their positions among the leaves of the parameters.
    tiles: Tiles  # of each of them.
    stencil: Stencil  # the layout of matrices on the cells of all fields.

    def sums(self, arrays):
        """Sums the elements of each cell, shape (fields, *grid)."""
        return jnp.stack([self.tiles.sums(x) for x in arrays])

    def fill(self, axis: int, x, along: int | None = None):
        """Repeats the numbers of cells along one axis of the grid for their elements.

        The numbers are on the axis ``along`` of x, which is ``axis`` if None.
        """
        t, n = (self.tiles.tile or ())[axis], self.tiles.shape[axis]
        return _tiles.axis_fill(x, axis if along is None else along, t, n)


class Probe(NamedTuple):
    """A probe as the outer product of vectors along the axes of the grid.

    The probes of all colors are made at once: in a loop over colors, XLA would select
    the cells of a color again at every use of a probe.
    """

    field: jax.Array  # shape (), int32.
    signs: list[jax.Array]  # one an axis, shape (n_i,): ±1 on the color, else 0.
    tests: list[jax.Array]  # one an axis, shape (n_i,): uniform numbers on the color.


def outer(axes):
    """The outer product of one vector an axis, shape (n_1, ..., n_dim)."""
    dim, shape = len(axes), tuple(len(v) for v in axes)
    shaped = [
        jnp.broadcast_to(v.reshape([-1 if i == axis else 1 for i in range(dim)]), shape)
        for axis, v in enumerate(axes)
    ]
    return math.prod(shaped[1:], start=shaped[0])


class ColorProbes:
    """The probes of all colors and fields, a test vector, and products with them.

    Args:
      G: the curvature.
      cells: the cells.
      key: a random key.
      colors: the colors along each axis; None if only the test vector is used.
    """

    def __init__(self, G: LinearOperator, cells: Cells, key, colors):
        self.G, self.cells, self.colors = G, cells, colors
        self.stencil = stencil = cells.stencil
        leaves = jax.tree.leaves(G.params)
        self.leaves = [leaves[i] for i in cells.arrays]
        self.dtype = _tree.common_statistic_dtype(self.leaves)
        # Draw all numbers in one call: each call takes 0.1 s to compile.
        counts = [g for g in stencil.grid for _ in range(1 + stencil.fields)]
        uniform = jax.random.uniform(
            key, (sum(counts),), self.dtype, minval=-1.0, maxval=1.0
        )
        parts = iter(jnp.split(uniform, np.cumsum(counts)[:-1]))
        self.axis_signs, self.axis_tests = [], []
        for _ in stencil.grid:
            self.axis_signs.append(jnp.where(next(parts) < 0, -1, 1).astype(self.dtype))
            self.axis_tests.append(
                jnp.stack([next(parts) for _ in range(stencil.fields)])
            )

    def all_probes(self) -> Probe:
        """All probes, along a leading axis of each array of :class:`Probe`."""
        counts = [range(axis.number) for axis in self.colors]
        every = itertools.product(range(self.stencil.fields), *counts)
        field, *colors = np.array(list(every), np.int32).T

        def rows(axis, v, color):
            """v, one row a probe, on the cells of the probe's color along an axis."""
            on = self.colors[axis].rows()[color]
            return self.cells.fill(axis, jnp.where(on, v, 0), along=1)

        size = (len(field), 1)
        return Probe(
            jnp.asarray(field),
            [
                rows(axis, jnp.tile(v, size), color)
                for axis, (v, color) in enumerate(
                    zip(self.axis_signs, colors, strict=True)
                )
            ],
            [
                rows(axis, v[field], color)
                for axis, (v, color) in enumerate(
                    zip(self.axis_tests, colors, strict=True)
                )
            ],
        )

    @property
    def count(self) -> int:
        """The number of probes."""
        return self.stencil.fields * math.prod(axis.number for axis in self.colors)

    @property
    def side_by_side(self) -> int:
        """The number of probes that run side by side; it divides their number."""
        most = max(1, BATCH_ELEMENTS // max(_tree.size(self.G.params), 1))
        fits = [b for b in range(1, self.count + 1) if self.count % b == 0]
        return max(b for b in fits if b <= most)

    def zeros(self):
        """Zeros for each of the arrays, in their common dtype of statistics."""
        return _tree.zeros_like(self.leaves, lambda _: self.dtype)

    def total(self, respond, zeros):
        """The sum of ``respond(probe)`` over all probes, a tree like ``zeros``."""

        def add(total, chunk):
            parts = jax.vmap(respond)(chunk)
            return jax.tree.map(lambda t, p: t + jnp.sum(p, axis=0), total, parts), None

        size = self.side_by_side
        chunks = jax.tree.map(
            lambda x: x.reshape(-1, size, *x.shape[1:]), self.all_probes()
        )
        return _control_flow.scan(add, zeros, chunks, operands=self.G.params)[0]

    def own(self, probe, a, x):
        """x if the field a is the probe's, else 0."""
        return x if self.stencil.fields == 1 else jnp.where(probe.field == a, x, 0)

    def respond(self, probe, x):
        """G x on the arrays, for x in the field of a probe and 0 in the others."""
        return self._product(
            [self.own(probe, a, x) for a in range(self.stencil.fields)]
        )

    def near_signs(self):
        """The sign of the cell of each color that is near each cell.

        The shape is (1, *colors, 1, *grid). The first axis stands for the field of a
        probe, the axis after the colors for the field of the response.
        """
        dim = len(self.stencil.grid)
        counts = [axis.number for axis in self.colors]
        whole = (1, *counts, 1, *self.stencil.grid)  # field, *color, field, *cell
        product = jnp.ones(whole, self.dtype)
        for axis, (g, colors) in enumerate(
            zip(self.stencil.grid, self.colors, strict=True)
        ):
            shape = [1] * len(whole)
            shape[1 + axis], shape[2 + dim + axis] = colors.number, g
            signs = self.axis_signs[axis][self.stencil.near(axis, colors)]
            product = product * jnp.broadcast_to(signs.reshape(shape), whole)
        return product

    def coarse_test(self):
        """The test vector on cells, shape (fields, *grid)."""
        return jnp.stack(
            [
                outer([test[a] for test in self.axis_tests])
                for a in range(self.stencil.fields)
            ]
        )

    def respond_to_test(self, scale):
        """G times the scaled test vector, shape (fields, n_1, ..., n_dim).

        Args:
          scale: shape (fields, *grid), one number for all cells of a field.
        """
        x = [
            self._fill(scale[a])
            * outer(
                [self._fill_axis(axis, v[a]) for axis, v in enumerate(self.axis_tests)]
            )
            for a in range(self.stencil.fields)
        ]
        return stacked(self._product(x))

    def signed_test(self):
        """The signs times the test vector on elements, one array a field."""
        return [
            outer(
                [
                    self._fill_axis(axis, signs * tests[a])
                    for axis, (signs, tests) in enumerate(
                        zip(self.axis_signs, self.axis_tests, strict=True)
                    )
                ]
            )
            for a in range(self.stencil.fields)
        ]

    def _fill(self, x):
        """Repeats numbers of cells, shape grid, for their elements."""
        for axis in range(x.ndim):
            x = self.cells.fill(axis, x)
        return x

    def _fill_axis(self, axis, x):
        """Repeats numbers of cells along one axis, shape (g_i,), for n_i elements."""
        return self.cells.fill(axis, x, along=0)

    def _product(self, x):
        """G times the vector that is x on the arrays of the cells and 0 elsewhere."""
        leaves, treedef = jax.tree.flatten(self.G.params)
        parts = dict(zip(self.cells.arrays, x, strict=True))
        tangent = [
            parts[i].astype(leaf.dtype) if i in parts else _tree.zeros_like(leaf)
            for i, leaf in enumerate(leaves)
        ]
        y = jax.tree.leaves(self.G(jax.tree.unflatten(treedef, tangent)))
        return [y[position].astype(self.dtype) for position in self.cells.arrays]


def stacked(fields):
    """Stacks arrays of one shape as one array, which lies on every device."""
    return jnp.stack([_sharding.replicated(x) for x in fields])
