"""The small matrix of block sums, its inverse root, and the correction of the update.

For one group of L blocks of s_i elements, let u be the block sums of a gradient, U the
sum of u uᵀ over steps, v the block sums of h^½ with eps added in quadrature, and
S = diag(s). The two estimators of the small matrix M, shape (L, L), are

    M = I + (U - diag U) / (v vᵀ)      "report": Lu et al. 2018, slide "AdaGrad-BMA"
    M = S^½ U / (v vᵀ) S^½             "projection": their eq. 2, of Z^-1 H Z^-1

An ``eigh`` gives M^-½. A block that is alone in its group has L = 1: its M is 1 with
"report", which leaves the diagonal method, and s U / v² with "projection". The state
holds vectors of all groups, shape (L,), and their matrices one after the other.
"""

import jax.numpy as jnp

from bma_optax import _xla_sums
from bma_optax.algebra._block_mean_matrix import BlockMeanMatrix
from bma_optax.algebra._expansions import root_outer
from bma_optax.partitions._blocks import Partition

ESTIMATORS = ("report", "projection", None)


def by_bucket(
    estimator: str | None, blocks: Partition, weights: str = "constant"
) -> list[str]:
    """Returns the estimator of the groups of each bucket.

    None stands for "projection" where a block is alone in its group, since the M of
    "report" is 1 there, and for "report" in groups of several. Under a rule that lets
    all blocks see each other it stands for "report", even if there is only one block.
    """
    kinds = [estimator or "report"] * len(blocks.buckets)
    if estimator is None and any(
        array.num_blocks and array.group[:1] != ("all",) for array in blocks.arrays
    ):
        kinds = ["projection" if n == 1 else "report" for _, n in blocks.buckets]
    if weights == "learned" and "report" in kinds:
        raise ValueError(
            '`weights="learned"` needs the estimator "projection": with "report" the '
            "mean of a block has no number of its own. Pass a rule that leaves every "
            'block alone, such as bma.units, or `estimator="projection"`.'
        )
    return kinds


def floor(min_eigenvalue, estimator: str | None):
    """The floor of M's eigenvalues; None stands for 1 with "projection", else 0.3."""
    if min_eigenvalue is None:
        return 1.0 if estimator == "projection" else 0.3
    return min_eigenvalue


def start(blocks, zeros):
    """U, v and M^-½ before the first step.

    They are 0 times the block sums of ``zeros``, a tree like the parameters, plus the
    identity for M^-½. Their types and shardings therefore are those of later steps.
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
    """u uᵀ of each group, for u of shape (L,); not finite entries of u count as 0."""
    return blocks.outer(jnp.where(jnp.isfinite(u), u, 0))


def root_sums(columns, h, eps):
    """v, shape (L,), with v_i² = (Σ W² h^½)² + s_i² eps over each block i.

    The weights W are 1 unless they are learned. Lu et al. have v_i = Σ (h + eps)^½,
    which is the same where a block has one element or one number, and as far as eps is
    small beside h.

    Where blocks are whole arrays eps inside the roots costs time on CPU: an update of
    30 million parameters in 150 arrays took 1.12 and 1.24 times the CPU seconds, and
    with units .96 (medians of two runs on one core, eight rounds in turns, by a script
    that is not committed).

    Args:
      columns: E, see ``_columns``.
      h: diag H, a tree like the parameters.
      eps: a number >= 0.
    """
    v = columns.root_sums(h)
    sizes = jnp.asarray(columns.blocks.sizes, v.dtype)
    return _xla_sums.sqrt(jnp.square(v) + jnp.square(sizes) * jnp.asarray(eps, v.dtype))


def inverse_root(blocks, U, v, last, min_eigenvalue, estimators):
    """M^-½ of each group, and the number of groups in which it failed.

    A group whose M^-½ is not finite keeps the last finite one.

    Args:
      blocks: the partition.
      U: the matrices of the groups.
      v: shape (L,).
      last: M^-½ of the previous refresh, in the shape of U.
      min_eigenvalue: the floor of M's eigenvalues, or None, see :func:`floor`.
      estimators: "report" or "projection" for each bucket, see :func:`by_bucket`.
    """
    roots, failures = [], jnp.zeros((), jnp.int32)
    for U_group, v_group, sizes, last_group, estimator in zip(
        blocks.split_matrix(U),
        blocks.split(v),
        blocks.split_sizes(),
        blocks.split_matrix(last),
        estimators,
        strict=True,
    ):
        M = small_matrix(U_group, v_group, sizes, estimator)
        matrix = BlockMeanMatrix(jnp.ones_like(v_group), M, sizes)
        least = floor(min_eigenvalue, estimator)
        root = matrix.inverse_sqrt(min_eigenvalue=least).M
        finite = jnp.all(jnp.isfinite(root), axis=(-1, -2))
        roots.append(jnp.where(finite[:, None, None], root, last_group))
        failures = failures + jnp.sum(~finite, dtype=jnp.int32)
    return blocks.join(roots, U.shape, U.dtype), failures


def small_matrix(U, v, sizes, estimator):
    """M = I + (U - diag U) / (v vᵀ), or S^½ U / (v vᵀ) S^½, shape (..., L, L).

    A block whose v² or diagonal of U has left the range of the dtype gets the row and
    the column of the identity, which is the diagonal method.

    Args:
      U: shape (..., L, L).
      v: shape (..., L).
      sizes: the numbers of elements of the blocks, nested as v.
      estimator: "report" or "projection".
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

    A block whose sum is not finite neither gives nor gets a correction.
    """
    root_sizes = jnp.sqrt(jnp.asarray(blocks.sizes, inverse_root.dtype))
    means = r_sums / root_sizes
    finite = jnp.isfinite(means)
    safe = jnp.where(finite, means, 0)
    correction = blocks.matvec(inverse_root, safe) - safe
    return jnp.where(finite, correction, 0) / root_sizes
