"""Curvature with a declared reach, exactly, by few products.

Cells of a grid that are further apart than twice the reach share no neighbour: one
product with all of one color answers for each of them. The declaration is checked by
one product with a random vector.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _trees
from bma_optax._stencil import Stencil
from bma_optax._tiles import Tiles


def diagonal(product, params, arrays, stencil, key):
    """The diagonal of G on some arrays, and how far it is from what was declared.

    Args:
      product: v -> G v on trees like params.
      params: the parameters.
      arrays: positions of arrays of one shape.
      stencil: its cells are the elements.
      key: a random key.

    Returns:
      ``(diagonals, row_sums, error)``: an array for each of ``arrays``; of absolute
      values, likewise; relative, shape ().
    """
    probes = _Probes(params, arrays, stencil, [1] * len(stencil.grid), key)

    def add(carry, color):
        diagonals, row_sums, images = carry
        x = probes.signs(color)
        y = probes.respond(product, color, x)
        near = probes.near(color)
        diagonals = [
            d + jnp.where(color[0] == a, x * y[a], 0) for a, d in enumerate(diagonals)
        ]
        row_sums = [r + jnp.abs(y) for r, y in zip(row_sums, y, strict=True)]
        images = [i + y * near for i, y in zip(images, y, strict=True)]
        return (diagonals, row_sums, images), None

    zeros = [jnp.zeros(stencil.grid, probes.dtype) for _ in arrays]
    (diagonals, row_sums, images), _ = jax.lax.scan(
        add, (zeros, zeros, zeros), probes.all_colors()
    )
    return diagonals, row_sums, probes.error(product, jnp.stack(images))


def block_sums(product, params, arrays, tiles: Tiles, stencil: Stencil, key):
    """The stencil S of N = 1ᵀ G 1 over tiles, and how far it is from G.

    Args:
      product: v -> G v on trees like params.
      params: the parameters.
      arrays: positions of arrays with these tiles.
      tiles: how each of them is tiled.
      stencil: its cells are the tiles.
      key: a random key.

    Returns:
      ``(S, error)``.
    """
    probes = _Probes(params, arrays, stencil, tiles.tile, key)

    def respond(*color):
        y = probes.respond(product, color, probes.signs(color))
        near = probes.near_signs(color)
        return jnp.stack([tiles.sums(y) * near for y in y])

    colors = probes.all_colors()
    count = len(colors[0])
    most = max(1, _BATCH_ELEMENTS // max(_trees.size(params), 1))
    # A divisor: jax.lax.map compiles what is left over a second time.
    batch = max(b for b in range(1, count + 1) if count % b == 0 and b <= most)
    Y = jax.lax.map(lambda color: respond(*color), colors, batch_size=batch)
    Y = Y.reshape(stencil.fields, *stencil.colors, stencil.fields, *stencil.grid)
    S = stencil.from_colors(Y)
    image = stencil.matvec(S, probes.coarse_test())
    return S, probes.error(product, image, tiles)


_BATCH_ELEMENTS = 2**16


class _Probes:
    """Vectors of random signs on the cells of one color, products of one-axis ones.

    Where the declaration is wrong, other cells of the color then give noise without
    bias, not row sums.
    """

    def __init__(self, params, arrays, stencil, tile, key):
        self.params, self.arrays = params, arrays
        self.stencil, self.tile = stencil, tile
        leaves = jax.tree.leaves(params)
        self.leaves = [leaves[i] for i in arrays]
        self.dtype = _trees.common_statistic_dtype(self.leaves)
        # One call: each costs a tenth of a second to compile.
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

    def all_colors(self):
        """(field, color along each axis) of every probe, as one array for each."""
        every = itertools.product(
            range(self.stencil.fields), *map(range, self.stencil.colors)
        )
        return tuple(jnp.asarray(c) for c in np.array(list(every), np.int32).T)

    def signs(self, color):
        """The probe, in the shape of an array."""
        axes = [
            jnp.where(np.arange(g, dtype=np.int32) % m == c, e, 0)
            for c, m, g, e in zip(
                color[1:],
                self.stencil.colors,
                self.stencil.grid,
                self.axis_signs,
                strict=True,
            )
        ]
        return self._fine(axes)

    def respond(self, product, color, x):
        """G x on the arrays, for a probe x in the field of the color."""
        return self._product(
            product, [jnp.where(color[0] == a, x, 0) for a in range(len(self.arrays))]
        )

    def near_signs(self, color):
        """For each cell the sign of the one near it that has the color."""
        return self._outer(
            [self._near(e, axis, color) for axis, e in enumerate(self.axis_signs)]
        )

    def near(self, color):
        """The same, times the test vector there."""
        return self._outer(
            [
                self._near(e * test[color[0]], axis, color)
                for axis, (e, test) in enumerate(
                    zip(self.axis_signs, self.axis_tests, strict=True)
                )
            ]
        )

    def coarse_test(self):
        """The test vector, shape (fields, *grid)."""
        return jnp.stack(
            [
                self._outer([test[a] for test in self.axis_tests])
                for a in range(self.stencil.fields)
            ]
        )

    def error(self, product, image, tiles=None):
        """Relative distance of ``image`` from what G makes of the test vector."""
        x = [
            self._fine([test[a] for test in self.axis_tests])
            for a in range(self.stencil.fields)
        ]
        y = self._product(product, x)
        y = jnp.stack([tiles.sums(y) for y in y] if tiles else y)
        difference, norm = jnp.sum(jnp.square(y - image)), jnp.sum(jnp.square(y))
        return jnp.sqrt(difference / jnp.where(norm > 0, norm, 1))

    def _near(self, values, axis, color):
        g, m = self.stencil.grid[axis], self.stencil.colors[axis]
        offsets = np.array([self.stencil.offset(axis, i) for i in range(m)], np.int32)
        cells = np.arange(g, dtype=np.int32)
        steps = jnp.asarray(offsets)[(color[1 + axis] - cells) % m]
        return values[(cells + steps) % g]

    def _outer(self, axes):
        dim = len(axes)
        shaped = [
            jnp.broadcast_to(
                v.reshape([-1 if i == axis else 1 for i in range(dim)]),
                self.stencil.grid if self.tile is None else tuple(map(len, axes)),
            )
            for axis, v in enumerate(axes)
        ]
        return math.prod(shaped[1:], start=shaped[0])

    def _fine(self, axes):
        """From values along the axes of the grid to an array of the parameters."""
        shape = self.leaves[0].shape
        fine = [
            jnp.repeat(v, t, total_repeat_length=len(v) * t)[:n] if t > 1 else v
            for v, t, n in zip(axes, self.tile, shape, strict=True)
        ]
        return self._outer(fine)

    def _product(self, product, x):
        leaves, treedef = jax.tree.flatten(self.params)
        tangent = [jnp.zeros_like(leaf) for leaf in leaves]
        for position, part in zip(self.arrays, x, strict=True):
            tangent[position] = tangent[position] + part.astype(leaves[position].dtype)
        y = jax.tree.leaves(product(jax.tree.unflatten(treedef, tangent)))
        return [y[position].astype(self.dtype) for position in self.arrays]
