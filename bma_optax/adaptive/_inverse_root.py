"""From block sums to the small matrix, its inverse root, and the correction by it."""

import jax.numpy as jnp

from bma_optax import _xla
from bma_optax.algebra._block_mean_matrix import BlockMeanMatrix
from bma_optax.algebra._expansions import root_outer

_ESTIMATORS = ("report", "projection")


def check_estimator(estimator: str) -> None:
    """Raises a ValueError for an unknown ``estimator``."""
    if estimator not in _ESTIMATORS:
        raise ValueError(
            f"`estimator` must be one of {_ESTIMATORS}, got {estimator!r}."
        )


def start(blocks, zeros):
    """U, v and M^-½ before the first step.

    Zeros made from sums over ``zeros`` are typed as later sums are: on their mesh.
    """
    v = 0 * blocks.block_sums(zeros)
    U = blocks.outer(v)
    identity = [
        matrix + jnp.broadcast_to(jnp.eye(n, dtype=v.dtype), (count, n, n))
        for matrix, (count, n) in zip(
            blocks.split_matrix(U), blocks.buckets, strict=True
        )
    ]
    return U, v, blocks.join(identity, U.shape, U.dtype)


def outer(blocks, u):
    """u uᵀ of each group, without the blocks that are not finite."""
    return blocks.outer(jnp.where(jnp.isfinite(u), u, 0))


def damped(blocks, v, eps):
    """v of a diag H with eps added: to the squared block means, not element by element.

    Exact where a block has one element or one number. Σ √(h + eps) would be a pass over
    memory more: XLA on CPU stores the eps that a sum has to add.
    """
    sizes = jnp.asarray(blocks.sizes, v.dtype)
    shift = jnp.square(sizes) * jnp.asarray(eps, v.dtype)
    return _xla.sqrt(jnp.square(v) + shift)


def inverse_root(blocks, U, v, last, min_eigenvalue, estimator):
    """M^-½ of each group, the last finite one where it fails; and the failures."""
    roots, failures = [], jnp.zeros((), jnp.int32)
    for U_group, v_group, sizes, last_group in zip(
        blocks.split_matrix(U),
        blocks.split(v),
        blocks.split_sizes(),
        blocks.split_matrix(last),
        strict=True,
    ):
        M = small_matrix(U_group, v_group, sizes, estimator)
        root = BlockMeanMatrix(jnp.ones_like(v_group), M, sizes).inverse_sqrt(
            min_eigenvalue=min_eigenvalue
        )
        finite = jnp.all(jnp.isfinite(root.M), axis=(-1, -2))
        roots.append(jnp.where(finite[:, None, None], root.M, last_group))
        failures = failures + jnp.sum(~finite, dtype=jnp.int32)
    return blocks.join(roots, U.shape, U.dtype), failures


def small_matrix(U, v, sizes, estimator):
    """M = I + (U - diag U) / (v vᵀ), or S^½ U / (v vᵀ) S^½; shape (..., L, L).

    Blocks whose numbers have left the dtype's range stay at the diagonal.
    """
    info = jnp.finfo(v.dtype)
    in_range = (jnp.square(v) >= info.tiny) & (jnp.square(v) <= info.max)
    in_range &= jnp.isfinite(jnp.diagonal(U, axis1=-2, axis2=-1))
    divisor = jnp.where(in_range, v, 1)
    both = in_range[..., :, None] & in_range[..., None, :]
    identity = jnp.broadcast_to(jnp.eye(v.shape[-1], dtype=bool), U.shape)
    given = both & ~identity if estimator == "report" else both
    C = jnp.where(given, U, 0) / divisor[..., :, None] / divisor[..., None, :]
    if estimator == "projection":
        C = C * root_outer(sizes, C)
    return C + (identity & ~given).astype(v.dtype)


def correction(blocks, inverse_root, r_sums):
    """S^-½ (M^-½ - I) S^-½ times the block sums of r, shape (L,).

    A block whose sum is not finite neither gives nor takes a correction.
    """
    root_sizes = jnp.sqrt(jnp.asarray(blocks.sizes, inverse_root.dtype))
    means = r_sums / root_sizes
    finite = jnp.isfinite(means)
    safe = jnp.where(finite, means, 0)
    correction = blocks.matvec(inverse_root, safe) - safe
    return jnp.where(finite, correction, 0) / root_sizes
