"""Natural-gradient-BMA: eq. (1) and (3) with the information matrix."""

import jax
import optax

from bma_optax.curvature._kinds import Curvature
from bma_optax.newton import _newton
from bma_optax.partitions import _rules


def scale_by_natural_bma(
    curvature: Curvature,
    partition: _rules.Rule = _rules.per_leaf,
    *,
    update_interval: jax.typing.ArrayLike = 10,
    b2: jax.typing.ArrayLike = 0.95,
    damping: jax.typing.ArrayLike = 1e-2,
    min_eigenvalue: jax.typing.ArrayLike = 0.0,
    key: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales updates by the inverse of a block mean of the information matrix.

    :func:`scale_by_newton_bma` for a G that is an average over draws, with defaults
    that allow for its noise: a moving average over refreshes and a damping.

    Args:
      curvature: ``bma.Fisher(...)``; or ``bma.GaussNewton(...)``, which is the Fisher
        matrix without sampling for log likelihoods of an exponential family.
      partition: see :func:`scale_by_newton_bma`, as for the arguments below.
      update_interval: steps from one refresh of the factor to the next.
      b2: the decay of the averages over refreshes.
      damping: μ >= 0.
      min_eigenvalue: the least eigenvalue of M.
      key: a seed or a random key, for the sampled labels and the probes.

    Returns:
      A ``GradientTransformationExtraArgs`` with the state
      :class:`ScaleByNewtonBMAState`.

    Raises:
      TypeError, ValueError: as :func:`scale_by_newton_bma`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import bma_optax as bma
      >>> x, y = jnp.eye(3), jnp.array([0, 1, 1])
      >>> losses = optax.softmax_cross_entropy_with_integer_labels
      >>> fisher = bma.Fisher(lambda w: x @ w, jax.random.categorical, losses)
      >>> def f(w): return jnp.mean(losses(x @ w, y))
      >>> tx = optax.chain(bma.scale_by_natural_bma(fisher), optax.scale(-0.5))
      >>> params = jnp.zeros((3, 2))
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     updates, state = tx.update(jax.grad(f)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"Objective function: {f(params):.3f}")
      Objective function: 0.175
      Objective function: 0.107
      Objective function: 0.077

    Source: the report's eq. (1) and (3); Amari, Natural gradient works efficiently in
    learning, 1998.
    """
    return _newton.scale_by_newton_bma(
        partition,
        curvature=curvature,
        update_interval=update_interval,
        b2=b2,
        damping=damping,
        min_eigenvalue=min_eigenvalue,
        key=key,
    )
