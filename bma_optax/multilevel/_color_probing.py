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

from bma_optax import _control_flow, _sharding, _tree, _xla
from bma_optax.curvature._probing import LinearOperator
from bma_optax.multilevel import _color_vectors
from bma_optax.partitions import _tiles

_MAX_SLICES = 16
_TOGETHER = 4  # Products in a round of a loop.


class Responses(NamedTuple):
    """What the products with all probes give."""

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
                        inner[kind][tuple(key)],
                        rows[kind][number],
                        1 + axis,
                        axes[axis].tile,
                        vectors[axis].rows[kind][number].positions,
                    )
                    for *key, number in choices(kind, axis)
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
        zeros = [
            {key: jnp.zeros(shape, dtype) for key in choices(kind, axis)}
            for kind in kinds
        ]

        def loop(together, init, xs):
            return _control_flow.scan(
                step, init, xs, operands=G.params, unroll=together
            )[0]

        init = zeros, diagonal
        if axis == 0 and _control_flow.is_traced(G.params):
            return _xla.by_platform(loop, 1, _TOGETHER, init, xs)
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
        rows = [x.rows[kind] for x in vectors]
        stacks.append(_color_vectors.arranged(rows, sums[kind]))
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
