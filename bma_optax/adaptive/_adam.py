"""Adam-BMA: the report's approximation of decayed statistics."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bma_optax import _checks, _rates, _refresh, _tree
from bma_optax.adaptive import _inverse_root, _moments
from bma_optax.partitions import _build, _rules


class ScaleByAdamBMAState(NamedTuple):
    """State of :func:`scale_by_adam_bma`, for L blocks.

    With several groups (:func:`within`) the L x L arrays hold the groups' small
    matrices one after the other, shape (Σ L_group²,).

    Example:
      >>> import jax.numpy as jnp, bma_optax as bma
      >>> params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
      >>> state = bma.scale_by_adam_bma().init(params)
      >>> state.mu["w"].shape, state.nu["w"].shape, state.U.shape
      ((2, 3), (2, 3), (2, 2))
    """

    count: jax.Array  # type: ignore[assignment]  # shape (), int32: steps taken.
    mu: optax.Updates  # like params: the momentum.
    nu: optax.Updates  # like params, float32 or float64: diag H.
    U: jax.Array  # shape (L, L): decayed outer products of block sums.
    v: jax.Array  # shape (L,): block sums of z on the scale of U, as M has them.
    inverse_root: jax.Array  # shape (L, L): the last finite M^-½.
    failures: jax.Array  # shape (), int32: factorisations that were not finite.


def scale_by_adam_bma(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    partition: _rules.Rule = _rules.per_leaf,
    estimator: str | None = None,
    min_eigenvalue: jax.typing.ArrayLike = 0.3,
    update_interval: jax.typing.ArrayLike = 1,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales updates by Adam with a block mean approximation of the full matrix.

    The statistics of :func:`scale_by_bma` decayed as Adam's are, with its correction of
    their start, and the momentum m in the place of the gradient:

    .. math::
        H = (1 - b_2) \sum_\tau b_2^{t - \tau} g_\tau g_\tau^T \,/\, (1 - b_2^t)
        \approx Z F Z, \qquad \text{update} = F^{-1/2} Z^{-1} m

    with :math:`Z = (\mathrm{diag} H + \epsilon_{root})^{1/2} + \epsilon`, F = I + E (M
    - I) Eᵀ, M = I + (U - diag U) / (v vᵀ), U the block sums of H and v those of Z. It
    is Adam on everything but the L block means; with
    one block it equals ``optax.scale_by_adam``.

    Args:
      b1: the decay of the momentum, in [0, 1).
      b2: the decay of diag H and U, in [0, 1).
      eps: added to the root of diag H, >= 0.
      eps_root: added to diag H inside the root, >= 0.
      mu_dtype: the dtype of the momentum; that of the parameters if None.
      partition: the rule that cuts parameters into blocks. An array without blocks gets
        plain Adam.
      estimator: "report" for the M above, "projection" for S^½ U / (v vᵀ) S^½, diagonal
        included, as in :func:`scale_by_bma`. None for the projection if the rule leaves
        every block alone, else for the report's.
      min_eigenvalue: the least eigenvalue of M, >= 0; at 1 the update along block means
        can shrink but not grow. The default bounds its growth by 1.8.
      update_interval: k, the steps from one inverse root to the next. Before step k
        there is also one at steps 1, 2, 4, 8, ..., as the first gradients change M
        most.

    Returns:
      A ``GradientTransformationExtraArgs`` with the state :class:`ScaleByAdamBMAState`.
      Updates keep the dtype of the gradients; statistics are float32, or float64 for
      float64 parameters. A gradient that is not finite counts as 0 (its whole block is
      left out of U) and gives an update that is not finite, at that element alone.

    Raises:
      TypeError: if ``partition`` is no rule or a number is none, or of 16 bits; at
        ``init`` and ``update``, if a leaf is no real floating array.
      ValueError: if ``estimator`` is unknown or a number is out of its
        range; at ``init``, if the rule does not fit the parameters; at ``update``, if
        the gradients are not of the structure and shapes that ``init`` saw, or the
        state is of parameters of another dtype.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import bma_optax as bma
      >>> def f(x): return jnp.sum(x["a"] ** 2) + jnp.sum(x["a"] - x["b"]) ** 2
      >>> params = {"a": jnp.array([3.0, 2.0]), "b": jnp.array(2.0)}
      >>> tx = optax.chain(bma.scale_by_adam_bma(), optax.scale(-0.5))
      >>> state = tx.init(params)
      >>> for _ in range(5):
      ...     updates, state = tx.update(jax.grad(f)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"Objective function: {f(params):.3f}")
      Objective function: 9.145
      Objective function: 6.678
      Objective function: 5.203
      Objective function: 3.552
      Objective function: 1.876

    Source: the report's slide "AdaGrad-BMA"; Kingma and Ba, `Adam
    <https://arxiv.org/abs/1412.6980>`_, 2014.
    """
    _rules.check_rule(partition)
    _inverse_root.check_estimator(estimator)
    _checks.below_one(b1=b1, b2=b2)
    _checks.not_negative(eps=eps, eps_root=eps_root, min_eigenvalue=min_eigenvalue)
    _checks.at_least_one(update_interval=update_interval)
    _checks.mu_dtype(mu_dtype)
    update_interval = _checks.plain(update_interval)
    no_eps_root = isinstance(eps_root, (int, float)) and eps_root == 0

    def init_fn(params):
        params = _tree.parameters(params)
        blocks = _build.dense_partition(params, partition)
        nu = jax.tree.map(
            lambda p: jnp.zeros_like(p, dtype=_tree.statistic_dtype(p)), params
        )
        U, v, inverse_root = _inverse_root.start(blocks, nu)
        return ScaleByAdamBMAState(
            count=jnp.zeros((), jnp.int32),
            mu=_moments.start_momentum(params, mu_dtype),
            nu=nu,
            U=U,
            v=v,
            inverse_root=inverse_root,
            failures=jnp.sum(v).astype(jnp.int32),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        _tree.check_statistics(params, state.nu)
        updates = _tree.like_init(updates, state.nu)
        state = _tree.whole(state, "count", "failures")
        updates, state = _tree.arrays((updates, state))
        blocks = _build.layout(updates, partition)
        blocks.check_state(state.U.shape)
        kind = _inverse_root.chosen(estimator, blocks)
        count = optax.safe_increment(state.count)

        # Gather: the momentum, diag H, U.
        raw = _tree.astype(updates, state.nu)
        g = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0), raw)
        mu = jax.tree.map(lambda g, m: _moments.decay(g, m, b1), g, state.mu)
        nu = jax.tree.map(
            lambda g, h: _moments.decay(jnp.square(g), h, b2), g, state.nu
        )
        U = _moments.decay(
            _inverse_root.outer(blocks, blocks.block_sums(raw)), state.U, b2
        )

        # The small matrix and its root; U and v² both lack the correction of the start.
        def refresh():
            start = _moments.bias_correction(count, b2, state.v.dtype)
            inside = 0 if no_eps_root else start * jnp.asarray(eps_root, start.dtype)
            v = _inverse_root.root_sums(blocks, nu, inside, state.v)
            sizes = jnp.asarray(blocks.sizes, v.dtype)
            v = v + jnp.sqrt(start) * jnp.asarray(eps, v.dtype) * sizes
            root, failures = _inverse_root.inverse_root(
                blocks, U, v, state.inverse_root, min_eigenvalue, kind
            )
            return v, root, state.failures + failures

        v, inverse_root, failures = _refresh.every(
            update_interval,
            state.count,
            refresh,
            (state.v, state.inverse_root, state.failures),
            young=True,
        )

        # Apply: r + E (M^-½ - I) Eᵀ r.
        def scale(m, h, g):
            m = m / _moments.bias_correction(count, b1, m.dtype)
            h = h / _moments.bias_correction(count, b2, h.dtype)
            r = _moments.over_root(m, h, eps, eps_root)
            return jnp.where(jnp.isfinite(g), r, g)

        r = jax.tree.map(scale, mu, nu, raw)
        correction = blocks.expand(
            _inverse_root.correction(blocks, inverse_root, blocks.block_sums(r)), r
        )
        result = jax.tree.map(
            lambda r, c, h: r + jnp.where(h > 0, c, 0), r, correction, nu
        )
        return _tree.astype(result, updates), ScaleByAdamBMAState(
            count=count,
            mu=_tree.astype(mu, state.mu),
            nu=nu,
            U=U,
            v=v,
            inverse_root=inverse_root,
            failures=failures,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


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
    min_eigenvalue: jax.typing.ArrayLike = 0.3,
    update_interval: jax.typing.ArrayLike = 1,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with a block mean approximation of the full matrix.

    .. math:: \theta \leftarrow \theta - \eta \, (F^{-1/2} Z^{-1} m + \lambda \theta)

    With one block it is ``optax.adamw``.

    Args:
      learning_rate: a number or a schedule.
      b1: see :func:`scale_by_adam_bma`, as for the arguments that are not said here.
      b2: the decay of diag H and U.
      eps: added to the root of diag H.
      eps_root: added inside the root.
      mu_dtype: the dtype of the momentum.
      weight_decay: λ, a number or a schedule; multiplied by the rate, as in adamw.
      weight_decay_mask: a tree of booleans like the parameters, or a function of them
        that gives one: where weights decay. Everywhere if None.
      partition: the rule that cuts parameters into blocks.
      estimator: "report", "projection" or None.
      min_eigenvalue: the least eigenvalue of M.
      update_interval: steps from one inverse root to the next.

    Returns:
      A chain of :func:`scale_by_adam_bma`, the decay and the rate. ``update`` needs
      ``params`` where weights decay.

    Raises:
      TypeError, ValueError: as :func:`scale_by_adam_bma`.

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
            min_eigenvalue=min_eigenvalue,
            update_interval=update_interval,
        ),
        _rates.decay(weight_decay, weight_decay_mask),
        _rates.scale(learning_rate),
    )
