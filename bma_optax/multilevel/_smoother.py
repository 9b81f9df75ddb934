"""z², the metric of the smoother: the diagonal of G without zeros or signs."""

import jax
import jax.numpy as jnp

from bma_optax import _sharding


def positive(blocks, diagonal):
    """z²: |diag G|, and for an element without curvature that of its neighbours.

    That is the mean over its block, else the largest number of its array, else 1. No
    floor: one that is relative to other elements would couple their units.
    """
    tiny = {x.dtype: float(jnp.finfo(x.dtype).tiny) for x in jax.tree.leaves(diagonal)}
    z2 = jax.tree.map(lambda x: jnp.where(x <= tiny[x.dtype], 0, x), diagonal)
    sums = blocks.block_sums(z2)
    means = blocks.expand(sums / jnp.asarray(blocks.sizes, sums.dtype), z2)

    def fill(x, mean):
        largest = jnp.max(x, initial=0)
        other = jnp.where(mean == 0, jnp.where(largest == 0, 1, largest), mean)
        # What is not a number stays.
        return jnp.where(x == 0, _sharding.typed_like(other, x), x)

    return jax.tree.map(fill, z2, means)
