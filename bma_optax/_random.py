"""Random numbers that are a hash of a key and of positions.

JAX's own generator is a loop of many small kernels, which takes longer to compile than
all else that a probe needs. Here a number is computed where it is used. The hash is the
last step of MurmurHash3, in which every bit of its input changes half of the bits.
"""

import jax
import jax.numpy as jnp
import numpy as np


def fold(key, number):
    """A key, uint32 of shape (2,), from a key and an integer of shape ().

    A static integer becomes a constant array, which a kernel reads as it reads the key.
    All integers then share one kernel.
    """
    static = isinstance(number, int)
    xp = np if static else jnp
    number = xp.asarray(number).astype(xp.uint32)
    # The numbers of two words must differ, or equal words would stay equal.
    odd = xp.arange(1, 3, dtype=xp.uint32) * xp.uint32(0x9E3779B9)
    return _folded(key, mixed(odd + number))


@jax.jit
def _folded(key, number):
    return mixed(key ^ number)


@jax.jit
def bits(key, positions):
    """uint32 in the shape of ``positions``, which are integers."""
    x = positions.astype(jnp.uint32)
    for word in key:
        x = mixed(x ^ word)
    return x


def signs(key, positions, dtype):
    """1 or -1 at each position."""
    return jnp.where(bits(key, positions) >> 31 == 0, 1, -1).astype(dtype)


def uniform(key, positions, dtype):
    """A number at each position, uniform in [0, 1)."""
    x = (bits(key, positions) >> 8).astype(dtype) * 2.0**-24
    if jnp.finfo(dtype).nmant > 24:
        more = bits(fold(key, 0), positions) >> 3
        x = x + more.astype(dtype) * 2.0**-53
    return x


def mixed(x):
    """The hash of each number of x, uint32."""
    for shift, factor in [(16, 0x85EBCA6B), (13, 0xC2B2AE35)]:
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(16))
