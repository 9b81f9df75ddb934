"""Adam-BMA with its correlations shrunk by their own sampling noise.

An experiment of networks.py in the manner of Ledoit and Wolf (2004), for correlations
Schäfer and Strimmer (2005): nothing to tune.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bma_optax as bma
from bma_optax import _tree
from bma_optax.adaptive import _inverse_root, _moments
from bma_optax.partitions import _build


class State(NamedTuple):
    adam: bma.ScaleByAdamBMAState
    squares: jax.Array  # Decayed squares of the entries of u uᵀ.
    shrinkage: jax.Array  # (): λ of the last step.


def scale_by_shrunk_adam_bma(b1: Any = 0.9, b2: Any = 0.999):
    r"""Adam-BMA with (1 - λ) U_ij in the place of U_ij, i and j not equal.

    With C_ij = U_ij / (v_i v_j) and the variance of a decayed mean of u_i u_j,

        λ = sum_ij Var(C_ij) / sum_ij C_ij², at most 1.
    """
    rule, eps = bma.per_leaf, 1e-8
    plain = bma.scale_by_adam_bma(b1, b2, eps, partition=rule)

    def init(params):
        adam = plain.init(params)
        return State(adam, jnp.zeros_like(adam.U), jnp.zeros_like(adam.U[0, 0]))

    def update(updates, state, params=None):
        blocks = _build.layout(updates, rule, "all")
        # The statistics are the library's; its update is not used.
        _, adam = plain.update(updates, state.adam, params)
        outer = _inverse_root.outer(blocks, blocks.block_sums(updates))
        squares = _moments.decay(jnp.square(outer), state.squares, b2)
        count = adam.count.astype(outer.dtype)
        weight = _moments.bias_correction(adam.count, b2, outer.dtype)
        number = weight**2 * (1 + b2) / (1 - b2) / (1 - b2 ** (2 * count))
        mean = adam.U / weight
        variance = (squares / weight - jnp.square(mean)) / jnp.maximum(number - 1, 1)
        off = ~jnp.eye(len(mean), dtype=bool)
        positive = adam.v > 0
        scale = jnp.where(positive, weight / jnp.where(positive, adam.v, 1) ** 2, 0)
        scale = jnp.where(off, scale[:, None] * scale, 0)
        noise, signal = jnp.sum(scale * variance), jnp.sum(scale * jnp.square(mean))
        shrinkage = jnp.clip(noise / jnp.where(signal > 0, signal, 1), 0, 1)
        U = jnp.where(off, (1 - shrinkage) * adam.U, adam.U)
        root, _ = _inverse_root.inverse_root(
            blocks, U, adam.v, adam.inverse_root, 1e-2, "report"
        )

        def scaled(m, h):
            m = m / _moments.bias_correction(adam.count, b1, m.dtype)
            h = h / _moments.bias_correction(adam.count, b2, h.dtype)
            return _moments.over_root(m, h, eps)

        r = jax.tree.map(scaled, adam.mu, adam.nu)
        shift = _inverse_root.correction(blocks, root, blocks.block_sums(r))
        result = jax.tree.map(jnp.add, r, blocks.expand(shift, r))
        return _tree.astype(result, updates), State(adam, squares, shrinkage)

    return optax.GradientTransformation(init, update)
