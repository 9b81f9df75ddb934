"""The inverse of a block mean of curvature, eq. (3): from N and diag G to C.

With z² = |diag G| and F = Z^-1 G Z^-1, E is weighted by z so that constants are
represented: Z^-1 E is then the indicator of each block over ‖z‖ there, and

    M = Eᵀ F E = N / (n nᵀ),   n_i² = Σ_block z²,   Λ_i = (s_i - M_ii) / (s_i - 1),
    C = Z^-1 [Λ̄^-1 (I - P) + E M^-1 Eᵀ] Z^-1 = (Λ̄ z²)^-1 + 1 K 1ᵀ

where 1 are the indicators and K = (M^-1 - Λ^-1) / (n nᵀ).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bma_optax import _tree
from bma_optax.multilevel import _coarse_systems


class Inverse(NamedTuple):
    """C = diag(inverse_diagonal) + 1 K 1ᵀ, and what it says of the curvature."""

    inverse_diagonal: Any  # like params: 1 / (Λ̄ z²), Λ damped.
    Lambda: jax.Array  # (L,): Λ + damping.
    # One vector, of all systems one after the other: as Optax's placeholder for params
    # has no arrays, a state may not hold a number of arrays that depends on them.
    K: jax.Array
    coarse_ratio: jax.Array  # (): min eig(M) / median(Λ), undamped.
    floored: jax.Array  # (), int32: eigenvalues of M negative or below the floor.


def shapes(systems):
    """The shapes of N and of K: a matrix if there is just one."""
    if len(systems) == 1 and isinstance(systems[0], _coarse_systems.Dense):
        (system,) = systems
        if system.count == 1:
            return (system.n, system.n), (system.n, system.n)
    N_size = sum(system.N_size for system in systems)
    return (N_size,), (sum(system.K_size for system in systems),)


def identity(systems, blocks, params) -> Inverse:
    """C = I, for a damping of 0."""
    ones = jax.tree.map(
        lambda p: jnp.ones_like(p, dtype=_tree.statistic_dtype(p)), params
    )
    zeros = 0 * blocks.block_sums(ones)
    zero = jnp.sum(zeros)
    K = zero + jnp.zeros(shapes(systems)[1], zero.dtype)
    return Inverse(ones, zeros + 1, K, zero + 1, zero.astype("int32"))


def invert(
    systems, blocks, N, diagonal, rounding, damping, min_eigenvalue, local
) -> Inverse:
    """The inverse of the block mean of G + damping · Z², positive definite.

    Absolute eigenvalues of M + damping I, at least ``min_eigenvalue`` and ``damping``,
    stand in the place of its eigenvalues; along directions in which they are no larger
    than ``rounding``, one number a system, there is the diagonal alone. So there is
    everywhere where G is not ``local`` as declared.
    """
    z2 = positive(blocks, diagonal)
    n2 = blocks.block_sums(z2)
    damping = jnp.asarray(damping).astype(n2.dtype)
    floor = jnp.maximum(jnp.asarray(min_eigenvalue).astype(n2.dtype), damping)
    factors = [
        system.invert(part, _coarse_systems.take(system, n2), damping, floor, this)
        for system, part, this in zip(
            systems,
            _coarse_systems.split(systems, N, lambda system: system.N_size),
            rounding,
            strict=True,
        )
    ]
    unit = identity(systems, blocks, diagonal)
    Lambda, K, ratio, count = unit[1:]
    if factors:
        Lambda = 1 / _coarse_systems.assemble(
            systems, [f.inverse_Lambda for f in factors], n2
        )
        Lambda = jnp.where(local, Lambda, 1 + damping)
        K = jnp.concatenate([f.K for f in factors]).reshape(unit.K.shape)
        K = jnp.where(local, K, 0)
        smallest = jnp.min(jnp.stack([f.smallest for f in factors]))
        Lambdas = jnp.concatenate([f.Lambda for f in factors])
        # A sort of all would cost as much as the rest.
        median = jnp.median(Lambdas[:: 1 + len(Lambdas) // 1000])
        # Where every direction is null there is nothing to correct.
        ratio = jnp.where(jnp.isinf(smallest), 1, smallest / median)
        count = jnp.sum(jnp.stack([f.floored for f in factors]), dtype=jnp.int32)
    scale = blocks.expand(1 / Lambda, z2, default=1 / (1 + damping))
    inverse_diagonal = jax.tree.map(jnp.divide, scale, z2)
    return Inverse(inverse_diagonal, Lambda, K, ratio, count)


def diagonal_of(blocks, inverse_diagonal, Lambda, damping):
    """The z² that an inverse was made of."""
    scale = blocks.expand(1 / Lambda, inverse_diagonal, default=1 / (1 + damping))
    return jax.tree.map(jnp.divide, scale, inverse_diagonal)


def apply(systems, blocks, inverse_diagonal, K, g):
    """C g, in the dtypes of statistics."""
    g = _tree.astype(g, inverse_diagonal)
    shift = blocks.expand(correct(systems, K, blocks.block_sums(g)), g)
    return jax.tree.map(lambda d, g, c: d * g + c, inverse_diagonal, g, shift)


def correct(systems, K, sums):
    """K times a vector over blocks."""
    parts = [
        system.correct(part, _coarse_systems.take(system, sums))
        for system, part in zip(
            systems,
            _coarse_systems.split(systems, K, lambda system: system.K_size),
            strict=True,
        )
    ]
    return _coarse_systems.assemble(systems, parts, sums)


def positive(blocks, diagonal):
    """z²: |diag G|, and for an element without curvature that of its neighbours.

    That is the mean over its block, else the largest number of its array, else 1. No
    floor: one that is relative to other elements would couple their units.
    """
    tiny = {x.dtype: float(jnp.finfo(x.dtype).tiny) for x in jax.tree.leaves(diagonal)}
    z2 = jax.tree.map(lambda x: jnp.where(x <= tiny[x.dtype], 0, x), diagonal)
    sums = blocks.block_sums(z2)
    means = blocks.expand(sums / jnp.asarray(blocks.sizes, sums.dtype), z2)

    def fill(x, mean):
        largest = jnp.max(x, initial=0)
        other = jnp.where(mean == 0, jnp.where(largest == 0, 1, largest), mean)
        # What is not a number stays.
        return jnp.where(x == 0, _tree.typed_like(other, x), x)

    return jax.tree.map(fill, z2, means)
