"""Products with probing vectors of one color each, and sums of their responses.

A probe is the outer product of one vector an axis. It lies on the cells of one color
of one field, and is 0 elsewhere. Along each axis a response has rows of weights, and
its sum over a block with the weights of one row an axis is what one cell, or one offset
between blocks, contributes. Sums go axis by axis, and nothing but sums is kept of a
response. Arrays have shape (n_1, ..., n_dim), sums of responses (fields, *grid).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _control_flow, _sharding, _tree, _xla
from bma_optax.curvature._probing import LinearOperator
from bma_optax.partitions import _tiles
from bma_optax.partitions._coloring import Axis

_MAX_SLICES = 16
_TOGETHER = 4  # Products in a round of a loop.


class Numbers(NamedTuple):
    """Random numbers along one axis."""

    signs: jax.Array  # one for each cell: 1 or -1.
    tests: jax.Array  # one for each cell: uniform between -1 and 1.
    weights: jax.Array  # one for each element: 1 or -1.


class Row(NamedTuple):
    """A row of weights along one axis."""

    weights: jax.Array  # shape (probes, n).
    positions: tuple[int, ...]  # in a tile, where weights differ from 0; static.


class Vectors(NamedTuple):
    """The vectors of all probes along one axis, and the weights of responses."""

    probes: jax.Array  # shape (probes, n).
    rows: tuple[tuple[Row, ...], ...]  # of each kind of sum.


class Responses(NamedTuple):
    """What the products with all probes give."""

    # For each kind, a sum for each choice of one row an axis, which are the first axes:
    # shape (*rows, fields of the probes, fields, *grid).
    sums: list[jax.Array]
    diagonal: list[jax.Array]  # one like each array, or none.


def numbers(key, axes, dtype) -> list[Numbers]:
    """Draws random numbers along all axes."""
    sizes = [n for axis in axes for n in (axis.num_cells, axis.num_cells, axis.n)]
    # Draw all numbers in one call: each call takes 0.1 s to compile.
    uniform = jax.random.uniform(key, (sum(sizes),), dtype, minval=-1.0, maxval=1.0)
    parts = jnp.split(_sharding.replicate(uniform), np.cumsum(sizes)[:-1])
    return [
        Numbers(_signs(signs), tests, _signs(weights))
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
    kinds = (check,) if axis.share else (_rows_by_offset(axis, signs), check)
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


def _rows_by_offset(axis, weights):
    """A row for each offset between blocks that meet."""
    at = [axis.offsets == offset for offset in range(axis.width)]
    return tuple(_row(axis, jnp.where(where, weights, 0), where) for where in at)


def _row(axis, weights, where):
    """A row of weights, which are 0 elsewhere than ``where``."""
    places = (np.arange(axis.n) % axis.tile)[np.any(where, axis=0)]
    return Row(weights, tuple(np.unique(places).tolist()))


def _on_colors(axis, values):
    """Values of cells on the elements of each color, shape (colors, n)."""
    on = axis.colors.of_element == np.arange(axis.num_colors)[:, None]
    return jnp.where(on, _like(values[axis.own], on), 0)


def _like(x, like):
    return jnp.broadcast_to(x, like.shape)


def respond(G: LinearOperator, arrays, axes, vectors, *, diagonal: bool) -> Responses:
    """Multiplies G by all probes, and sums the responses.

    Args:
      G: the curvature.
      arrays: the positions of the fields among the leaves of the parameters.
      axes: the axes of the fields.
      vectors: those of each axis.
      diagonal: whether to return the diagonal of G, from probes of signs on elements.
    """
    params, treedef = jax.tree.flatten(G.params)
    leaves = [params[i] for i in arrays]
    dtype, dim = _tree.common_statistic_dtype(leaves), len(axes)
    kinds = range(len(vectors[0].rows))

    def own(field, a, x):
        return x if len(leaves) == 1 else jnp.where(field == a, x, 0)

    def product(field, x):
        """G times the vector that is x in one field; its response in all fields."""
        v = [_tree.zeros_like(leaf) for leaf in params]
        for a, i in enumerate(arrays):
            v[i] = own(field, a, x).astype(params[i].dtype)
        y = jax.tree.leaves(G(jax.tree.unflatten(treedef, v)))
        return [y[i].astype(dtype) for i in arrays]

    def response(field, x, probe):
        """The product, stored, since the sums and the diagonal are made from it."""
        if not _control_flow.is_traced(x, G.params):
            return product(field, x)
        return _xla.apart(
            lambda x: product(field, x),
            lambda x: [_sharding.typed_like(x, leaf) for leaf in leaves],
            probe.reshape(-1)[0],
            x,
        )

    def along(axis, field, rest, diagonal):
        """Sums over the blocks along the first axes, of the probes of all their colors.

        Args:
          axis: the last of these axes.
          field: the field of the probes.
          rest: the product of the probe's vectors along the other axes.
          diagonal: a list to add to.
        """

        def step(carry, one):
            sums, diagonal = carry
            probe, rows = _xla.materialize(one, one)
            probe = jnp.expand_dims(probe, [i for i in range(dim) if i != axis])
            if axis == 0:
                x = probe * rest
                y = response(field, x, probe)
                diagonal = [d + own(field, a, x * y[a]) for a, d in enumerate(diagonal)]
                inner = [{(): jnp.stack(y)} for _ in kinds]
            else:
                inner, diagonal = along(axis - 1, field, probe * rest, diagonal)
            parts = [
                {
                    (*key, number): _block_sums(
                        x, weights, 1 + axis, axes[axis].tile, row.positions
                    )
                    for key, x in inner[kind].items()
                    for number, (weights, row) in enumerate(
                        zip(rows[kind], vectors[axis].rows[kind], strict=True)
                    )
                }
                for kind in kinds
            ]
            return (jax.tree.map(jnp.add, sums, parts), diagonal), None

        xs = (
            vectors[axis].probes,
            [[row.weights for row in rows] for rows in vectors[axis].rows],
        )
        shape = [len(arrays), *(x.num_blocks for x in axes[: axis + 1])]
        shape += [x.n for x in axes[axis + 1 :]]
        counts = [[len(x.rows[kind]) for x in vectors[: axis + 1]] for kind in kinds]
        zeros = [
            {key: jnp.zeros(shape, dtype) for key in np.ndindex(*count)}
            for count in counts
        ]

        def loop(together, init, xs):
            return _control_flow.scan(
                step, init, xs, operands=G.params, unroll=together
            )[0]

        init = zeros, diagonal
        if axis == 0 and _control_flow.is_traced(G.params):
            return _xla.steps_together(loop, _TOGETHER, init, xs)
        return loop(1, init, xs)

    def of_field(diagonal, field):
        one = jnp.ones((1,) * dim, dtype)
        sums, diagonal = along(dim - 1, field, one, diagonal)
        return diagonal, sums

    zeros = _tree.zeros_like(leaves, lambda _: dtype) if diagonal else []
    fields = jnp.arange(len(arrays), dtype=jnp.int32)
    found, sums = _control_flow.scan(of_field, zeros, fields, operands=G.params)
    stacks = []
    for kind in kinds:
        counts = [len(x.rows[kind]) for x in vectors]
        parts = jnp.stack([sums[kind][key] for key in np.ndindex(*counts)])
        stacks.append(parts.reshape(*counts, *parts.shape[1:]))
    return Responses(stacks, found)


@functools.partial(jax.jit, static_argnums=(2, 3, 4), inline=True)
def _block_sums(x, weights, axis, tile, positions):
    """Sums x times weights over each tile of an axis, at some positions of a tile."""
    n = x.shape[axis]
    count = -(-n // tile)
    weights = jnp.expand_dims(weights, [i for i in range(x.ndim) if i != axis])
    if count == 1:
        return jnp.sum(x * weights, axis=axis, keepdims=True)
    if len(positions) > _MAX_SLICES:
        return _tiles.axis_sums(x * weights, axis, tile)
    total = jnp.zeros((*x.shape[:axis], count, *x.shape[axis + 1 :]), x.dtype)
    for p in positions:
        part, factor = (
            jax.lax.slice_in_dim(v, p, n, stride=tile, axis=axis) for v in (x, weights)
        )
        part = part * factor
        if part.shape[axis] < count:  # The last tile is shorter.
            part = jnp.pad(part, [(0, int(i == axis)) for i in range(x.ndim)])
        total = total + part
    return total
