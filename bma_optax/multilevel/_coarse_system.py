"""What the coarse systems of the two-level method have in common.

A coarse system is a run of l blocks that see each other. It gathers its part of
N = 1ᵀ G 1, l x l, by products. It then computes a factor with which the coarse
correction of block sums r costs little:

    K r = (N^-1 - (Λ n²)^-1) r.

n² are the block sums of z², or, with slopes, small matrices. There are two kinds, with
the same methods. ``_dense`` serves all groups with a dense matrix; its numbers of
blocks have the shape (l,). ``_nested`` serves the arrays on one grid whose curvature
has a reach; its numbers of blocks have the shape of the grid, (fields, *grid). A system
that ``has_diagonal`` gives the diagonal of G together with N. The others are measured
once the diagonal is known, and are given n².
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax.algebra import _symmetric_power
from bma_optax.multilevel._local_entries import Check

# F has a unit diagonal, so Λ, a mean of its eigenvalues, is far above this floor. Only
# noise brings it below.
_MIN_LAMBDA = 1e-3
_MOST_SAMPLES = 1000


class Measured(NamedTuple):
    """The measurements of G that one system makes."""

    N: Any  # the part of 1ᵀ G 1 that the system holds, in its layout.
    diagonal: dict[int, jax.Array]  # of G, by the position of the array, where found.
    check: Check | None  # of a declared reach; None without one.
    evidence: Any  # an argument of the system's ``rounding``.
    products: jax.Array  # shape (), int32.


class Inverted(NamedTuple):
    """The factor of one system of l blocks, and what it shows of the curvature."""

    K: Any  # in the system's layout.
    Lambda: jax.Array  # undamped, a number for each block.
    smallest: jax.Array  # shape (): the least eigenvalue of M that is not null.
    floored: jax.Array  # shape (), int32: how many eigenvalues were replaced.


def smoother_mean(s, trace, rank=1):
    """Λ = (s - trace) / (s - rank), the mean eigenvalue of F on a block beside M's.

    Args:
      s: the numbers of elements of the blocks. Λ is 1 where s is the rank.
      trace: that of M within each block, in the shape of s: M_ii for one column.
      rank: the number of columns of each block.
    """
    Lambda = (s - trace) / np.maximum(s - rank, 1)
    return jnp.where(s == rank, 1, jnp.maximum(Lambda, _MIN_LAMBDA))


def spectrum(eigenvalues, damping, floor, null):
    """The least eigenvalue of M that is not null, and how many are replaced.

    Args:
      eigenvalues: of M, shape (..., n).
      damping, floor: numbers; eigenvalues + damping below the floor are replaced.
      null: eigenvalues that are no larger in magnitude count as null.
    """
    largest = jnp.max(jnp.abs(eigenvalues), axis=-1, keepdims=True, initial=0)
    resolution = _symmetric_power.resolution(eigenvalues.shape[-1], eigenvalues.dtype)
    null = jnp.maximum(resolution * largest, null)
    known = jnp.where(jnp.abs(eigenvalues) > null, eigenvalues, jnp.inf)
    floored = eigenvalues + damping < jnp.maximum(floor, null)
    return jnp.min(known, initial=jnp.inf), jnp.sum(floored, dtype=jnp.int32)


def sample(values):
    """At most about a thousand of the values, evenly spaced along each axis.

    A sort of all of them would cost as much as everything else. A power of 2 often
    divides what a device has of an axis: the devices then move the samples alone.
    """
    step = 1
    while math.prod(-(-n // step) for n in values.shape) > _MOST_SAMPLES:
        step *= 2
    axes = [slice(None, None, step)] * values.ndim
    return values[tuple(axes)].reshape(-1)


def median(values):
    """The median of numbers, shape (n,); NaN counts as the largest.

    ``jnp.median`` also looks for NaN and interpolates: six kernels more to compile.
    """
    ordered, n = jnp.sort(values), len(values)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
