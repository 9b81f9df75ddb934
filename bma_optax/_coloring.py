"""Curvature with a declared reach, exactly, by few products.

Cells of a grid that are further apart than twice the reach share no neighbour: one
product with all of one color answers for each of them. The declaration is checked by
one product with a random vector.
"""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _flow, _tiles, _trees
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

    def respond(probe):
        # ±1 on the color, 0 elsewhere: its product with the response is the diagonal.
        x = _outer(probe.signs)
        return [
            [probes.own(probe, a, x * y) for a, y in enumerate(responses)]
            for responses in (
                probes.respond(product, probe, x),
                probes.respond(product, probe, _outer(probe.tests)),
            )
        ]

    zeros = probes.zeros()
    diagonals, seen = probes.total(respond, [zeros, zeros])
    # Where two of a color meet, the diagonal does not explain the second response.
    expected = [d * x for d, x in zip(diagonals, probes.signed_test(), strict=True)]
    seen, expected = (
        jnp.stack([_tiles.replicated(x) for x in fields]) for fields in (seen, expected)
    )
    return diagonals, _relative_error(seen, expected)


def row_sums(product, params, arrays, stencil, key):
    """Σ_j |G_ij| on some arrays, with arguments as for ``diagonal``."""
    probes = _Probes(params, arrays, stencil, None, key, stencil.colors)

    def respond(probe):
        y = probes.respond(product, probe, _outer(probe.signs))
        return [jnp.abs(y) for y in y]

    return probes.total(respond, probes.zeros())


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

    def respond(probe):
        y = probes.respond(product, probe, _outer(probe.signs))
        return jnp.stack([tiles.sums(y) for y in y])

    Y = _flow.map(respond, probes.all_probes(), probes.side_by_side, params)
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


class _Probe(NamedTuple):
    """Vectors along the axes of the grid; outer products of them are on one color.

    Made for all colors at once: in a loop over colors XLA would select the cells of a
    color again for every use of a probe.
    """

    field: jax.Array
    signs: list[jax.Array]  # one an axis, in the number of its elements.
    tests: list[jax.Array]  # likewise.


def _outer(axes):
    dim, shape = len(axes), tuple(len(v) for v in axes)
    shaped = [
        jnp.broadcast_to(v.reshape([-1 if i == axis else 1 for i in range(dim)]), shape)
        for axis, v in enumerate(axes)
    ]
    return math.prod(shaped[1:], start=shaped[0])


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

    def all_probes(self) -> _Probe:
        """Every probe, each array with one row for each."""
        every = itertools.product(range(self.stencil.fields), *map(range, self.colors))
        field, *colors = np.array(list(every), np.int32).T

        def rows(axis, v, color):
            g, m = self.stencil.grid[axis], self.colors[axis]
            on = jnp.arange(g, dtype=jnp.int32)[None] % m == color[:, None]
            return self._fine(axis, jnp.where(on, v, 0))

        size = (len(field), 1)
        return _Probe(
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
    def side_by_side(self) -> int:
        """How many probes run side by side, in equal chunks."""
        count = self.stencil.fields * math.prod(self.colors)
        most = max(1, _BATCH_ELEMENTS // max(_trees.size(self.params), 1))
        return max(b for b in range(1, count + 1) if count % b == 0 and b <= most)

    def zeros(self):
        """Zeros for each of the arrays, in the dtype in which they meet."""
        return _trees.zeros_like(self.leaves, lambda _: self.dtype)

    def total(self, respond, zeros):
        """The sum over all probes of what ``respond(probe)`` gives."""

        def add(total, chunk):
            parts = jax.vmap(respond)(chunk)
            return jax.tree.map(lambda t, p: t + jnp.sum(p, axis=0), total, parts), None

        size = self.side_by_side
        chunks = jax.tree.map(
            lambda x: x.reshape(-1, size, *x.shape[1:]), self.all_probes()
        )
        return _flow.scan(add, zeros, chunks, operands=self.params)[0]

    def own(self, probe, a, x):
        """x for the field of the probe, else 0."""
        return x if self.stencil.fields == 1 else jnp.where(probe.field == a, x, 0)

    def respond(self, product, probe, x):
        """G x on the arrays, for x in the field of a probe."""
        return self._product(
            product, [self.own(probe, a, x) for a in range(len(self.arrays))]
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
                _outer([test[a] for test in self.axis_tests])
                for a in range(self.stencil.fields)
            ]
        )

    def respond_to_test(self, product):
        """G times the test vector of all fields, on the arrays."""
        return self._product(
            product,
            [
                _outer(
                    [self._fine(axis, v[a]) for axis, v in enumerate(self.axis_tests)]
                )
                for a in range(self.stencil.fields)
            ],
        )

    def signed_test(self):
        """The signs times the test vector, an array for each field."""
        return [
            _outer(
                [
                    self._fine(axis, signs * tests[a])
                    for axis, (signs, tests) in enumerate(
                        zip(self.axis_signs, self.axis_tests, strict=True)
                    )
                ]
            )
            for a in range(self.stencil.fields)
        ]

    def _fine(self, axis, x):
        """From values on the last axis, cells along one of the grid, to elements."""
        t, n = self.tile[axis], self.leaves[0].shape[axis]
        return _tiles.axis_fill(x, x.ndim - 1, t, n) if t > 1 else x

    def _product(self, product, x):
        leaves, treedef = jax.tree.flatten(self.params)
        parts = dict(zip(self.arrays, x, strict=True))
        tangent = [
            _trees.typed_like(parts[i].astype(leaf.dtype), leaf)
            if i in parts
            else _trees.zeros_like(leaf)
            for i, leaf in enumerate(leaves)
        ]
        y = jax.tree.leaves(product(jax.tree.unflatten(treedef, tangent)))
        return [y[position].astype(self.dtype) for position in self.arrays]
