"""Curvature with a declared reach, exactly, by few products.

Cells of a grid that are further apart than twice the reach share no neighbour: one
product with all of one color answers for each of them. The declaration is checked by
products with a random vector.
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


class Check(NamedTuple):
    """How far a product is from what a declared reach foretells of it, relative."""

    error: jax.Array  # shape (): infinite for what is not finite.
    tolerance: jax.Array  # shape (): what rounding of the products explains.


def diagonal(product, params, arrays, stencil, key, tolerance):
    """The diagonal of G on some arrays, and how far it is from what was declared.

    For it, elements of one color may share neighbours if they do not meet: reach + 1
    colors an axis. Those that do meet give two answers to two random vectors.

    Args:
      product: v -> G v on trees like params.
      params: the parameters.
      arrays: positions of arrays of one shape.
      stencil: its cells are the elements.
      key: a random key.
      tolerance: of the check, from :func:`block_sums`.

    Returns:
      ``(diagonals, check, products)``: an array for each of ``arrays``.
    """

    def attempt(around):
        colors = stencil.colors(share=True, around=around)
        probes = _Probes(params, arrays, stencil, None, key, colors)

        def respond(probe):
            # ±1 on the color, 0 elsewhere: times the response it is the diagonal.
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
        signed = probes.signed_test()
        expected = [d * x for d, x in zip(diagonals, signed, strict=True)]
        error = _relative_error(*map(_stacked, (seen, expected)))
        check = Check(error, tolerance)
        return diagonals, check, jnp.int32(2 * probes.count)

    return _first_that_passes(attempt, stencil, share=True)


def row_sums(product, params, arrays, stencil, key):
    """Σ_j |G_ij| on some arrays, with arguments as for ``diagonal``."""
    # More colors than a grid needs that is not periodic: it is not known here.
    colors = stencil.colors(share=False, around=True)
    probes = _Probes(params, arrays, stencil, None, key, colors)

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
      ``(S, check, products)``.
    """
    # The test vector, and a multiple of it: what G makes of the two differs by the
    # rounding of the arithmetic that the user's function does, whatever its dtype.
    probes = _Probes(params, arrays, stencil, tiles.tile, key, None)
    image, scaled = _flow.map(
        lambda scale: probes.respond_to_test(product, scale),
        jnp.array([1.0, _SCALE], probes.dtype),
        2 if 2 * _trees.size(params) <= _BATCH_ELEMENTS else 1,
        params,
    )
    scaled = scaled / _SCALE
    fine = _relative_error(image, scaled)
    image, scaled = (
        jnp.stack([tiles.sums(y) for y in parts]) for parts in (image, scaled)
    )
    rounding = jnp.maximum(fine, _relative_error(image, scaled))
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in probes.leaves)
    tolerance = jnp.clip(16 * rounding, min(eps**0.5, _MOST), _MOST)

    def attempt(around):
        colors = stencil.colors(share=False, around=around)
        probes = _Probes(params, arrays, stencil, tiles.tile, key, colors)

        def respond(probe):
            y = probes.respond(product, probe, _outer(probe.signs))
            return jnp.stack([tiles.sums(y) for y in y])

        Y = _flow.map(respond, probes.all_probes(), probes.side_by_side, params)
        counts = [axis.number for axis in colors]
        Y = Y.reshape(stencil.fields, *counts, stencil.fields, *stencil.grid)
        S = stencil.from_colors(Y * probes.near_signs(), around)
        expected = stencil.matvec(S, probes.coarse_test())
        check = Check(_relative_error(image, expected), tolerance)
        return S, check, jnp.int32(probes.count)

    S, check, products = _first_that_passes(attempt, stencil, share=False)
    return S, check, products + 2


def worst(checks):
    """The check that is furthest from passing."""
    error, tolerance = (jnp.stack(x) for x in zip(*checks, strict=True))
    # An infinite error stays the largest.
    most = jnp.argmax(error / tolerance)
    return Check(error[most], tolerance[most])


def _first_that_passes(attempt, stencil, share):
    """``attempt(around=False)``, and with more colors where its check fails.

    As on a periodic grid whose number of cells is no multiple of the number of colors.
    """
    result, colors = attempt(False), stencil.colors(share=share, around=False)
    if all(g % c.number == 0 for g, c in zip(stencil.grid, colors, strict=True)):
        return result  # The colors around the edge are the same.
    _, check, products = result

    def again():
        found, check, more = attempt(True)
        return found, check, products + more

    return _flow.cond(check.error <= check.tolerance, lambda: result, again)


def _stacked(fields):
    """Arrays of one shape as one, which lies on every device."""
    return jnp.stack([_tiles.replicated(x) for x in fields])


_SCALE = 1.3  # No power of 2, so that it changes how numbers are rounded.
_MOST = 0.1  # A false reach is off by more, however little the arithmetic resolves.


def _relative_error(x, y):
    """‖x - y‖ over the larger norm: 0 for zeros, infinite if one is not finite.

    Over the largest entry before numbers are squared, or the squares would overflow
    or vanish.
    """
    largest = jnp.maximum(jnp.max(jnp.abs(x)), jnp.max(jnp.abs(y)))
    usable = largest >= float(jnp.finfo(x.dtype).tiny)
    scale = jnp.where(usable, largest, 1)
    difference, *squares = (
        jnp.sum(jnp.square(v)) for v in (x / scale - y / scale, x / scale, y / scale)
    )
    error = jnp.sqrt(difference / jnp.where(usable, jnp.maximum(*squares), 1))
    return jnp.where(jnp.isfinite(largest), error, jnp.inf)


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
        counts = [range(axis.number) for axis in self.colors]
        every = itertools.product(range(self.stencil.fields), *counts)
        field, *colors = np.array(list(every), np.int32).T

        def rows(axis, v, color):
            on = self.colors[axis].rows()[color]
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
    def count(self) -> int:
        """The number of probes."""
        return self.stencil.fields * math.prod(axis.number for axis in self.colors)

    @property
    def side_by_side(self) -> int:
        """How many probes run side by side, in equal chunks."""
        most = max(1, _BATCH_ELEMENTS // max(_trees.size(self.params), 1))
        fits = [b for b in range(1, self.count + 1) if self.count % b == 0]
        return max(b for b in fits if b <= most)

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
        """The test vector, shape (fields, *grid)."""
        return jnp.stack(
            [
                _outer([test[a] for test in self.axis_tests])
                for a in range(self.stencil.fields)
            ]
        )

    def respond_to_test(self, product, scale):
        """G times a multiple of the test vector of all fields, on the arrays."""
        x = [
            scale
            * _outer([self._fine(axis, v[a]) for axis, v in enumerate(self.axis_tests)])
            for a in range(self.stencil.fields)
        ]
        return _stacked(self._product(product, x))

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
