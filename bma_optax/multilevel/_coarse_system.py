"""What the coarse systems of the two-level method have in common.

A coarse system is a run of blocks that see each other. It gathers its part of
N = 1ᵀ G 1 by products, and turns it into a factor with which the coarse correction

    K r = (N^-1 - (Λ n²)^-1) r

of block sums r costs little. There are two kinds with the same methods: all groups with
a dense matrix (_dense), and arrays on one grid whose curvature has a reach (_nested).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax.algebra import _symmetric_power
from bma_optax.multilevel._coloring import Check

# F has a unit diagonal: Λ, a mean of its eigenvalues, is far above this but for noise.
_MIN_LAMBDA = 1e-3


class BlockSums(NamedTuple):
    """The part of N = 1ᵀ G 1 that one system holds."""

    N: Any  # in the system's layout.
    check: Check | None  # of a declared reach.
    evidence: jax.Array  # what the system's ``rounding`` goes by.
    products: jax.Array  # shape (), int32.


class Entries(NamedTuple):
    """The diagonal of G on those arrays where a system finds it."""

    values: dict[int, jax.Array]  # by the position of the array.
    check: Check | None
    products: jax.Array  # shape (), int32.


class Inverted(NamedTuple):
    """The factor of one system of l blocks, and what it says of the curvature."""

    K: Any  # in the system's layout.
    Lambda: jax.Array  # shape (l,): undamped.
    smallest: jax.Array  # shape (): the least eigenvalue of M that is not null.
    floored: jax.Array  # shape (), int32: how many were replaced.


def smoother_mean(s, M_diagonal):
    """Λ = (s - M_ii) / (s - 1), the mean eigenvalue of F beside a block's constant."""
    Lambda = (s - M_diagonal) / np.maximum(s - 1, 1)
    return jnp.where(s == 1, 1, jnp.maximum(Lambda, _MIN_LAMBDA))


def spectrum(eigenvalues, damping, floor, null):
    """The least eigenvalue of M that is not null, and how many were replaced."""
    largest = jnp.max(jnp.abs(eigenvalues), axis=-1, keepdims=True, initial=0)
    resolution = _symmetric_power.resolution(eigenvalues.shape[-1], eigenvalues.dtype)
    null = jnp.maximum(resolution * largest, null)
    known = jnp.where(jnp.abs(eigenvalues) > null, eigenvalues, jnp.inf)
    floored = eigenvalues + damping < jnp.maximum(floor, null)
    return jnp.min(known, initial=jnp.inf), jnp.sum(floored, dtype=jnp.int32)
