"""What Newton-BMA gathers of a curvature: N, the diagonal, and whether it is local."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import (
    _alarm,
    _coarse,
    _coloring,
    _diagonal,
    _flow,
    _layout,
    _probes,
    _sizes,
    _trees,
)


def plan(params, rule, couple, reach, levels, warn=False):
    """The partition of parameters and its coarse systems; static."""
    blocks = _layout.layout(params, rule, couple)
    if warn:
        _layout.warn_of_guesses(blocks)
        _sizes.check_dense(blocks, reach is not None)
    systems = _coarse.systems(blocks, reach, levels)
    if warn:
        _sizes.check_nested(systems, blocks)
    return blocks, systems


class Gathered(NamedTuple):
    """What a refresh finds of a curvature."""

    N: jax.Array  # of all systems.
    diagonal: Any  # like params: |diag G|.
    local: jax.Array  # shape (), bool: whether G reaches no further than declared.
    products: jax.Array  # shape (), int32.


def gather(
    curvature, systems, blocks, product, params, key, extra_args, known=False
) -> Gathered:
    """N of all systems, |diag G|, and whether a declared reach is true.

    Where it is not, ``update`` raises or, traced, warns, unless that is ``known``. The
    diagonal is then one for which the reach does not matter.
    """
    key_N, key_diagonal = jax.random.split(key)
    product = _probes.typed(product, params)
    N, checks, products = _sums(systems, product, blocks, params, key_N)
    diagonal, checks, more = _diagonal.diagonal(
        curvature,
        systems,
        product,
        blocks,
        N,
        checks,
        params,
        key_diagonal,
        extra_args,
    )
    products = products + more
    local = jnp.asarray(True)
    if checks:
        check = _coloring.worst(checks)
        local = check.error <= check.tolerance
        # What is not finite is a failure of the curvature, not of its reach.
        reaches_far = ~local & _trees.all_finite(N) & ~jnp.asarray(known)
        _alarm.alarm(reaches_far, _message, *check)

        def fall_back():
            found, spent = _diagonal.without_a_reach(
                curvature, product, params, key_diagonal, extra_args
            )
            return found, products + spent

        diagonal, products = _flow.cond(local, lambda: (diagonal, products), fall_back)
    return Gathered(N, jax.tree.map(jnp.abs, diagonal), local, products)


def _sums(systems, product, blocks, params, key):
    """N of all systems one after the other, the checks of their reach, the products.

    Returns:
      ``(N, checks, products)``: ``checks`` by the position of the system.
    """
    dtype = _trees.common_statistic_dtype(params)
    parts, checks, products = [jnp.zeros(0, dtype)], {}, jnp.int32(0)
    dense = [system for system in systems if isinstance(system, _coarse.Dense)]
    if dense:
        positions = [np.arange(a, b) for system in dense for a, b in system.spans]
        full = _probes.block_products(
            product, blocks, params, np.concatenate(positions)
        )
        products = products + sum(map(len, positions))
        row = 0
        for system in dense:
            c, n = system.count, system.n
            square = full[row : row + c * n, row : row + c * n].reshape(c, n, c, n)
            parts.append(jnp.einsum("gigj->gij", square).reshape(-1))
            row += c * n
    for number, system in enumerate(systems):
        if isinstance(system, _coarse.Nested):
            S, checks[number], spent = _coloring.block_sums(
                product,
                params,
                system.arrays,
                blocks.arrays[system.arrays[0]],
                system.tiles,
                jax.random.fold_in(key, number),
            )
            parts.append(S.reshape(-1).astype(dtype))
            products = products + spent
    return jnp.concatenate(parts), checks, products


def _message(error, tolerance) -> str:
    return (
        "The curvature reaches further than `reach` declares: a product with it is "
        f"{float(error):.1e} from what that reach foretells, relative, where rounding "
        f"explains {float(tolerance):.1e}. Pass a larger `reach`, or None. Under "
        "jax.jit the diagonal alone is used, and `local` in bma.diagnostics is False."
    )
