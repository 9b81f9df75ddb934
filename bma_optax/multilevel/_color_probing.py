"""Products with probing vectors of one color each, and sums of their responses.

A probe lies on the cells of one color of one field, and is 0 elsewhere; see
``_color_vectors``. The sum of a response over a block, with the weights of one row an
axis, is what one cell, or one offset between blocks, contributes. Sums go axis by axis,
and nothing but sums is kept of a response. Arrays have shape (n_1, ..., n_dim), sums of
responses (fields, *grid).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bma_optax import _control_flow, _tree, _xla
from bma_optax.curvature._probing import LinearOperator
from bma_optax.multilevel import _color_vectors
from bma_optax.partitions import _tiles

_MAX_SLICES = 16
_TOGETHER = 5  # At most so many responses are held at once.


class Responses(NamedTuple):
    """The results of the products with all probes."""

    # For each kind, a sum for each choice of one row an axis, which are the first axes:
    # shape (*rows, fields of the probes, fields, *grid). Rows by offset count offsets;
    # with slopes components take the place of fields.
    sums: list[jax.Array]
    diagonal: list[jax.Array]  # one like each array, or none.


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

    def choices(kind, axis):
        return _color_vectors.choices([x.rows[kind] for x in vectors[: axis + 1]])

    def own(field, a, x):
        return x if len(leaves) == 1 else jnp.where(field == a, x, 0)

    def product(field, x):
        """G times the vector that is x in one field; its response in all fields."""
        v = [_tree.zeros_like(leaf) for leaf in params]
        for a, i in enumerate(arrays):
            v[i] = own(field, a, x).astype(params[i].dtype)
        y = jax.tree.leaves(G(jax.tree.unflatten(treedef, v)))
        return [y[i].astype(dtype) for i in arrays]

    def responses(field, rest, probes, kept):
        """The products with probes along the first axis, stacked for each field.

        A loop stores them, since the sums and the diagonal are made from them. XLA on
        CPU would otherwise compute parts of a product again for each of these.

        Args:
          kept: arrays like the result, which a loop on CPU writes to. They come back
            beside the result; elsewhere as they are, since a carry would be copied.
        """

        def response(probe):
            x = across(0, _xla.materialize(probe, probe)) * rest
            return product(field, _xla.materialize(x, x))

        def in_place(kept, numbered):
            stacks = zip(kept, response(numbered[1]), strict=True)
            put = jax.lax.dynamic_update_index_in_dim
            return [put(stack, y, numbered[0], 0) for stack, y in stacks], None

        def loop(in_memory, probes, kept):
            operands = G.params, rest
            if in_memory:
                xs = jnp.arange(len(probes)), probes
                found = _control_flow.scan(in_place, kept, xs, operands=operands)[0]
                return found, found
            found = _control_flow.scan(
                lambda _, probe: (None, response(probe)),
                *(None, probes),
                operands=operands,
                unroll=len(probes),
            )[1]
            return found, kept

        closure = rest, G.params
        return _xla.by_platform(loop, True, False, probes, kept, closure=closure)

    def across(axis, x):
        return jnp.expand_dims(x, [i for i in range(dim) if i != axis])

    def block_sums(axis, y, number, kind, rows):
        row = vectors[axis].rows[kind][number]
        tile, weights = axes[axis].tile, rows[row.number]
        return _block_sums(y, weights, 1 + axis, tile, row.positions)

    def along_first(field, rest, diagonal, kept):
        """Does what :func:`along` does for the first axis, some probes at a time."""

        def step(carry, rows):
            sums, diagonal, kept = carry
            probes = rows[:, 0]
            found, kept = responses(field, rest, probes, kept)
            each = range(len(probes))
            terms = [[across(0, probes[i]) * y[i] for i in each] for y in found]
            diagonal = [
                d + own(field, a, rest * sum(terms[a][1:], terms[a][0]))
                for a, d in enumerate(diagonal)
            ]

            def total(kind, number):
                by_field = []
                for y in found:
                    parts = [
                        block_sums(0, y[i][None], number, kind, rows[i]) for i in each
                    ]
                    by_field.append(sum(parts[1:], parts[0]))
                return jnp.concatenate(by_field)

            parts = [
                {key: total(kind, *key) for key in choices(kind, 0)} for kind in kinds
            ]
            return (jax.tree.map(jnp.add, sums, parts), diagonal, kept), None

        xs, init = vectors[0].table, (zeros(0), diagonal, kept)
        if together == len(xs):
            sums, *others = step(init, xs)[0]
            return _xla.materialize(sums, sums), *others
        xs = xs.reshape(-1, together, *xs.shape[1:])
        return _control_flow.scan(step, init, xs, operands=G.params)[0]

    def along(axis, field, rest, diagonal, kept):
        """Sums over the blocks along the first axes, of the probes of all their colors.

        Args:
          axis: the last of these axes.
          field: the field of the probes.
          rest: the product of the probe's vectors along the other axes.
          diagonal: a list to add to.
          kept: see :func:`responses`.
        """
        if axis == 0:
            return along_first(field, rest, diagonal, kept)

        def step(carry, one):
            sums, diagonal, kept = carry
            rows = _xla.materialize(one, one)
            rest_here = across(axis, rows[0]) * rest
            inner, *others = along(axis - 1, field, rest_here, diagonal, kept)
            parts = [
                {
                    (*key, number): block_sums(
                        axis, inner[kind][tuple(key)], number, kind, rows
                    )
                    for *key, number in choices(kind, axis)
                }
                for kind in kinds
            ]
            return (jax.tree.map(jnp.add, sums, parts), *others), None

        init, table = (zeros(axis), diagonal, kept), vectors[axis].table
        return _control_flow.scan(step, init, table, operands=G.params)[0]

    def zeros(axis):
        """Sums over the blocks along the first axes."""
        shape = [len(arrays), *(x.num_blocks for x in axes[: axis + 1])]
        shape += [x.n for x in axes[axis + 1 :]]
        return [
            {key: jnp.zeros(shape, dtype) for key in choices(kind, axis)}
            for kind in kinds
        ]

    def of_field(carry, field):
        one = jnp.ones((1,) * dim, dtype)
        sums, *others = along(dim - 1, field, one, *carry)
        return tuple(others), sums

    count = len(vectors[0].table)
    together = max(k for k in range(1, _TOGETHER + 1) if count % k == 0)
    empty = _tree.zeros_like(leaves, lambda _: dtype)
    kept = [jnp.stack([x] * together) for x in empty]
    fields = jnp.arange(len(arrays), dtype=jnp.int32)
    (found, _), sums = _control_flow.scan(
        of_field, (empty if diagonal else [], kept), fields, operands=G.params
    )
    stacks = []
    for kind in kinds:
        rows = [x.rows[kind] for x in vectors]
        stacks.append(_color_vectors.arranged(rows, sums[kind]))
    return Responses(stacks, found)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _block_sums(x, weights, axis, tile, positions):
    """Sums x times weights over each tile of an axis, at some positions of a tile."""
    n = x.shape[axis]
    count = -(-n // tile)

    def times(x, weights):
        others = [i for i in range(x.ndim) if i != axis]
        return x * jnp.broadcast_to(jnp.expand_dims(weights, others), x.shape)

    if count == 1:
        return jnp.sum(times(x, weights), axis=axis, keepdims=True)
    if len(positions) > _MAX_SLICES:
        return _tiles.axis_sums(times(x, weights), axis, tile)
    parts = []
    for p in positions:
        part = times(
            jax.lax.slice_in_dim(x, p, n, stride=tile, axis=axis),
            jax.lax.slice_in_dim(weights, p, n, stride=tile),
        )
        if part.shape[axis] < count:  # The last tile is shorter.
            part = jnp.pad(part, [(0, int(i == axis)) for i in range(x.ndim)])
        parts.append(part)
    if not parts:
        return jnp.zeros((*x.shape[:axis], count, *x.shape[axis + 1 :]), x.dtype)
    return sum(parts[1:], parts[0])
