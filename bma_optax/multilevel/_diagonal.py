"""The diagonal of G: given, from N, by colors, by units or by random signs."""

import math

import jax
import jax.numpy as jnp

from bma_optax import _tree
from bma_optax.curvature import _probing, _user_functions
from bma_optax.multilevel import _coarse_systems, _coloring


def diagonal(curvature, systems, product, blocks, N, checks, params, key, extra_args):
    """diag G like params, the checks of a declared reach, the products; ``Curvature``.

    Returns:
      ``(diagonal, checks, products)``.
    """
    given = _given(curvature, params, extra_args)
    zeros = _tree.zeros_like(params, _tree.statistic_dtype)
    products = jnp.int32(0)
    if given is not None:
        return given, list(checks.values()), products
    if _is_full(systems, blocks):
        entries = [
            jnp.diagonal(part.reshape(system.count, system.n, -1), axis1=1, axis2=2)
            for system, part in zip(
                systems,
                _coarse_systems.split(systems, N, lambda system: system.N_size),
                strict=True,
            )
        ]
        parts = [part.reshape(-1) for part in entries]
        vector = _coarse_systems.assemble(systems, parts, jnp.zeros(0, N.dtype))
        filled = blocks.expand(vector, zeros)
        return jax.tree.map(jnp.add, filled, zeros), [], products

    leaves, treedef = jax.tree.flatten(zeros)
    made = list(checks.values())
    for number, check in checks.items():
        system = systems[number]
        found, this, spent = _coloring.diagonal(
            product,
            params,
            system.arrays,
            system.elements,
            jax.random.fold_in(key, number),
            check.tolerance,
        )
        made.append(this)
        products = products + spent
        for position, values in zip(system.arrays, found, strict=True):
            leaves[position] = leaves[position] + values
    active, size = _rest(systems, params)
    if size:
        probe, spent = _probed(curvature, product, params, active, size, key)
        leaves = [x + y for x, y in zip(leaves, jax.tree.leaves(probe), strict=True)]
        products = products + spent
    return jax.tree.unflatten(treedef, leaves), made, products


def without_a_reach(curvature, product, params, key, extra_args):
    """diag G whatever its reach, and the products."""
    given = _given(curvature, params, extra_args)
    if given is not None:
        return given, jnp.int32(0)
    leaves = jax.tree.leaves(params)
    active, size = [True] * len(leaves), sum(x.size for x in leaves)
    return _probed(curvature, product, params, active, size, key)


def _given(curvature, params, extra_args):
    """The diagonal that a curvature knows, in the dtypes of statistics, or None."""
    given = curvature.diagonal(params, extra_args)
    if given is None:
        return None
    own = f"{type(curvature).__name__}.diagonal"
    name = own if curvature.diagonal_fn is None else "diagonal_fn"
    return jax.tree.map(
        lambda x, p: jnp.asarray(x, _tree.statistic_dtype(p)),
        _user_functions.like_params(given, params, name),
        params,
    )


def _probed(curvature, product, params, active, size, key):
    """diag G on the active arrays, which have so many elements; and the products."""
    if size <= curvature.num_probes:
        return _probing.by_units(product, params, active), jnp.int32(size)
    n = curvature.num_probes
    return _probing.by_signs(product, params, active, key, n), jnp.int32(n)


def row_sums(systems, product, z2, params, key):
    """Σ_j |F_ij| z_i² like params, for F = Z^-1 G Z^-1 where every array has a reach.

    In units in which the diagonal is 1: those of G may differ by any factor.
    """
    z = jax.tree.map(lambda x, p: jnp.sqrt(x).astype(p.dtype), z2, params)

    def scaled(v):
        y = product(jax.tree.map(jnp.divide, v, z))
        return jax.tree.map(jnp.multiply, z, y)

    leaves, treedef = jax.tree.flatten(params)
    sums = list(leaves)
    for number, system in enumerate(systems):
        if not isinstance(system, _coarse_systems.Nested):
            raise ValueError(
                'cycle="multiplicative" needs a `reach`, and arrays of several tiles.'
            )
        key_system = jax.random.fold_in(key, number)
        found = _coloring.row_sums(
            scaled, params, system.arrays, system.elements, key_system
        )
        for position, values in zip(system.arrays, found, strict=True):
            sums[position] = values
    return jax.tree.unflatten(treedef, sums)


def _rest(systems, params):
    """Which arrays have no reach, and the number of their elements."""
    nested = {
        position
        for system in systems
        if isinstance(system, _coarse_systems.Nested)
        for position in system.arrays
    }
    leaves = jax.tree.leaves(params)
    active = tuple(position not in nested for position in range(len(leaves)))
    return active, sum(x.size for x, on in zip(leaves, active, strict=True) if on)


def _is_full(systems, blocks) -> bool:
    """Whether every element is a block of its own: N is then G."""
    dense = all(isinstance(system, _coarse_systems.Dense) for system in systems)
    return dense and all(
        array.num_blocks == math.prod(array.shape) and array.owner == array.path
        for array in blocks.arrays
    )
