"""The end of an alias's chain: weight decay, learning rate and the largest norm.

    u <- u + λ θ,    u <- -η u,    u <- u min(1, c / ‖u‖)

Each function does what Optax's own does and keeps the dtype of the updates u, trees
like params. Optax's own would return the dtype of the numbers where these are arrays,
as under ``optax.inject_hyperparams``.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bma_optax import _checks, _tree


def scale(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Multiplies updates by -η, as ``optax.scale_by_learning_rate`` does.

    Args:
      learning_rate: η, a number >= 0 or a schedule.
    """
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
    """Adds λ θ to updates, as ``optax.add_decayed_weights`` does.

    If λ is a Python or NumPy number 0, it does nothing and needs no parameters. Other
    values may change later.

    Args:
      weight_decay: λ, a number >= 0 or a schedule.
      mask: a tree of booleans like params, or a function that returns one from params:
        where weights decay; None: everywhere.
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
    """Scales updates down to a norm of at most c, as ``optax.clip_by_global_norm``.

    Args:
      max_norm: c, a number > 0.
    """
    return _in_statistics(optax.clip_by_global_norm(_checks.plain(max_norm)))


def _in_statistics(inner):
    """Returns ``inner`` computed in float32 at least, with updates in their dtype."""

    def wide(tree):
        return jax.tree.map(lambda x: jnp.asarray(x, _tree.statistic_dtype(x)), tree)

    def update(updates, state, params=None):
        result, state = inner.update(wide(updates), state, wide(params))
        return _tree.astype(result, updates), state

    return optax.GradientTransformation(inner.init, update)
