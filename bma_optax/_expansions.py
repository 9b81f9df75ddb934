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
