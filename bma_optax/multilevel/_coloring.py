"""All entries of a curvature with a declared reach, exactly, from few products.

Cells of a grid that are further apart than twice the reach have no common neighbour.
One product with all cells of one color therefore gives the entries of each of them.
N = 1ᵀ G 1 for the indicators 1 of tiles takes (2 reach + 1)^dim products, whatever the
number of tiles; diag G takes (reach + 1)^dim. Products with a random vector check the
declared reach. N is a stencil S[b, a, *offset, *cell], for several fields on one grid.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bma_optax import _control_flow, _tree
from bma_optax.curvature._probing import LinearOperator
from bma_optax.multilevel._color_probing import (
    BATCH_ELEMENTS,
    Cells,
    ColorProbes,
    outer,
    stacked,
)


class Check(NamedTuple):
    """How far a product is from what the declared reach predicts, relative."""

    error: jax.Array  # shape (): infinite if the product is not finite.
    tolerance: jax.Array  # shape (): the error that rounding explains.


class Sums(NamedTuple):
    """The block sums N of a matrix on a grid."""

    S: jax.Array  # N as a stencil, shape (fields, fields, *offsets, *grid).
    check: Check
    rounding: jax.Array  # shape (): the rounding error of products, relative.
    products: jax.Array  # shape (), int32.


class Diagonal(NamedTuple):
    """The diagonal on some arrays, and a check of the declared reach."""

    values: list[jax.Array]  # one like each array.
    check: Check
    products: jax.Array  # shape (), int32.


def diagonal(G: LinearOperator, cells: Cells, key, tolerance) -> Diagonal:
    """The diagonal of G on some arrays, whose elements are the cells.

    For the diagonal, elements of one color may have common neighbours as long as they
    do not meet each other: reach + 1 colors an axis are enough. If some do meet, two
    random vectors give two different answers.

    Args:
      G: the curvature.
      cells: the elements of some arrays.
      key: a random key.
      tolerance: the tolerance of the check, from :func:`block_sums`.
    """
    stencil = cells.stencil

    def attempt(around):
        colors = stencil.colors(share=True, around=around)
        probes = ColorProbes(G, cells, key, colors)

        def respond(probe):
            # x is ±1 on the color and 0 elsewhere, so x ∘ G x is the diagonal there.
            x = outer(probe.signs)
            return [
                [probes.own(probe, a, x * y) for a, y in enumerate(responses)]
                for responses in (
                    probes.respond(probe, x),
                    probes.respond(probe, outer(probe.tests)),
                )
            ]

        zeros = probes.zeros()
        diagonals, seen = probes.total(respond, [zeros, zeros])
        # If two elements of a color meet, the diagonal misses the second response.
        signed = probes.signed_test()
        expected = [d * x for d, x in zip(diagonals, signed, strict=True)]
        seen, expected = stacked(seen), stacked(expected)
        size = _of_fields(jnp.abs(stacked(diagonals)), stencil)
        check = Check(_relative_error(seen / size, expected / size), tolerance)
        return Diagonal(diagonals, check, jnp.int32(2 * probes.count))

    return _first_that_passes(attempt, stencil, share=True)


def block_sums(G: LinearOperator, cells: Cells, key) -> Sums:
    """The stencil S of N = 1ᵀ G 1 over cells, with a check of the declared reach.

    Args:
      G: the curvature.
      cells: the tiles of some arrays.
      key: a random key.
    """
    stencil = cells.stencil

    def respond_to_colors(around):
        colors = stencil.colors(share=False, around=around)
        probes = ColorProbes(G, cells, key, colors)

        def respond(probe):
            return cells.sums(probes.respond(probe, outer(probe.signs)))

        Y = _control_flow.map(
            respond, probes.all_probes(), probes.side_by_side, G.params
        )
        counts = [axis.number for axis in colors]
        Y = Y.reshape(stencil.fields, *counts, stencil.fields, *stencil.grid)
        S = stencil.from_colors(Y * probes.near_signs(), around)
        return S, jnp.int32(probes.count)

    # Check in units in which every field has curvature 1. In others, a field of large
    # curvature would hide the errors of the rest.
    S, products = respond_to_colors(False)
    size = _of_fields(jnp.abs(stencil.diagonal(S)), stencil)
    unit = jnp.sqrt(jnp.min(size) / size)
    # Multiply G by the test vector and by a multiple of it. The two products differ by
    # the rounding of the user's function, whatever dtype it computes in.
    probes = ColorProbes(G, cells, key, None)
    image, scaled = _control_flow.map(
        lambda scale: probes.respond_to_test(scale * unit),
        jnp.array([1.0, _SCALE], probes.dtype),
        2 if 2 * _tree.size(G.params) <= BATCH_ELEMENTS else 1,
        G.params,
    )
    image, scaled = (unit * cells.sums(parts) for parts in (image, scaled / _SCALE))
    rounding = _relative_error(image, scaled)
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in probes.leaves)
    tolerance = jnp.clip(16 * rounding, min(eps**0.5, _MOST), _MOST)

    def check(S):
        expected = unit * stencil.matvec(S, unit * probes.coarse_test())
        return Check(_relative_error(image, expected), tolerance)

    def attempt(around):
        found, spent = respond_to_colors(True) if around else (S, products)
        return Sums(found, check(found), rounding, spent)

    sums = _first_that_passes(attempt, stencil, share=False)
    return sums._replace(products=sums.products + 2)


def _of_fields(values, stencil):
    """The mean over each field of numbers >= 0, shape (fields, *grid); 1 if it is 0.

    Entries along an axis on which all cells meet count as fields of their own.
    """
    axes = [
        1 + axis
        for axis, (k, g) in enumerate(zip(stencil.reach, stencil.grid, strict=True))
        if k < g
    ]
    mean = jnp.mean(values, axis=axes, keepdims=True)
    return jnp.broadcast_to(jnp.where(mean == 0, 1, mean), values.shape)


def worst(checks):
    """The check whose error is largest relative to its tolerance."""
    error, tolerance = (jnp.stack(x) for x in zip(*checks, strict=True))
    # An infinite error is the largest.
    most = jnp.argmax(error / tolerance)
    return Check(error[most], tolerance[most])


def _first_that_passes(attempt, stencil, share):
    """``attempt(around=False)``, or ``attempt(around=True)`` if its check fails.

    The second has more colors. A periodic grid needs them if the number of colors does
    not divide its number of cells.
    """
    result, colors = attempt(False), stencil.colors(share=share, around=False)
    if all(g % c.number == 0 for g, c in zip(stencil.grid, colors, strict=True)):
        return result  # With ``around`` the colors are the same.
    check = result.check

    def again():
        second = attempt(True)
        return second._replace(products=result.products + second.products)

    return _control_flow.cond(check.error <= check.tolerance, lambda: result, again)


_SCALE = 1.3  # Not a power of 2, so that it changes how numbers are rounded.
_MOST = 0.1  # The error of a false reach is larger than this in any dtype.


def _relative_error(x, y):
    """‖x - y‖ over the larger norm: 0 for zeros, infinite if one is not finite.

    x and y are divided by their largest entry first: the squares would overflow or
    vanish.
    """
    largest = jnp.maximum(jnp.max(jnp.abs(x)), jnp.max(jnp.abs(y)))
    usable = largest >= float(jnp.finfo(x.dtype).tiny)
    scale = jnp.where(usable, largest, 1)
    difference, *squares = (
        jnp.sum(jnp.square(v)) for v in (x / scale - y / scale, x / scale, y / scale)
    )
    error = jnp.sqrt(difference / jnp.where(usable, jnp.maximum(*squares), 1))
    return jnp.where(jnp.isfinite(largest), error, jnp.inf)
