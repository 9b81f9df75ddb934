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

    For it, elements of one color need not share neighbours, only not meet: reach + 1
    colors an axis. Those that do meet give two answers to two random vectors.

    Args:
      product: v -> G v on trees like params.
      params: the parameters.
      arrays: positions of arrays of one shape.
      stencil: its cells are the elements.
      key: a random key.

    Returns:
      ``(diagonals, error)``: an array for each of ``arrays``; relative, shape ().
    """
    probes = _Probes(params, arrays, stencil, None, key, stencil.apart)

    def respond(*color):
        x, test = probes.signs(color), probes.tests(color)
        # x is ±1 on the color and 0 elsewhere: its product with G x is the diagonal.
        return [
            [probes.own(color, a, x * y) for a, y in enumerate(responses)]
            for responses in (
                probes.respond(product, color, x),
                probes.respond(product, color, test),
            )
        ]

    zeros = [jnp.zeros(stencil.grid, probes.dtype) for _ in arrays]
    diagonals, seen = probes.total(respond, [zeros, zeros])
    # Where two of a color meet, the diagonal does not explain the second response.
    expected = [d * x for d, x in zip(diagonals, probes.signed_test(), strict=True)]
    return diagonals, _relative_error(jnp.stack(seen), jnp.stack(expected))


def row_sums(product, params, arrays, stencil, key):
    """Σ_j |G_ij| on some arrays, with arguments as for ``diagonal``."""
    probes = _Probes(params, arrays, stencil, None, key, stencil.colors)

    def respond(*color):
        return [jnp.abs(y) for y in probes.respond(product, color, probes.signs(color))]

    zeros = [jnp.zeros(stencil.grid, probes.dtype) for _ in arrays]
    return probes.total(respond, zeros)


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
    probes = _Probes(params, arrays, stencil, tiles.tile, key, stencil.colors)

    def respond(*color):
        y = probes.respond(product, color, probes.signs(color))
        return jnp.stack([tiles.sums(y) for y in y])

    _, Y = jax.lax.scan(
        lambda _, colors: (None, jax.vmap(respond)(*colors)), None, probes.chunks()
    )
    Y = Y.reshape(stencil.fields, *stencil.colors, stencil.fields, *stencil.grid)
    S = stencil.from_colors(Y * probes.near_signs())
    response = probes.respond_to_test(product)
    image = jnp.stack([tiles.sums(y) for y in response])
    return S, _relative_error(image, stencil.matvec(S, probes.coarse_test()))


def _relative_error(x, y):
    difference, norm = jnp.sum(jnp.square(x - y)), jnp.sum(jnp.square(x))
    return jnp.sqrt(difference / jnp.where(norm > 0, norm, 1))


# Products run side by side as long as their vectors hold no more elements than this.
_BATCH_ELEMENTS = 2**16


class _Probes:
    """Vectors of random signs on the cells of one color, products of one-axis ones.

    Where the declaration is wrong, other cells of the color then give noise without
    bias, not row sums.
    """

    def __init__(self, params, arrays, stencil, tile, key, colors):
        self.params, self.arrays, self.stencil = params, arrays, stencil
        self.tile = tile or (1,) * len(stencil.grid)
        self.colors = colors
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
        every = itertools.product(range(self.stencil.fields), *map(range, self.colors))
        return tuple(jnp.asarray(c) for c in np.array(list(every), np.int32).T)

    def chunks(self):
        """The same in equal chunks of probes that run side by side."""
        colors = self.all_colors()
        count = len(colors[0])
        most = max(1, _BATCH_ELEMENTS // max(_trees.size(self.params), 1))
        size = max(b for b in range(1, count + 1) if count % b == 0 and b <= most)
        return tuple(c.reshape(count // size, size) for c in colors)

    def total(self, respond, zeros):
        """The sum over all colors of what ``respond(*color)`` gives."""

        def add(total, colors):
            parts = jax.vmap(respond)(*colors)
            return jax.tree.map(lambda t, p: t + jnp.sum(p, axis=0), total, parts), None

        return jax.lax.scan(add, zeros, self.chunks())[0]

    def signs(self, color):
        """Random signs on the color, in the shape of an array."""
        return self._fine(self._on_color(color, self.axis_signs))

    def tests(self, color):
        """The test vector of the field on the color, in the shape of an array."""
        return self._fine(
            self._on_color(color, [test[color[0]] for test in self.axis_tests])
        )

    def _on_color(self, color, axes):
        return [
            jnp.where(np.arange(g, dtype=np.int32) % m == c, v, 0)
            for c, m, g, v in zip(
                color[1:], self.colors, self.stencil.grid, axes, strict=True
            )
        ]

    def own(self, color, a, x):
        """x for the field of the color, else 0."""
        return x if self.stencil.fields == 1 else jnp.where(color[0] == a, x, 0)

    def respond(self, product, color, x):
        """G x on the arrays, for a probe x in the field of the color."""
        return self._product(
            product, [self.own(color, a, x) for a in range(len(self.arrays))]
        )

    def near_signs(self):
        """For each color and cell the sign of the cell near it that has the color."""
        dim = len(self.stencil.grid)
        whole = (1, *self.colors, 1, *self.stencil.grid)  # field, *color, field, *cell
        product = jnp.ones(whole, self.dtype)
        for axis, (g, m) in enumerate(zip(self.stencil.grid, self.colors, strict=True)):
            cells = np.arange(g)
            steps = np.array([self.stencil.offset(axis, i) for i in range(m)])
            near = cells + steps[(np.arange(m)[:, None] - cells) % m]
            shape = [1] * len(whole)
            shape[1 + axis], shape[2 + dim + axis] = m, g
            signs = self.axis_signs[axis][near % g].reshape(shape)
            product = product * jnp.broadcast_to(signs, whole)
        return product

    def coarse_test(self):
        """The test vector, shape (fields, *grid)."""
        return jnp.stack(
            [
                self._outer([test[a] for test in self.axis_tests])
                for a in range(self.stencil.fields)
            ]
        )

    def respond_to_test(self, product):
        """G times the test vector of all fields, on the arrays."""
        return self._product(
            product,
            [
                self._fine([test[a] for test in self.axis_tests])
                for a in range(self.stencil.fields)
            ],
        )

    def signed_test(self):
        """The signs times the test vector, an array for each field."""
        return [
            self._fine(
                [
                    e * test[a]
                    for e, test in zip(self.axis_signs, self.axis_tests, strict=True)
                ]
            )
            for a in range(self.stencil.fields)
        ]

    def _outer(self, axes):
        dim, shape = len(axes), tuple(len(v) for v in axes)
        shaped = [
            jnp.broadcast_to(
                v.reshape([-1 if i == axis else 1 for i in range(dim)]), shape
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
        parts = dict(zip(self.arrays, x, strict=True))
        tangent = [
            _trees.sharded_like(parts[i].astype(leaf.dtype), leaf)
            if i in parts
            else jnp.zeros_like(leaf)
            for i, leaf in enumerate(leaves)
        ]
        y = jax.tree.leaves(product(jax.tree.unflatten(treedef, tangent)))
        return [y[position].astype(self.dtype) for position in self.arrays]
