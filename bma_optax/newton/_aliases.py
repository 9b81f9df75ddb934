"""Newton-BMA and natural-gradient-BMA as optimisers, with their step rule.

    θ <- θ - a C g + b (θ - θ_previous)

for parameters θ and gradients g of one structure and shapes. C comes from
``scale_by_newton_bma`` or ``scale_by_natural_bma``, a and b from
``scale_by_quadratic_model``, or a from a learning rate with b = 0.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bma_optax import _checks, _rates
from bma_optax.curvature import _kinds
from bma_optax.curvature._kinds import Curvature
from bma_optax.newton import _masks, _natural, _newton, _quadratic_model
from bma_optax.partitions import _rules

# C is out of date once the errors of the step rule's model since the last refresh add
# up to _STALE. A refresh must also pay: so far, refreshes have taken no more than four
# products a step, which take as long as steps, or came at every tenth step at most.
_STALE = 0.5
_PRODUCTS_A_STEP = 4
_STEPS = 10


def newton_bma(
    partition: _rules.Rule = _rules.per_leaf,
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    curvature: Curvature = _kinds.Hessian(),  # noqa: B008 - a frozen value.
    update_interval: jax.typing.ArrayLike | None = None,
    b2: jax.typing.ArrayLike = 0.0,
    damping: jax.typing.ArrayLike = 0.0,
    min_eigenvalue: jax.typing.ArrayLike = 0.0,
    max_norm: jax.typing.ArrayLike | None = None,
    key: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Newton's method with a block mean of the Hessian, with its own step rule.

    .. math:: \theta \leftarrow \theta - a \, C g + b \, (\theta - \theta_{previous})

    C is the inverse of :func:`scale_by_newton_bma`.

    Args:
      partition: a :class:`Rule`, which cuts the parameters into blocks:
        ``bma.per_tile((4, 4), reach=1)`` for a field on a grid, or what
        :func:`suggest_partition` finds; the default ``bma.per_leaf`` for one block an
        array. An array without blocks is scaled by its diagonal. Each refresh checks a
        declared ``reach``.
      learning_rate: a, a number >= 0 or a schedule, with b = 0. None takes a and b from
        :func:`scale_by_quadratic_model`, which needs no tuning.
      curvature: a :class:`Curvature`, which says what G is: ``bma.Hessian()``, the
        default, which needs no more than the loss; ``bma.GaussNewton(...)`` or another.
      update_interval: an integer >= 1, the steps from one refresh of C to the next. The
        first step has a refresh; each makes all its products with G anew. None, the
        default, refreshes where the curvature has changed: once the errors of the step
        rule's model, abs(1 - decrease / foretold decrease), add up to ½. It does so at
        every tenth step at most if refreshes take more than four products a step. A
        quadratic loss has one refresh then. With a learning rate, where there is no
        model, None is 10.
      b2: the decay of the averages of N and diag G over refreshes, a number in [0, 1).
        The default keeps no averages: a full loss has no noise. Pass b2 > 0 for
        mini-batches.
      damping: μ, a number >= 0: C inverts the block mean of F + μ I, where F has a unit
        diagonal. The default is 0, since C is positive definite without damping.
      min_eigenvalue: the floor of M's absolute eigenvalues, a number >= 0. At 0 the
        damping and the resolution of the dtype are the floors.
      max_norm: the largest global norm of a step, a number > 0. None sets no limit.
        Set one with a ``learning_rate`` where the curvature may be indefinite.
      key: a seed or a random key, for the probes and for ``bma.Fisher``.

    Returns:
      A chain of :func:`scale_by_newton_bma` and the step rule. ``update`` takes
      ``value_fn``, the loss, and the other arguments of the loss, and ``refresh``, a
      boolean that asks for a refresh at this step. No argument of the loss can have
      the name of one of ``update``: ``updates``, ``state``, ``params``, ``value_fn``,
      ``refresh``, ``value`` or ``grad``.

      The loop that Optax has for L-BFGS saves a gradient a step here as well: it calls
      ``optax.value_and_grad_from_state(value_fn)`` and ``update(..., value=value,
      grad=grad, value_fn=value_fn)``. Every step must then have the same loss, and
      nothing but a mask may change the updates afterwards. Under ``optax.partition``
      that function of Optax fails.

      To freeze arrays, set their gradients to 0 before the chain:
      ``optax.chain(optax.masked(optax.set_to_zero(), frozen), newton_bma())``. A mask
      after the chain is found only once the first step has been taken, and that step
      may raise the loss.

    Raises:
      TypeError, ValueError: for the reasons that :func:`scale_by_newton_bma` lists.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import bma_optax as bma
      >>> def f(u):  # A field that is smooth, and 1 at one point.
      ...     slopes = (jnp.diff(u, axis=axis) for axis in (0, 1))
      ...     return sum(jnp.sum(s ** 2) for s in slopes) + (u[5, 8] - 1) ** 2
      >>> solver = bma.newton_bma(bma.per_tile((4, 4), reach=1))
      >>> params = jnp.zeros((32, 32))
      >>> state = solver.init(params)
      >>> update = jax.jit(lambda g, s, p: solver.update(g, s, p, value_fn=f))
      >>> for _ in range(4):
      ...     updates, state = update(jax.grad(f)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"Objective function: {f(params):.3f}")
      Objective function: 0.094
      Objective function: 0.017
      Objective function: 0.004
      Objective function: 0.001

    Source: Lu et al., `Block Mean Approximation for Efficient Second Order Optimization
    <https://arxiv.org/abs/1804.05484>`_, 2018, eq. 1 and 3.
    """
    on_demand = update_interval is None
    if on_demand and learning_rate is not None:
        update_interval = 10
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
        on_demand=on_demand,
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

    C is the inverse of :func:`scale_by_natural_bma`.

    Args:
      curvature: a :class:`Curvature`: ``bma.Fisher(...)``, which samples labels; or
        ``bma.GaussNewton(...)``, which is the Fisher matrix without sampling for log
        likelihoods of an exponential family.
      partition: a :class:`Rule`, which cuts the parameters into blocks. The default
        ``bma.per_leaf`` makes each array one block. An array without blocks is scaled
        by its diagonal.
      learning_rate: a, a number >= 0 or a schedule, with b = 0. None takes a and b from
        :func:`scale_by_quadratic_model`, which needs no tuning.
      update_interval: an integer >= 1, the steps from one refresh of C to the next. The
        first step has a refresh; each makes all its products with G anew.
      b2: the decay of the averages of N and diag G over refreshes, a number in [0, 1).
        The default averages over about 20 refreshes, because G is sampled.
      damping: μ, a number >= 0: C inverts the block mean of F + μ I, where F has a unit
        diagonal. The default limits what noise in small eigenvalues can do.
      min_eigenvalue: the floor of M's absolute eigenvalues, a number >= 0. At 0 the
        damping and the resolution of the dtype are the floors.
      max_norm: the largest global norm of a step, a number > 0. None sets no limit.
      key: a seed or a random key, for the sampled labels and the probes.

    Returns:
      A chain of :func:`scale_by_natural_bma` and the step rule. ``update`` takes
      ``value_fn``, the loss, and the other arguments of the loss.

    Raises:
      TypeError, ValueError: for the reasons that :func:`scale_by_newton_bma` lists.

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
      >>> update = jax.jit(lambda g, s, p: solver.update(g, s, p, value_fn=f))
      >>> for _ in range(3):
      ...     updates, state = update(jax.grad(f)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"Objective function: {f(params):.3f}")
      Objective function: 0.427
      Objective function: 0.368
      Objective function: 0.367

    Source: Lu et al., `Block Mean Approximation for Efficient Second Order Optimization
    <https://arxiv.org/abs/1804.05484>`_, 2018, eq. 1 and 3.
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
    on_demand: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """``direction``, then the quadratic model's step rule or a learning rate.

    ``on_demand`` tells the direction to refresh where the model says so.
    """
    if learning_rate is None:
        rule = _quadratic_model.scale_by_quadratic_model(
            curvature, max_norm=max_norm, key=key
        )
        chain = optax.chain(direction, optax.scale(-1.0), rule)

        def update_fn(updates, state, params=None, *, refresh=False, **extra_args):
            _checks.flag(refresh=refresh)
            made, taken = state[0], state[-1]
            if not hasattr(taken, "drift"):
                raise ValueError(
                    "The state has no step rule: init was called with a learning_rate. "
                    "Pass the state that init makes without one."
                )
            if on_demand:
                steps = taken.products
                pays = (made.products <= _PRODUCTS_A_STEP * steps) | (
                    _STEPS * made.refreshes <= steps
                )
                refresh = jnp.asarray(refresh, bool) | (taken.drift > _STALE) & pays
            return chain.update(updates, state, params, refresh=refresh, **extra_args)

        return _masks.heed(optax.GradientTransformationExtraArgs(chain.init, update_fn))
    parts: list[Any] = [direction, _rates.scale(learning_rate)]
    if max_norm is not None:
        _checks.positive(max_norm=max_norm)
        parts.append(_rates.clip(max_norm))
    return _masks.heed(optax.chain(*parts))
