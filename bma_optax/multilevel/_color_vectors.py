"""Probing vectors of one color each, and the weights of sums of their responses.

A probe is the outer product of one vector an axis. Along each axis a response has rows
of weights: one for each offset between blocks, or one for the check. With slopes there
are four for each offset, for the powers 0 and 1 of x in the column of the probe and in
that of the response.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _sharding
from bma_optax.partitions._coloring import Axis


class Numbers(NamedTuple):
    """Random numbers along one axis."""

    signs: jax.Array  # one for each cell: 1 or -1.
    # One for each cell, uniform between 0 and 1: their mean shows what a weak pull
    # between all elements does to constants, which its tiny entries do not show.
    tests: jax.Array
    weights: jax.Array  # one for each element: 1 or -1.


class Row(NamedTuple):
    """A row of weights along one axis."""

    weights: jax.Array  # shape (probes, n).
    positions: tuple[int, ...]  # in a tile, where weights differ from 0; static.
    # The powers of x along this axis in the columns of the probe and of the response.
    powers: tuple[int, int] = (0, 0)


class Vectors(NamedTuple):
    """The vectors of all probes along one axis, and the weights of responses."""

    probes: jax.Array  # shape (probes, n).
    rows: tuple[tuple[Row, ...], ...]  # of each kind of sum.


def numbers(key, axes, dtype) -> list[Numbers]:
    """Draws random numbers along all axes."""
    sizes = [n for axis in axes for n in (axis.num_cells, axis.num_cells, axis.n)]
    # Draw all numbers in one call: each call takes 0.1 s to compile.
    uniform = jax.random.uniform(key, (sum(sizes),), dtype, minval=-1.0, maxval=1.0)
    parts = jnp.split(_sharding.replicate(uniform), np.cumsum(sizes)[:-1])
    return [
        Numbers(_signs(signs), (1 + tests) / 2, _signs(weights))
        for signs, tests, weights in zip(
            parts[::3], parts[1::3], parts[2::3], strict=True
        )
    ]


def _signs(x):
    return jnp.where(x < 0, -1, 1).astype(x.dtype)


def color_vectors(axis: Axis, drawn: Numbers) -> Vectors:
    """Probes of signs on each color; weights for blocks that meet, and for the check.

    With ``axis.share`` there are the latter alone. The weights of the check foretell
    the response to the test vector.
    """
    near = axis.colors.near
    signs = jnp.where(near < 0, 0, drawn.signs[near])
    foretold = signs * drawn.tests[near] * _like(drawn.weights, near)
    check = _check_rows(axis, foretold)
    kinds = (check,) if axis.share else (_rows_of_columns(axis, signs), check)
    return Vectors(_on_colors(axis, drawn.signs), kinds)


def test_vectors(axis: Axis, drawn: Numbers) -> Vectors:
    """A vector of uniform numbers, or one on each color, and weights for the check."""
    if axis.num_tests == 1:
        row = _row(axis, drawn.weights[None], True)
        return Vectors(drawn.tests[axis.own][None], ((row,),))
    near = axis.colors.near
    weights = jnp.where(near < 0, 0, _like(drawn.weights, near))
    return Vectors(_on_colors(axis, drawn.tests), (_check_rows(axis, weights),))


def _check_rows(axis, weights):
    """One row, or one for each field of the probe."""
    if axis.fields and not axis.share:
        return _rows_by_offset(axis, weights)
    return (_row(axis, weights, True),)


def _rows_of_columns(axis, weights):
    """A row for each offset, for all pairs of powers one after the other."""
    if axis.slope is None:
        return _rows_by_offset(axis, weights)
    slope = axis.slope.values
    rows: list[Row] = []
    for powers in itertools.product(range(2), repeat=2):
        of_source, own = (slope if power else np.ones(axis.n) for power in powers)
        factors = (of_source[axis.colors.near] * own).astype(weights.dtype)
        rows += _rows_by_offset(axis, weights * factors, powers)
    return tuple(rows)


def _rows_by_offset(axis, weights, powers=(0, 0)):
    """A row for each offset between blocks that meet."""
    at = [axis.offsets == offset for offset in range(axis.width)]
    return tuple(
        _row(axis, jnp.where(where, weights, 0), where, powers) for where in at
    )


def _row(axis, weights, where, powers=(0, 0)):
    """A row of weights, which are 0 elsewhere than ``where``."""
    places = (np.arange(axis.n) % axis.tile)[np.any(where, axis=0)]
    return Row(weights, tuple(np.unique(places).tolist()), powers)


def choices(rows):
    """All choices of one row an axis, by their positions.

    Columns are means and slopes: there is no product of two slopes.
    """
    return [
        key
        for key in itertools.product(*(range(len(of_axis)) for of_axis in rows))
        if all(
            sum(of_axis[i].powers[side] for i, of_axis in zip(key, rows, strict=True))
            < 2
            for side in (0, 1)
        )
    ]


def _on_colors(axis, values):
    """Values of cells on the elements of each color, shape (colors, n)."""
    on = axis.colors.of_element == np.arange(axis.num_colors)[:, None]
    return jnp.where(on, _like(values[axis.own], on), 0)


def _like(x, like):
    return jnp.broadcast_to(x, like.shape)


def arranged(rows, sums):
    """The sums of all choices of rows, as in ``_color_probing.Responses``."""
    powers = [sorted({row.powers for row in of_axis}) for of_axis in rows]
    sloped = [axis for axis, found in enumerate(powers) if len(found) > 1]
    columns = [None, *sloped]  # The mean, and the axes of slopes.
    counts = [len(x) // len(found) for x, found in zip(rows, powers, strict=True)]
    parts = []
    for offsets in np.ndindex(*counts):
        for source, own in itertools.product(columns, repeat=2):
            key = [
                offset + count * found.index((int(axis == source), int(axis == own)))
                for axis, (offset, count, found) in enumerate(
                    zip(offsets, counts, powers, strict=True)
                )
            ]
            parts.append(sums[tuple(key)])
    k, one = len(columns), parts[0].shape
    stack = jnp.stack(parts).reshape(-1, k, k, *one)
    if k > 1:
        stack = stack.transpose(0, 3, 1, 4, 2, *range(5, stack.ndim))
    return stack.reshape(*counts, one[0] * k, one[1] * k, *one[2:])
