"""Natural-gradient-BMA: Newton-BMA with the information matrix as curvature.

    G = E[s sᵀ],   s the gradient of the log likelihood of a label the model draws,

in the C g of Lu et al. 2018, eq. 1 and 3; updates have the shapes of the parameters.
The defaults allow for the noise of G: the transformation averages over refreshes and
adds a damping.
"""

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
    """Scales updates by the inverse of a block mean of the information matrix.

    This is :func:`scale_by_newton_bma` for a G that is an average over random draws.
    Its defaults allow for the noise of the draws: a moving average over refreshes, and
    damping.

    Args:
      curvature: ``bma.Fisher(...)``, which samples labels; or ``bma.GaussNewton(...)``,
        which is the Fisher matrix without sampling for log likelihoods of an
        exponential family.
      partition: the rule that cuts the parameters into blocks, such as
        ``bma.per_leaf``. An array without blocks is scaled by its diagonal.
      update_interval: an integer >= 1, the steps from one refresh of C to the next. The
        first step has a refresh.
      b2: the decay of the averages of N and diag G over refreshes, a number in [0, 1).
        The default averages over about 20 refreshes.
      damping: μ, a number >= 0. C is the inverse of the block mean of F + μ I, where F
        has a unit diagonal. The default limits what noise in small eigenvalues can do.
      min_eigenvalue: the floor of M's absolute eigenvalues, a number >= 0. The damping
        and the resolution of the dtype are floors too.
      key: a seed or a random key, for the sampled labels and the probes.

    Returns:
      A ``GradientTransformationExtraArgs`` with the state
      :class:`ScaleByNewtonBMAState`.

    Raises:
      TypeError, ValueError: for the reasons that :func:`scale_by_newton_bma` lists.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import bma_optax as bma
      >>> x, y = jnp.eye(3), jnp.array([0, 1, 1])
      >>> losses = optax.softmax_cross_entropy_with_integer_labels
      >>> fisher = bma.Fisher(lambda w: x @ w, jax.random.categorical, losses)
      >>> def f(w): return jnp.mean(losses(x @ w, y))
      >>> tx = optax.chain(bma.scale_by_natural_bma(fisher), optax.scale(-0.5))
      >>> params = jnp.zeros((3, 2))
      >>> state, update = tx.init(params), jax.jit(tx.update)
      >>> for _ in range(3):
      ...     updates, state = update(jax.grad(f)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"Objective function: {f(params):.3f}")
      Objective function: 0.175
      Objective function: 0.107
      Objective function: 0.077

    Source: Lu et al., `Block Mean Approximation for Efficient Second Order Optimization
    <https://arxiv.org/abs/1804.05484>`_, 2018, eq. 1 and 3; Amari, Natural gradient
    works efficiently in learning, 1998.
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
