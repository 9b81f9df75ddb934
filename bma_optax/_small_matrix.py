"""From block sums to the small matrix, its inverse root, and the correction by it."""

import jax.numpy as jnp

from bma_optax._block_mean_matrix import BlockMeanMatrix


def inverse_root(blocks, U, v, last, min_eigenvalue):
    """M^-½ of each group, the last finite one where it fails; and the failures."""
    roots, failures = [], jnp.zeros((), jnp.int32)
    for U_group, v_group, sizes, last_group in zip(
        blocks.split_matrix(U),
        blocks.split(v),
        blocks.split_sizes(),
        blocks.split_matrix(last),
        strict=True,
    ):
        M = _small_matrix(U_group, v_group)
        root = BlockMeanMatrix(jnp.ones_like(v_group), M, sizes).inverse_sqrt(
            min_eigenvalue=min_eigenvalue
        )
        finite = jnp.all(jnp.isfinite(root.M), axis=(-1, -2))
        roots.append(jnp.where(finite[:, None, None], root.M, last_group))
        failures = failures + jnp.sum(~finite, dtype=jnp.int32)
    return blocks.join(roots, U.shape, U.dtype), failures


def _small_matrix(U, v):
    """M = I + (U - diag U) / (v vᵀ), shape (..., L, L).

    Blocks whose numbers have left the dtype's range stay at the diagonal.
    """
    info = jnp.finfo(v.dtype)
    in_range = (jnp.square(v) >= info.tiny) & (jnp.square(v) <= info.max)
    in_range &= jnp.isfinite(jnp.diagonal(U, axis1=-2, axis2=-1))
    divisor = jnp.where(in_range, v, 1)
    both = in_range[..., :, None] & in_range[..., None, :]
    identity = jnp.broadcast_to(jnp.eye(v.shape[-1], dtype=bool), U.shape)
    C = jnp.where(both & ~identity, U, 0) / divisor[..., :, None]
    return C / divisor[..., None, :] + identity.astype(v.dtype)


def correction(blocks, inverse_root, r):
    """S^-½ (M^-½ - I) S^-½ times the block sums of r, shape (L,).

    A block with an update that is not finite neither gives nor takes a correction.
    """
    root_sizes = jnp.sqrt(jnp.asarray(blocks.sizes, inverse_root.dtype))
    means = blocks.block_sums(r) / root_sizes
    finite = jnp.isfinite(means)
    safe = jnp.where(finite, means, 0)
    correction = blocks.matvec(inverse_root, safe) - safe
    return jnp.where(finite, correction, 0) / root_sizes
