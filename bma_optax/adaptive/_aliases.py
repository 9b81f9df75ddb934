"""AdaGrad-BMA, Adam-BMA and mini-BMA as optimisers, with a learning rate.

Each alias is a chain: the transformation of its module, weight decay where Optax's
counterpart has it, and the learning rate. Updates have the shapes of the parameters θ:

    θ <- θ - η (u + λ θ),   u the output of ``scale_by_bma`` and so on.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from bma_optax import _rates
from bma_optax.adaptive._adagrad import scale_by_bma
from bma_optax.adaptive._adam import scale_by_adam_bma
from bma_optax.adaptive._mini import scale_by_mini_bma
from bma_optax.partitions import _rules, _unit_rules


def adagrad_bma(
    learning_rate: optax.ScalarOrSchedule,
    partition: _rules.Rule = _rules.per_leaf,
    *,
    initial_accumulator_value: jax.typing.ArrayLike = 0.0,
    eps: jax.typing.ArrayLike = 1e-7,
    min_eigenvalue: jax.typing.ArrayLike | None = None,
    form: str = "left",
    estimator: str | None = None,
    weights: str = "constant",
    update_interval: jax.typing.ArrayLike = 1,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaGrad with a block mean approximation of the full matrix.

    .. math:: \theta \leftarrow \theta - \eta \, F^{-1/2} Z^{-1} g

    F and Z are those of :func:`scale_by_bma`.

    Args:
      learning_rate: η, a number >= 0 or a schedule.
      partition: a :class:`Rule`, which cuts the parameters into blocks. The default
        ``bma.per_leaf`` makes each array one block; ``bma.units`` is for networks. An
        array without blocks gets AdaGrad.
      initial_accumulator_value: the initial value of diag H, a number >= 0; 0, because
        a large start keeps M at the identity.
      eps: a number >= 0, added to diag H inside the root.
      min_eigenvalue: the floor of M's eigenvalues, a number >= 0. At 1 the update along
        block means can shrink but not grow; 0 is AdaGrad-Full to the letter. None
        stands for 1 with "projection", and for 0.3 with "report", which bounds the
        growth of the norm by 1.8, see :func:`scale_by_bma`.
      form: a string, "left" for the update :math:`F^{-1/2} Z^{-1} g`; "symmetric" for
        :math:`Z^{-1/2} F^{-1/2} Z^{-1/2} g`, always a descent direction, but large
        where gradients were tiny and blocks are fine.
      estimator: a string, "report" for the M of Lu et al. 2018; "projection" for M by
        eq. 2, with a diagonal. None selects "projection" for a block alone, "report"
        for others.
      weights: a string, "constant" to sum blocks as they are; "learned" to sum along
        the direction that the units of an array share, see :func:`scale_by_bma`.
      update_interval: an integer >= 1, the steps from one computation of M^-½ to the
        next. The default 1 computes it at every step; 10 is cheaper with many blocks.

    Returns:
      ``optax.chain(scale_by_bma(...), optax.scale_by_learning_rate(learning_rate))``.

    Raises:
      TypeError, ValueError: for the reasons that :func:`scale_by_bma` lists.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import bma_optax as bma
      >>> def f(x): return jnp.sum(x ** 2)
      >>> solver = bma.adagrad_bma(learning_rate=1.0)
      >>> params = jnp.array([1.0, 2.0, 3.0])
      >>> state = solver.init(params)
      >>> for _ in range(3):
      ...     updates, state = solver.update(jax.grad(f)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"Objective function: {f(params):.2E}")
      Objective function: 5.00E+00
      Objective function: 2.39E+00
      Objective function: 1.25E+00

    Source: Lu et al., `Block Mean Approximation for Efficient Second Order Optimization
    <https://arxiv.org/abs/1804.05484>`_, 2018, slide "AdaGrad-BMA".
    """
    return optax.chain(
        scale_by_bma(
            partition,
            initial_accumulator_value=initial_accumulator_value,
            eps=eps,
            min_eigenvalue=min_eigenvalue,
            form=form,
            estimator=estimator,
            weights=weights,
            update_interval=update_interval,
        ),
        _rates.scale(learning_rate),
    )


