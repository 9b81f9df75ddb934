"""Probing vectors of one color each, and the weights of sums of their responses.

A probe is the outer product of one vector an axis. Along each axis a response has rows
of weights: one for each offset between blocks, or one for the check. With slopes there
are four for each offset, for the powers 0 and 1 of x in the column of the probe and in
that of the response.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _random, _sharding, _xla
from bma_optax.partitions._coloring import Axis


class Row(NamedTuple):
    """A row of weights along one axis; static."""

    number: int  # where ``Vectors.table`` has its weights.
    positions: tuple[int, ...]  # in a tile, where weights differ from 0.
    # The powers of x along this axis in the columns of the probe and of the response.
    powers: tuple[int, int] = (0, 0)


class Vectors(NamedTuple):
    """The vectors of all probes along one axis, and the weights of responses."""

    # For each probe its vector, and below it the rows of weights: (probes, rows, n).
    table: jax.Array
    rows: tuple[tuple[Row, ...], ...]  # of each kind of sum.


class _Weights(NamedTuple):
    """The kind of one row of weights along one axis; static."""

    offset: int | None = None  # between blocks that meet; None for all of them.
    powers: tuple[int, int] = (0, 0)
    check: bool = False


def random_numbers(axes, key, dtype) -> list[jax.Array]:
    """Numbers in [0, 1) for all vectors: three an element of each axis, (3, n).

    They are one array, computed once: a hash for each vector is a long program.
    """
    count = 3 * sum(axis.n for axis in axes)
    numbers = _random.uniform(key, jnp.arange(count, dtype=jnp.int32), dtype)
    numbers = _sharding.replicate(_xla.materialize(numbers, numbers))
    ends = np.cumsum([3 * axis.n for axis in axes])[:-1]
    return [x.reshape(3, -1) for x in jnp.split(numbers, ends)]


def color_vectors(axis: Axis, numbers) -> Vectors:
    """Probes of signs on each color; weights for blocks that meet, and for the check.

    With ``axis.share`` there are the latter alone. The weights of the check foretell
    the response to the test vector.

    Args:
      axis: the axis.
      numbers: random numbers along it, from :func:`random_numbers`.
    """
    offsets = range(axis.width)
    check = _checks(axis)
    if axis.share:
        return _vectors(axis, numbers, (check,), test=False)
    powers = range(1 if axis.slope is None else 2)
    every = tuple(
        _Weights(offset, (of_probe, own))
        for of_probe, own in itertools.product(powers, repeat=2)
        for offset in offsets
    )
    return _vectors(axis, numbers, (every, check), test=False)


def test_vectors(axis: Axis, numbers) -> Vectors:
    """A vector of uniform numbers, or one on each color, and weights for the check."""
    kind = (_Weights(check=True),) if axis.num_tests == 1 else _checks(axis)
    return _vectors(axis, numbers, (kind,), test=True)


def _checks(axis):
    """One row, or one for each field of the probe."""
    if axis.fields and not axis.share:
        return tuple(_Weights(offset, check=True) for offset in range(axis.width))
    return (_Weights(check=True),)


def _vectors(axis, numbers, kinds, *, test) -> Vectors:
    counter, rows = itertools.count(1), []
    for kind in kinds:
        rows.append(tuple(Row(next(counter), _places(axis, x), x.powers) for x in kind))
    weights = tuple(itertools.chain(*kinds))
    table = _table(axis, numbers, weights, test)
    return Vectors(_sharding.replicate(table), tuple(rows))


def _places(axis, weights):
    """The positions in a tile where weights differ from 0."""
    places = np.arange(axis.n) % axis.tile
    if weights.offset is not None:
        places = places[np.any(axis.offsets == weights.offset, axis=0)]
    return tuple(np.unique(places).tolist())


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _table(axis, numbers, weights, test):
    """The vectors, and the rows of weights below them, see :class:`Vectors`.

    All in one expression, which is one kernel.
    """
    dtype = numbers.dtype
    signs = jnp.where(numbers[0] < 0.5, -1, 1).astype(dtype)
    # The mean of uniform numbers shows what a weak pull between all elements does to
    # constants, which its tiny entries do not show.
    uniform = numbers[1]
    # Between .5 and 1.5 in size: signs alone cancel in each of a few short tiles, and
    # with them the error of a false reach.
    random = 2 * numbers[2] - 1
    random = random + jnp.where(random < 0, -0.5, 0.5).astype(dtype)
    own = _of_cells(uniform if test else signs, axis.own)
    if test and axis.num_tests == 1:
        table = jnp.stack([own, random])[None]
        return _xla.materialize(table, table)
    near, shape = axis.colors.near, (axis.num_colors, 1 + len(weights), axis.n)

    def rows(values):
        """One value for each row, the first for the vectors, in the whole shape."""
        values = np.asarray(values)[None, :, None]
        return jnp.broadcast_to(jnp.asarray(values), shape)

    def along(x):
        """A number for each element, or for each probe and element."""
        return jnp.broadcast_to(x[:, None] if x.ndim == 2 else x[None, None], shape)

    colors = jnp.asarray(axis.colors.of_element)
    inside = along(colors) == jax.lax.broadcasted_iota(colors.dtype, shape, 0)
    vector = jnp.where(inside, along(own), 0)
    wanted = rows([-1, *(-1 if x.offset is None else x.offset for x in weights)])
    fits = (wanted < 0) | (along(jnp.asarray(axis.offsets)) == wanted)
    used = (along(jnp.asarray(near)) >= 0) & fits
    value = along(random)
    if not test:
        of_probe = along(_of_cells(signs, near))
        of_check = along(_of_cells(signs * uniform, near)) * value
        value = jnp.where(
            rows([False, *(x.check for x in weights)]), of_check, of_probe
        )
    if any(any(x.powers) for x in weights):
        slope = axis.slope.values.astype(dtype)
        sides = jnp.asarray(slope[near]), jnp.asarray(slope)
        for side, x in enumerate(sides):
            powers = [False, *(bool(w.powers[side]) for w in weights)]
            value = jnp.where(rows(powers), value * along(x), value)
    first = rows([True, *(False for _ in weights)])
    table = jnp.where(first, vector, jnp.where(used, value, 0))
    return _xla.materialize(table, table)


def _of_cells(x, cells):
    """x[cells]; where there is no cell any number."""
    cells = jnp.asarray(np.maximum(cells, 0).astype(np.int32))
    return x.at[cells].get(mode="promise_in_bounds", wrap_negative_indices=False)


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
