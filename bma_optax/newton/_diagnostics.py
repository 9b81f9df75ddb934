"""Numbers for a logger, from the state of Newton-BMA.

They are the extreme eigenvalues and correlations of M = N / (n nᵀ) of the dense groups,
shape (L, L), and the norms of the update C g over those of the diagonal method.
"""

from typing import Any

import jax
import jax.numpy as jnp

from bma_optax import _tree
from bma_optax.adaptive import _diagnostics
from bma_optax.multilevel._two_level import TwoLevel


def of_newton(state, blocks, grads, estimator):
    """Numbers of M of the dense groups, and of C g if the gradients g are given.

    Args:
      state: a :class:`ScaleByNewtonBMAState` whose trees, N, K and Λ among them, are
        lists of their arrays.
      blocks: the partition.
      grads: a list of arrays like the parameters, or None.
      estimator: not used.
    """
    del estimator  # Newton-BMA has no estimator.
    method, D = TwoLevel(blocks), state.inverse_diagonal
    structure: Any = jax.tree.structure(method.like(jnp.float32))
    N, K, Lambda = structure.unflatten((*state.N, *state.K, *state.Lambda))
    numbers = {}
    if blocks.buckets:
        z2 = method.diagonal(D, Lambda, state.damping)
        numbers = _diagnostics.of_matrices(blocks, method.small_matrices(N, z2))
        if not blocks.grids:  # Those of a grid's last level are counted as well.
            numbers["floored_share"] = state.floored / blocks.num_blocks
    if grads is not None:
        g = _tree.astype(grads, D)
        r = jax.tree.map(jnp.multiply, D, g)
        update = method.apply(D, N, K, g)
        numbers |= _diagnostics.of_updates(blocks, g, r, update)
    return numbers
