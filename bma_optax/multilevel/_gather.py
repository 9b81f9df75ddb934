"""What Newton-BMA gathers of a curvature: N, the diagonal, and whether it is local."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _alarm, _control_flow, _tree
from bma_optax.curvature import _probing
from bma_optax.multilevel import _coarse_systems, _coloring, _diagonal, _two_level
from bma_optax.partitions import _build


def plan(params, rule, warn=False):
    """The partition of parameters and its coarse systems; static."""
    blocks = (_build.partition if warn else _build.layout)(params, rule)
    return blocks, _coarse_systems.systems(blocks)


class Gathered(NamedTuple):
    """What a refresh finds of a curvature."""

    N: jax.Array  # of all systems.
    diagonal: Any  # like params: |diag G|.
    rounding: tuple[jax.Array, ...]  # of M, one a system, shape ().
    local: jax.Array  # shape (), bool: whether G reaches no further than declared.
    products: jax.Array  # shape (), int32.


def gather(
    curvature, systems, blocks, product, params, key, extra_args, known=False
) -> Gathered:
    """N of all systems, |diag G|, and whether a declared reach is true.

    Where it is not, ``update`` raises or, traced, warns, unless that is ``known``. The
    diagonal is then one for which the reach does not matter.
    """
    key_N, key_diagonal, key_rounding = jax.random.split(key, 3)
    product = _probing.typed(product, params)
    dense, products = _dense_sums(systems, product, blocks, params)
    found = _nested_sums(systems, product, blocks, params, key_N)
    checks = {number: sums.check for number, sums in found.items()}
    products = sum((sums.products for sums in found.values()), start=products)
    N = _in_order(systems, dense, found, params)
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
        reaches_far = ~local & _tree.all_finite(N) & ~jnp.asarray(known)
        _alarm.alarm(reaches_far, _message, *check)

        def fall_back():
            found, spent = _diagonal.without_a_reach(
                curvature, product, params, key_diagonal, extra_args
            )
            return found, products + spent

        diagonal, products = _control_flow.cond(
            local, lambda: (diagonal, products), fall_back
        )
    diagonal = jax.tree.map(jnp.abs, diagonal)
    eps = float(jnp.finfo(N.dtype).eps)
    rounding = [jnp.asarray(eps, N.dtype)] * len(systems)
    if dense.size:
        this = _rounding(
            systems, product, blocks, dense, diagonal, params, key_rounding
        )
        products = products + _COMBINATIONS
        rounding = [jnp.maximum(this, 4 * eps)] * len(systems)
    for number, sums in found.items():
        # That of many entries, whose sum is one of M at the last level.
        share = systems[number].levels.share ** 0.5
        rounding[number] = jnp.maximum(sums.rounding.astype(N.dtype), eps) * share
    return Gathered(N, diagonal, tuple(rounding), local, products)


def _dense_positions(systems):
    """The blocks of dense systems, in the order of these."""
    spans = [
        np.arange(a, b)
        for system in systems
        if isinstance(system, _coarse_systems.Dense)
        for a, b in system.spans
    ]
    return np.concatenate([np.zeros(0, int), *spans])


def _dense_sums(systems, product, blocks, params):
    """N between all blocks of dense systems, and the products."""
    positions = _dense_positions(systems)
    if not positions.size:
        dtype = _tree.common_statistic_dtype(params)
        return jnp.zeros((0, 0), dtype), jnp.int32(0)
    full = _probing.block_products(product, blocks, params, positions)
    return full, jnp.int32(len(positions))


def _nested_sums(systems, product, blocks, params, key):
    """What :func:`_coloring.block_sums` finds, by the position of the system."""
    return {
        number: _coloring.block_sums(
            product,
            params,
            system.arrays,
            blocks.arrays[system.arrays[0]],
            system.tiles,
            jax.random.fold_in(key, number),
        )
        for number, system in enumerate(systems)
        if isinstance(system, _coarse_systems.Nested)
    }


def _in_order(systems, dense, found, params):
    """N of all systems one after the other."""
    dtype = _tree.common_statistic_dtype(params)
    parts, row = [jnp.zeros(0, dtype)], 0
    for number, system in enumerate(systems):
        if number in found:
            parts.append(found[number].S.reshape(-1).astype(dtype))
            continue
        c, n = system.count, system.n
        square = dense[row : row + c * n, row : row + c * n].reshape(c, n, c, n)
        parts.append(jnp.einsum("gigj->gij", square).reshape(-1))
        row += c * n
    return jnp.concatenate(parts)


def _rounding(systems, product, blocks, dense, diagonal, params, key):
    """How far rounding moves eigenvalues of M = N / (n nᵀ), shape ().

    A product with a random combination of blocks differs from that combination of
    their products by the rounding of the arithmetic that was done, whatever its dtype.
    The largest of a few: of a single block one may be small by chance.
    """
    positions = _dense_positions(systems)
    n = jnp.sqrt(blocks.block_sums(_two_level.positive(blocks, diagonal)))
    mine = np.isin(np.arange(blocks.num_blocks), positions)
    least = jnp.min(n, initial=jnp.inf, where=mine)  # The vectors are of size 1.

    def difference(weights):
        t = jnp.where(mine, weights * least / n, 0)
        vector = _probing.typed_vector(blocks.expand(t, params), params)
        image = blocks.block_sums(product(vector))[positions]
        expected = jnp.matmul(dense, t[positions], precision=jax.lax.Precision.HIGHEST)
        return (image - expected) / (least * n[positions])

    weights = jax.random.uniform(
        key, (_COMBINATIONS, *n.shape), n.dtype, minval=0.5, maxval=1.5
    )
    found = _probing.batched(difference, (weights,), params)
    return 8 * jnp.max(jnp.abs(jax.lax.stop_gradient(found)), initial=0)


_COMBINATIONS = 4


def _message(error, tolerance) -> str:
    return (
        "The curvature reaches further than `reach` declares: a product with it is "
        f"{float(error):.1e} from what that reach foretells, relative, where rounding "
        f"explains {float(tolerance):.1e}. Pass a larger `reach`, or None. Under "
        "jax.jit the diagonal alone is used, and `local` in bma.diagnostics is False."
    )
