"""The metric z² of the smoother: the diagonal of G without signs and without zeros.

    C = (Λ̄ z²)^-1 + 1 K 1ᵀ

z² is a tree like the parameters. Each element of it is positive, or not a number.
"""

import jax
import jax.numpy as jnp

from bma_optax import _control_flow, _sharding, _xla


def positive(method, diagonal):
    """Returns z²: |diag G|, with another number where an element has no curvature.

    That number is the mean of z² over the element's block, or the largest z² of its
    array, or 1, whichever is the first that is not 0. There is no floor relative to
    other elements, because a floor would couple the units of arrays.

    Args:
      method: the two-level method, for means over blocks.
      diagonal: |diag G|, a tree like the parameters.
    """
    tiny = {x.dtype: float(jnp.finfo(x.dtype).tiny) for x in jax.tree.leaves(diagonal)}

    def filled(diagonal):
        z2 = jax.tree.map(lambda x: jnp.where(x <= tiny[x.dtype], 0, x), diagonal)
        sums = zip(method.block_sums(z2), method.sizes, strict=True)
        means = method.expand([x / s.astype(x.dtype) for x, s in sums], z2)

        def fill(x, mean):
            largest = jnp.max(x, initial=0)
            other = jnp.where(mean == 0, jnp.where(largest == 0, 1, largest), mean)
            # NaN stays NaN.
            return jnp.where(x == 0, _sharding.typed_like(other, x), x)

        return jax.tree.map(fill, z2, means)

    def where_needed(on_demand, diagonal):
        """Fills at once off the CPU, where XLA fuses all of it into other passes."""
        if not on_demand:
            return filled(diagonal)
        curved = [
            jnp.all(jnp.min(x, initial=jnp.inf) > tiny[x.dtype])
            for x in jax.tree.leaves(diagonal)
        ]
        return _control_flow.renewed(~jnp.all(jnp.stack(curved)), filled, diagonal)

    if not jax.tree.leaves(diagonal):
        return diagonal
    return _xla.by_platform(where_needed, True, False, diagonal)
