"""The diagonal of G: given, from N, by colors, by units or by random signs."""

import math

import jax
import jax.numpy as jnp

from bma_optax import _coarse, _coloring, _probes, _trees


def diagonal(curvature, systems, product, blocks, N, params, key, extra_args):
    """|diag G| like params, and the error of a declared reach; see ``Curvature``."""
    exact = jnp.zeros((), _trees.common_statistic_dtype(params))
    given = curvature.diagonal(params, extra_args)
    zeros = jax.tree.map(
        lambda p: jnp.zeros_like(p, dtype=_trees.statistic_dtype(p)), params
    )
    if given is not None:
        return jax.tree.map(
            lambda x, z: jnp.abs(x.astype(z.dtype)), given, zeros
        ), exact
    if _is_full(systems, blocks):
        entries = [
            jnp.diagonal(part.reshape(system.count, system.n, -1), axis1=1, axis2=2)
            for system, part in zip(
                systems,
                _coarse.split(systems, N, lambda system: system.N_size),
                strict=True,
            )
        ]
        parts = [part.reshape(-1) for part in entries]
        vector = _coarse.assemble(systems, parts, jnp.zeros(0, N.dtype))
        filled = blocks.expand(vector, zeros)
        return jax.tree.map(lambda x, z: z + jnp.abs(x), filled, zeros), exact

    leaves, treedef = jax.tree.flatten(zeros)
    error = exact
    for number, system in enumerate(systems):
        if isinstance(system, _coarse.Nested):
            found, this = _coloring.diagonal(
                product,
                params,
                system.arrays,
                system.elements,
                jax.random.fold_in(key, number),
            )
            error = jnp.maximum(error, this.astype(error.dtype))
            for position, values in zip(system.arrays, found, strict=True):
                leaves[position] = leaves[position] + values
    active, size = _rest(systems, params)
    if size:
        probe = (
            _probes.by_units(product, params, active)
            if size <= curvature.num_probes
            else _probes.by_signs(product, params, active, key, curvature.num_probes)
        )
        leaves = [x + y for x, y in zip(leaves, jax.tree.leaves(probe), strict=True)]
    return jax.tree.map(jnp.abs, jax.tree.unflatten(treedef, leaves)), error


def row_sums(systems, product, params, key):
    """Σ_j |G_ij| like params, where every array has a reach."""
    leaves, treedef = jax.tree.flatten(params)
    sums = list(leaves)
    for number, system in enumerate(systems):
        if not isinstance(system, _coarse.Nested):
            raise ValueError(
                'cycle="multiplicative" needs a `reach`, and arrays of several tiles.'
            )
        key_system = jax.random.fold_in(key, number)
        found = _coloring.row_sums(
            product, params, system.arrays, system.elements, key_system
        )
        for position, values in zip(system.arrays, found, strict=True):
            sums[position] = values
    return jax.tree.unflatten(treedef, sums)


def num_products(curvature, systems, blocks, params, extra_args) -> int:
    """How many products N and the diagonal cost."""
    given = jax.eval_shape(lambda: curvature.diagonal(params, extra_args)) is not None
    known = given or _is_full(systems, blocks)
    total = 0 if known else min(_rest(systems, params)[1], curvature.num_probes)
    for system in systems:
        if isinstance(system, _coarse.Nested):
            elements = system.elements
            total += system.num_products + 1
            if not known:
                total += 2 * elements.fields * math.prod(elements.apart)
        else:
            total += system.count * system.n
    return total


def _rest(systems, params):
    """Which arrays have no reach, and the number of their elements."""
    nested = {
        position
        for system in systems
        if isinstance(system, _coarse.Nested)
        for position in system.arrays
    }
    leaves = jax.tree.leaves(params)
    active = tuple(position not in nested for position in range(len(leaves)))
    return active, sum(x.size for x, on in zip(leaves, active, strict=True) if on)


def _is_full(systems, blocks) -> bool:
    """Whether every element is a block of its own: N is then G."""
    dense = all(isinstance(system, _coarse.Dense) for system in systems)
    return dense and all(
        array.num_blocks == math.prod(array.shape) and array.owner == array.path
        for array in blocks.arrays
    )
