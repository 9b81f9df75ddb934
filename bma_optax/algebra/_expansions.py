"""Figure 1 of Lu et al. 2018: expansions of flat vectors, and sums over their blocks.

A partition s = (s_1, ..., s_L) cuts d elements into L consecutive blocks. The expansion
fills block i with the number i; with E the d x L matrix whose column i is 1/√s_i on
block i and 0 elsewhere, the expansion of a vector a is E S^½ a, and the block sums of x
are S^½ Eᵀ x. Sizes are Python integers, known when JAX traces; vectors have shape (d,)
or (..., L), small matrices (..., L, L).
"""

import jax
import jax.numpy as jnp
import numpy as np


def root_outer(sizes, like: jax.Array) -> np.ndarray:
    """Returns √(s_i s_j) in the shape (..., L, L) and the dtype of ``like``."""
    s = np.asarray(sizes)
    outer = np.sqrt(s[..., :, None] * s[..., None, :]).astype(like.dtype)
    return np.broadcast_to(outer, like.shape)


def expand(values: jax.Array, sizes, axis: int = -1) -> jax.Array:
    """Repeats entry i of an axis of L entries s_i times; the axis then has d."""
    # Not ``jnp.repeat``: XLA would compute its running sums, of length d, at compile
    # time, half a minute for d = 500,000.
    block = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    return jnp.take(values, block, axis=axis, mode="clip")


def block_sums(x: jax.Array, sizes: np.ndarray) -> jax.Array:
    """Sums over the blocks of the first axis: shape (d, ...) becomes (L, ...)."""
    block = np.repeat(np.arange(len(sizes)), sizes)
    return jax.ops.segment_sum(x, block, len(sizes), indices_are_sorted=True)


def unit_weights(weights, sizes, dtype) -> jax.Array:
    """Returns the nonzero entries of E as a vector of shape (d,).

    Divides ``weights``, shape (d,), by their norm in each block. None stands for
    constant weights, 1/√s_i in block i.
    """
    if weights is None:
        return jnp.asarray(1 / np.sqrt(np.repeat(sizes, sizes)), dtype)
    d = int(np.sum(sizes))
    if weights.shape != (d,):
        raise ValueError(f"`weights` must have shape ({d},), got {weights.shape}.")
    norms = jnp.sqrt(block_sums(jnp.square(weights), np.asarray(sizes)))
    return (weights / expand(norms, sizes)).astype(dtype)


def check_sizes(sizes) -> tuple[int, ...]:
    """Returns ``sizes`` as Python integers; raises a ValueError if one is not >= 1."""
    sizes = tuple(sizes)
    if not all(isinstance(s, (int, np.integer)) and s > 0 for s in sizes):
        raise ValueError(f"`sizes` must be positive integers, got {sizes}.")
    return tuple(int(s) for s in sizes)


def floating(x) -> jax.Array:
    """Returns ``x`` as a JAX array; raises a TypeError if it is not real floating."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"A real floating array is needed, got dtype {x.dtype}.")
    return x


def diagonal_matrix(values: jax.Array) -> jax.Array:
    """Returns diag(values): shape (..., L) becomes (..., L, L).

    Entries beside the diagonal are 0 even where ``values`` holds NaN or infinity.
    """
    shape = (*values.shape, values.shape[-1])
    identity = jnp.broadcast_to(jnp.eye(shape[-1], dtype=bool), shape)
    return jnp.where(identity, values[..., None], 0)
