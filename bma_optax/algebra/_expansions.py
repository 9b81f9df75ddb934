"""Figure 1's expansions, and sums over blocks, of flat vectors."""

import jax
import jax.numpy as jnp
import numpy as np


def root_outer(sizes, like: jax.Array) -> np.ndarray:
    """√(s_i s_j) in the shape and dtype of ``like``."""
    s = np.asarray(sizes)
    outer = np.sqrt(s[..., :, None] * s[..., None, :]).astype(like.dtype)
    return np.broadcast_to(outer, like.shape)


def expand(values: jax.Array, sizes, axis: int = -1) -> jax.Array:
    total = int(np.sum(sizes))
    return jnp.repeat(values, np.asarray(sizes), axis=axis, total_repeat_length=total)


def block_sums(x: jax.Array, sizes: np.ndarray) -> jax.Array:
    """Sums over consecutive blocks of the first axis."""
    block = np.repeat(np.arange(len(sizes)), sizes)
    return jax.ops.segment_sum(x, block, len(sizes), indices_are_sorted=True)


def unit_weights(weights, sizes, dtype) -> jax.Array:
    """E's columns one after the other: weights over their norm in each block."""
    if weights is None:
        return jnp.asarray(1 / np.sqrt(np.repeat(sizes, sizes)), dtype)
    d = int(np.sum(sizes))
    if weights.shape != (d,):
        raise ValueError(f"`weights` must have shape ({d},), got {weights.shape}.")
    norms = jnp.sqrt(block_sums(jnp.square(weights), np.asarray(sizes)))
    return (weights / expand(norms, sizes)).astype(dtype)


def check_sizes(sizes) -> tuple[int, ...]:
    sizes = tuple(sizes)
    if not all(isinstance(s, (int, np.integer)) and s > 0 for s in sizes):
        raise ValueError(f"`sizes` must be positive integers, got {sizes}.")
    return tuple(int(s) for s in sizes)


def floating(x) -> jax.Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"A real floating array is needed, got dtype {x.dtype}.")
    return x


def diagonal_matrix(values: jax.Array) -> jax.Array:
    """Shape (..., L, L); zero beside the diagonal whatever is on it."""
    shape = (*values.shape, values.shape[-1])
    identity = jnp.broadcast_to(jnp.eye(shape[-1], dtype=bool), shape)
    return jnp.where(identity, values[..., None], 0)