def adam_bma(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    partition: _rules.Rule = _rules.per_leaf,
    estimator: str | None = None,
    weights: str = "constant",
    min_eigenvalue: jax.typing.ArrayLike | None = None,
    update_interval: jax.typing.ArrayLike = 1,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with a block mean approximation of the full matrix.

    .. math:: \theta \leftarrow \theta - \eta \, (F^{-1/2} Z^{-1} m + \lambda \theta)

    F, Z and the momentum m are those of :func:`scale_by_adam_bma`. With one block the
    method is ``optax.adamw``.

    Args:
      learning_rate: η, a number >= 0 or a schedule.
      b1: the decay of the momentum, a number in [0, 1); the default is Adam's.
      b2: the decay of diag H and U, a number in [0, 1); the default is Adam's.
      eps: a number >= 0, added to the root of diag H; the default is Adam's.
      eps_root: a number >= 0, added to diag H inside the root; the default is Adam's.
      mu_dtype: the floating dtype of the momentum. None takes the dtype of the
        parameters.
      weight_decay: λ, a number >= 0 or a schedule. The learning rate multiplies it, as
        in ``optax.adamw``.
      weight_decay_mask: a tree of booleans like the parameters, or a function that
        returns one from the parameters: where weights decay. None stands for
        everywhere.
      partition: a :class:`Rule`, which cuts the parameters into blocks. The default
        ``bma.per_leaf`` makes each array one block; ``bma.units`` is for networks. An
        array without blocks gets Adam.
      estimator: a string, "report" for the M of Lu et al. 2018; "projection" for M by
        eq. 2, with a diagonal. None selects "projection" for a block alone, "report"
        for others.
      weights: a string, "constant" to sum blocks as they are; "learned" to sum along
        the direction that the units of an array share, see :func:`scale_by_bma`.
      min_eigenvalue: the floor of M's eigenvalues, a number >= 0. At 1 the update along
        block means can shrink but not grow. None stands for 1 with "projection", and
        for 0.3 with "report", which bounds the growth of the norm by 1.8.
      update_interval: an integer >= 1, the steps from one computation of M^-½ to the
        next. The default 1 computes it at every step; 10 is cheaper with many blocks.

    Returns:
      A chain of :func:`scale_by_adam_bma`, the weight decay and the learning rate.
      ``update`` needs ``params`` where weights decay.

    Raises:
      TypeError, ValueError: for the reasons that :func:`scale_by_adam_bma` lists.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import bma_optax as bma
      >>> def f(x): return jnp.sum(x ** 2)
      >>> solver = bma.adam_bma(learning_rate=0.3)
      >>> params = jnp.array([1.0, 2.0, 3.0])
      >>> state = solver.init(params)
      >>> for _ in range(3):
      ...     updates, state = solver.update(jax.grad(f)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"Objective function: {f(params):.2E}")
      Objective function: 1.07E+01
      Objective function: 7.90E+00
      Objective function: 5.68E+00

    Source: see :func:`scale_by_adam_bma`; Loshchilov and Hutter, `Decoupled Weight
    Decay Regularization <https://arxiv.org/abs/1711.05101>`_, 2019.
    """
    return optax.chain(
        scale_by_adam_bma(
            b1,
            b2,
            eps,
            eps_root,
            mu_dtype,
            partition=partition,
            estimator=estimator,
            weights=weights,
            min_eigenvalue=min_eigenvalue,
            update_interval=update_interval,
        ),
        _rates.decay(weight_decay, weight_decay_mask),
        _rates.scale(learning_rate),
    )


def mini_bma(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-8,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    partition: _rules.Rule = _unit_rules.per_unit,
    b3: jax.typing.ArrayLike = 0.95,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam at half of its state, by block means and a learned direction.

    Array names of Flax, Haiku, Equinox and PyTorch tell which axis counts the units.

    .. math:: \theta \leftarrow \theta - \eta \, \big(x + (\max(M, 1)^{-1/2} - 1)
        (x^T q) \, q + \lambda \theta\big)

    The scaled momentum x of a unit, its number M and the direction q are those of
    :func:`scale_by_mini_bma`.

    Args:
      learning_rate: η, a number >= 0 or a schedule.
      b1: the decay of the momentum, a number in [0, 1); the default is Adam's.
      b2: the decay of the block means of squares and of M, a number in [0, 1); the
        default averages over about 100 steps.
      eps: a number >= 0, added to the root of a unit's mean square; the default is
        Adam's.
      mu_dtype: the floating dtype of the momentum. None takes the dtype of the
        parameters.
      weight_decay: λ, a number >= 0 or a schedule. The learning rate multiplies it, as
        in ``optax.adamw``.
      weight_decay_mask: a tree of booleans like the parameters, or a function that
        returns one from the parameters: where weights decay. None stands for
        everywhere.
      partition: a :class:`Rule`, whose blocks are the units. The default
        ``bma.per_unit`` knows their axis from the names of arrays and warns where a
        name does not tell: pass ``bma.per_column`` (last axis) or ``bma.per_row``
        (first axis) then. Adam updates an array without blocks.
      b3: the decay of the direction q, a number in [0, 1); the default averages over
        about 20 steps.

    Returns:
      A chain of :func:`scale_by_mini_bma`, the weight decay and the learning rate.
      ``update`` needs ``params`` where weights decay.

    Raises:
      TypeError, ValueError: for the reasons that :func:`scale_by_mini_bma` lists.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import bma_optax as bma
      >>> x = jnp.array([[3.0, 1.0], [2.0, 2.0], [3.0, 0.0]])
      >>> def f(w): return jnp.mean((x @ w - jnp.array([[1.0, -1.0]])) ** 2)
      >>> solver = bma.mini_bma(learning_rate=0.1)
      >>> params = jnp.zeros((2, 2))
      >>> state = solver.init(params)
      >>> for _ in range(3):
      ...     updates, state = solver.update(jax.grad(f)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"Objective function: {f(params):.3f}")
      Objective function: 0.550
      Objective function: 0.241
      Objective function: 0.068

    Source: see :func:`scale_by_mini_bma`; Loshchilov and Hutter, `Decoupled Weight
    Decay Regularization <https://arxiv.org/abs/1711.05101>`_, 2019.
    """
    return optax.chain(
        scale_by_mini_bma(
            b1,
            b2,
            eps,
            partition=partition,
            b3=b3,
            mu_dtype=mu_dtype,
        ),
        _rates.decay(weight_decay, weight_decay_mask),
        _rates.scale(learning_rate),
    )
