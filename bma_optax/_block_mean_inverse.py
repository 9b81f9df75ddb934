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
import numpy as np

from bma_optax import _spectral, _trees
from bma_optax._block_mean_matrix import BlockMeanMatrix

# F has a unit diagonal: Λ, a mean of its eigenvalues, is far above this but for noise.
_MIN_LAMBDA = 1e-3


class Inverse(NamedTuple):
    """C = diag(inverse_diagonal) + 1 K 1ᵀ, and what it says of the curvature."""

    inverse_diagonal: Any  # like params: 1 / (Λ̄ z²), Λ damped.
    Lambda: jax.Array  # (L,): Λ + damping.
    K: jax.Array  # the partition's matrix_shape.
    coarse_ratio: jax.Array  # (): min eig(M) / median(Λ), undamped.
    floored: jax.Array  # (), int32: eigenvalues of M negative or below the floor.


def identity(blocks, params) -> Inverse:
    """C = I, for a damping of 0."""
    ones = jax.tree.map(
        lambda p: jnp.ones_like(p, dtype=_trees.statistic_dtype(p)), params
    )
    zeros = 0 * blocks.block_sums(ones)
    zero = jnp.sum(zeros)
    return Inverse(ones, zeros + 1, blocks.outer(zeros), zero + 1, zero.astype("int32"))


def invert(blocks, N, diagonal, damping, min_eigenvalue) -> Inverse:
    """The inverse of the block mean of G + damping · Z², positive definite.

    Absolute eigenvalues of M + damping I, at least ``min_eigenvalue``, ``damping`` and
    what the dtype resolves, stand in the place of its eigenvalues.
    """
    z2 = _positive(diagonal)
    n2 = blocks.block_sums(z2)
    damping = jnp.asarray(damping).astype(n2.dtype)
    floor = jnp.maximum(jnp.asarray(min_eigenvalue).astype(n2.dtype), damping)
    groups = [
        _invert_group(*group, damping, floor)
        for group in zip(
            blocks.split_matrix(N), blocks.split(n2), blocks.split_sizes(), strict=True
        )
    ]
    if groups:
        Ks, inverse_Lambdas, Lambdas, smallest, floored = zip(*groups, strict=True)
        Lambda = 1 / blocks.join(list(inverse_Lambdas), n2.shape, n2.dtype)
        median = jnp.median(blocks.join(list(Lambdas), n2.shape, n2.dtype))
        ratio = jnp.min(jnp.stack(smallest)) / median
        K, count = blocks.join(list(Ks), N.shape, N.dtype), sum(floored)
    else:
        _, Lambda, K, ratio, count = identity(blocks, diagonal)
    scale = blocks.expand(1 / Lambda, z2, default=1 / (1 + damping))
    inverse_diagonal = jax.tree.map(jnp.divide, scale, z2)
    return Inverse(inverse_diagonal, Lambda, K, ratio, count)


def _invert_group(N, n2, sizes, damping, floor):
    root = jnp.sqrt(n2)
    outer = root[:, :, None] * root[:, None, :]
    M = N / outer
    s = np.asarray(sizes).astype(n2.dtype)
    Lambda = (s - jnp.diagonal(M, axis1=1, axis2=2)) / np.maximum(s - 1, 1)
    Lambda = jnp.where(s == 1, 1, jnp.maximum(Lambda, _MIN_LAMBDA))
    eye = jnp.broadcast_to(jnp.eye(M.shape[-1], dtype=M.dtype), M.shape)
    mean = BlockMeanMatrix(Lambda + damping, M + damping * eye, sizes)
    inverse = mean.power(-1, min_eigenvalue=floor, absolute=True)
    eigenvalues = jnp.linalg.eigvalsh(jax.lax.stop_gradient(M)) + damping
    resolved = _spectral.resolution(M.shape[-1], M.dtype) * jnp.max(
        jnp.abs(eigenvalues)
    )
    floored = jnp.sum(eigenvalues < jnp.maximum(floor, resolved), dtype=jnp.int32)
    smallest = jnp.min(eigenvalues) - damping
    return inverse.correction / outer, inverse.Lambda, Lambda, smallest, floored


def diagonal_of(blocks, inverse_diagonal, Lambda, damping):
    """The z² that an inverse was made of."""
    scale = blocks.expand(1 / Lambda, inverse_diagonal, default=1 / (1 + damping))
    return jax.tree.map(jnp.divide, scale, inverse_diagonal)


def apply(blocks, inverse_diagonal, K, g):
    """C g, in the dtypes of statistics."""
    g = jax.tree.map(lambda g, d: g.astype(d.dtype), g, inverse_diagonal)
    shift = blocks.expand(blocks.matvec(K, blocks.block_sums(g)), g)
    return jax.tree.map(lambda d, g, c: d * g + c, inverse_diagonal, g, shift)


def _positive(diagonal):
    """Entries at least what float32 resolves beside the largest; 1 if all are 0."""
    dtype = _trees.common_statistic_dtype(diagonal)
    largest = jnp.zeros((), dtype)
    for x in jax.tree.leaves(diagonal):
        largest = jnp.maximum(largest, jnp.max(x, initial=0).astype(dtype))
    least = jnp.where(largest > 0, largest * float(jnp.finfo("float32").eps), 1)
    return jax.tree.map(lambda x: jnp.maximum(x, least.astype(x.dtype)), diagonal)
