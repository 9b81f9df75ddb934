"""Entries of a curvature with a declared reach, exactly, by few products.

Cells of a grid that are further apart than twice the reach share no neighbour: one
product with all of one color answers for each of them. So N = 1ᵀ G 1 for the
indicators 1 of tiles costs (2 reach + 1)^dim products, whatever their number, and
diag G (reach + 1)^dim. The declaration is checked by products with a random vector.
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
    """How far a product is from what a declared reach foretells of it, relative."""

    error: jax.Array  # shape (): infinite for what is not finite.
    tolerance: jax.Array  # shape (): what rounding of the products explains.


class Sums(NamedTuple):
    """The block sums of a matrix on a grid."""

    S: jax.Array  # as a stencil.
    check: Check
    rounding: jax.Array  # shape (): of the products, relative.
    products: jax.Array  # shape (), int32.


class Diagonal(NamedTuple):
    """The diagonal on some arrays, and how far it is from what was declared."""

    values: list[jax.Array]  # one of each array.
    check: Check
    products: jax.Array  # shape (), int32.


def diagonal(G: LinearOperator, cells: Cells, key, tolerance) -> Diagonal:
    """The diagonal of G on some arrays, whose elements are the cells.

    For it, elements of one color may share neighbours if they do not meet: reach + 1
    colors an axis. Those that do meet give two answers to two random vectors.

    Args:
      G: the curvature.
      cells: the elements of some arrays.
      key: a random key.
      tolerance: of the check, from :func:`block_sums`.
    """
    stencil = cells.stencil

    def attempt(around):
        colors = stencil.colors(share=True, around=around)
        probes = ColorProbes(G, cells, key, colors)

        def respond(probe):
            # ±1 on the color, 0 elsewhere: times the response it is the diagonal.
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
        # Where two of a color meet, the diagonal does not explain the second response.
        signed = probes.signed_test()
        expected = [d * x for d, x in zip(diagonals, signed, strict=True)]
        seen, expected = stacked(seen), stacked(expected)
        size = _of_fields(jnp.abs(stacked(diagonals)), stencil)
        check = Check(_relative_error(seen / size, expected / size), tolerance)
        return Diagonal(diagonals, check, jnp.int32(2 * probes.count))

    return _first_that_passes(attempt, stencil, share=True)


def block_sums(G: LinearOperator, cells: Cells, key) -> Sums:
    """The stencil S of N = 1ᵀ G 1 over cells, and how far it is from G.

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

    # In units in which fields have curvature 1: else one would hide another's error.
    S, products = respond_to_colors(False)
    size = _of_fields(jnp.abs(stencil.diagonal(S)), stencil)
    unit = jnp.sqrt(jnp.min(size) / size)
    # The test vector, and a multiple of it: what G makes of the two differs by the
    # rounding of the arithmetic that the user's function does, whatever its dtype.
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

    Fields are arrays, and entries along axes where all of them meet.
    """
    axes = [
        1 + axis
        for axis, (k, g) in enumerate(zip(stencil.reach, stencil.grid, strict=True))
        if k < g
    ]
    mean = jnp.mean(values, axis=axes, keepdims=True)
    return jnp.broadcast_to(jnp.where(mean == 0, 1, mean), values.shape)


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
    check = result.check

    def again():
        second = attempt(True)
        return second._replace(products=result.products + second.products)

    return _control_flow.cond(check.error <= check.tolerance, lambda: result, again)


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
