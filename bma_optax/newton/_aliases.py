"""Newton-BMA and natural-gradient-BMA with their step rule."""

from typing import Any

import jax
import optax

from bma_optax import _checks, _rates
from bma_optax.curvature import _kinds
from bma_optax.curvature._kinds import Curvature
from bma_optax.newton import _masks, _natural, _newton, _quadratic_model
from bma_optax.partitions import _rules


def newton_bma(
    partition: _rules.Rule = _rules.per_leaf,
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    curvature: Curvature = _kinds.Hessian(),  # noqa: B008 - a frozen value.
    update_interval: jax.typing.ArrayLike = 10,
    b2: jax.typing.ArrayLike = 0.0,
    damping: jax.typing.ArrayLike = 0.0,
    min_eigenvalue: jax.typing.ArrayLike = 0.0,
    max_norm: jax.typing.ArrayLike | None = None,
    key: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Newton's method with a block mean of the Hessian, with its own step rule.

    .. math:: \theta \leftarrow \theta - a \, C g + b \, (\theta - \theta_{previous})

    Args:
      partition: the rule, see :func:`scale_by_newton_bma`, as for the arguments below.
      learning_rate: None for a and b by :func:`scale_by_quadratic_model`, which needs
        no tuning; a number or a schedule for a, with b = 0.
      curvature: what G is.
      update_interval: steps from one refresh of the factor to the next.
      b2: the decay of the averages over refreshes.
      damping: μ >= 0.
      min_eigenvalue: the least eigenvalue of M.
      max_norm: the largest global norm of a step; None for no limit.
      key: a seed or a random key.

    Returns:
      A chain of :func:`scale_by_newton_bma` and the step rule. ``update`` takes
      ``value_fn``, the loss, and its other arguments. To freeze arrays set their
      gradients to 0 before it, ``optax.chain(optax.masked(optax.set_to_zero(),
      frozen), newton_bma())``; a mask after it is found when the first step is taken,
      which may raise the loss.

    Raises:
      TypeError, ValueError: as :func:`scale_by_newton_bma`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import bma_optax as bma
      >>> def f(x): return jnp.sum(jnp.cosh(x - jnp.arange(4.0))) + jnp.sum(x) ** 2
      >>> solver = bma.newton_bma()
      >>> params = jnp.zeros(4)
      >>> state = solver.init(params)
      >>> update = jax.jit(lambda g, s, p: solver.update(g, s, p, value_fn=f))
      >>> for _ in range(4):
      ...     updates, state = update(jax.grad(f)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"Objective function: {f(params):.4f}")
      Objective function: 9.6408
      Objective function: 8.6105
      Objective function: 8.5417
      Objective function: 8.5250

    Source: the report's eq. (1) and (3).
    """
    return _descend(
        _newton.scale_by_newton_bma(
            partition,
            curvature=curvature,
            update_interval=update_interval,
            b2=b2,
            damping=damping,
            min_eigenvalue=min_eigenvalue,
            key=key,
        ),
        learning_rate,
        curvature=curvature,
        max_norm=max_norm,
        key=key,
    )


def natural_bma(
    curvature: Curvature,
    partition: _rules.Rule = _rules.per_leaf,
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    update_interval: jax.typing.ArrayLike = 10,
    b2: jax.typing.ArrayLike = 0.95,
    damping: jax.typing.ArrayLike = 1e-2,
    min_eigenvalue: jax.typing.ArrayLike = 0.0,
    max_norm: jax.typing.ArrayLike | None = None,
    key: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Natural gradient descent with a block mean of the information matrix.

    .. math:: \theta \leftarrow \theta - a \, C g + b \, (\theta - \theta_{previous})

    Args:
      curvature: ``bma.Fisher(...)`` or another, see :func:`scale_by_natural_bma`.
      partition: the rule, see :func:`scale_by_natural_bma`, as for the arguments below.
      learning_rate: None for a and b by :func:`scale_by_quadratic_model`; a number or a
        schedule for a, with b = 0.
      update_interval: steps from one refresh of the factor to the next.
      b2: the decay of the averages over refreshes.
      damping: μ >= 0.
      min_eigenvalue: the least eigenvalue of M.
      max_norm: the largest global norm of a step; None for no limit.
      key: a seed or a random key.

    Returns:
      A chain of :func:`scale_by_natural_bma` and the step rule.

    Raises:
      TypeError, ValueError: as :func:`scale_by_newton_bma`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import bma_optax as bma
      >>> x, y = jnp.eye(3), jnp.array([0, 1, 1])
      >>> losses = optax.softmax_cross_entropy_with_integer_labels
      >>> fisher = bma.Fisher(lambda w: x @ w, jax.random.categorical, losses)
      >>> def f(w): return jnp.mean(losses(x @ w, y)) + 0.05 * jnp.sum(w ** 2)
      >>> solver = bma.natural_bma(fisher)
      >>> params = jnp.zeros((3, 2))
      >>> state = solver.init(params)
      >>> for _ in range(3):
      ...     updates, state = solver.update(
      ...         jax.grad(f)(params), state, params, value_fn=f)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"Objective function: {f(params):.3f}")
      Objective function: 0.427
      Objective function: 0.367
      Objective function: 0.367

    Source: the report's eq. (1) and (3).
    """
    return _descend(
        _natural.scale_by_natural_bma(
            curvature,
            partition,
            update_interval=update_interval,
            b2=b2,
            damping=damping,
            min_eigenvalue=min_eigenvalue,
            key=key,
        ),
        learning_rate,
        curvature=curvature,
        max_norm=max_norm,
        key=key,
    )


def _descend(
    direction: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule | None,
    *,
    curvature: Curvature,
    max_norm: jax.typing.ArrayLike | None,
    key: jax.typing.ArrayLike,
) -> optax.GradientTransformationExtraArgs:
    """``direction`` followed by the quadratic model's step rule, or by a rate."""
    if learning_rate is None:
        rule = _quadratic_model.scale_by_quadratic_model(
            curvature, max_norm=max_norm, key=key
        )
        return _masks.heed(optax.chain(direction, optax.scale(-1.0), rule))
    parts: list[Any] = [direction, _rates.scale(learning_rate)]
    if max_norm is not None:
        _checks.positive(max_norm=max_norm)
        parts.append(_rates.clip(max_norm))
    return _masks.heed(optax.chain(*parts))
