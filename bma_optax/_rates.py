"""The end of a chain, in the dtype of updates: decay, learning rate, largest norm.

Where numbers are arrays, as under ``optax.inject_hyperparams``, Optax's own lets their
dtype decide that of the updates.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bma_optax import _checks, _tree


def scale(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """``optax.scale_by_learning_rate``."""
    _checks.rates(learning_rate=learning_rate)
    if callable(learning_rate):
        return optax.scale_by_learning_rate(learning_rate)

    def update(updates, params):
        del params
        rate = -_checks.plain(learning_rate)
        return jax.tree.map(lambda u: jnp.asarray(rate, u.dtype) * u, updates)

    return optax.stateless(update)


def decay(
    weight_decay: optax.ScalarOrSchedule, mask: Any
) -> optax.GradientTransformation:
    """``optax.add_decayed_weights``; nothing, without parameters, where it is 0.

    Only a number of Python or NumPy can be known to stay 0.
    """
    _checks.rates(weight_decay=weight_decay)
    if _checks.is_zero(weight_decay):
        return optax.identity()
    inner = optax.add_decayed_weights(_checks.plain(weight_decay), mask)
    wide = _in_statistics(inner)

    def update(updates, state, params=None):
        if params is None:
            raise ValueError(
                "`update` needs the parameters where weights decay. Pass "
                "update(grads, state, params)."
            )
        params = _tree.astype(_tree.arrays(params), updates)
        return wide.update(updates, state, params)

    return optax.GradientTransformation(inner.init, update)


def clip(max_norm: jax.typing.ArrayLike) -> optax.GradientTransformation:
    """``optax.clip_by_global_norm``."""
    return _in_statistics(optax.clip_by_global_norm(_checks.plain(max_norm)))


def _in_statistics(inner):
    """``inner`` computed in the dtype of statistics."""

    def wide(tree):
        return jax.tree.map(lambda x: jnp.asarray(x, _tree.statistic_dtype(x)), tree)

    def update(updates, state, params=None):
        result, state = inner.update(wide(updates), state, wide(params))
        return _tree.astype(result, updates), state

    return optax.GradientTransformation(inner.init, update)
