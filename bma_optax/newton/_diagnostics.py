"""What the state of Newton-BMA shows of its small matrices and of its update."""

from typing import Any

import jax
import jax.numpy as jnp

from bma_optax import _tree
from bma_optax.adaptive import _diagnostics
from bma_optax.multilevel._two_level import TwoLevel


def of_newton(state, blocks, grads, estimator):
    """Numbers of M where all groups are dense, and of C g with the gradients g.

    The state's trees, N and K among them, are lists of their arrays.
    """
    del estimator  # Curvature has none.
    method, D = TwoLevel(blocks), state.inverse_diagonal
    structure: Any = jax.tree.structure(method.like(jnp.float32))
    N, K = structure.unflatten((*state.N, *state.K))
    numbers = {}
    if blocks.num_blocks and not blocks.grids:
        z2 = method.diagonal(D, state.Lambda, state.damping)
        numbers = _diagnostics.of_matrices(blocks, method.small_matrices(N, z2))
        numbers["floored_share"] = state.floored / blocks.num_blocks
    if grads is not None:
        g = _tree.astype(grads, D)
        r = jax.tree.map(jnp.multiply, D, g)
        update = method.apply(D, N, K, g)
        numbers |= _diagnostics.of_updates(blocks, g, r, update)
    return numbers


def fits(state, blocks) -> bool:
    """Whether N and K of a state are those of a partition."""
    found, expected = (
        [x.shape for x in jax.tree.leaves(tree)]
        for tree in ((state.N, state.K), TwoLevel(blocks).like(jnp.float32))
    )
    return found == expected
