"""Adam-BMA: AdaGrad-BMA of Lu et al. 2018 with decayed statistics and momentum.

The statistics are decayed averages with Adam's bias correction: the momentum m and
diag H, shaped like the parameters, and U, shape (L, L), of the outer products u uᵀ of
block sums u. With Z = (diag H + eps_root)^½ + eps and v the block sums of Z's diagonal,
shape (L,), the update is

    F^-½ Z^-1 m,   F^-½ = I + E (M^-½ - I) Eᵀ,   M = I + (U - diag U) / (v vᵀ).

E is the d x L matrix of normalised block indicators, which is never built.
``_inverse_root`` computes M, its inverse root and the correction.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bma_optax import _checks, _refresh, _tree, _xla
from bma_optax.adaptive import _columns, _inverse_root, _moments
from bma_optax.partitions import _build, _rules


class ScaleByAdamBMAState(NamedTuple):
    """State of :func:`scale_by_adam_bma`, for L blocks.

    With several groups of blocks (:func:`within`), the L x L arrays hold the small
    matrices of the groups one after the other, shape (Σ L_group²,).

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
    U: jax.Array  # shape (L, L): decayed average of u uᵀ, not bias-corrected.
    v: jax.Array  # shape (L,): block sums of z, on the scale of U.
    inverse_root: jax.Array  # shape (L, L): the last finite M^-½.
    failures: jax.Array  # shape (), int32: factorisations that were not finite.
    direction: optax.Updates | None = None  # a number an input: learned weights.


def scale_by_adam_bma(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    partition: _rules.Rule = _rules.per_leaf,
    estimator: str | None = None,
    weights: str = "constant",
    min_eigenvalue: jax.typing.ArrayLike | None = None,
    update_interval: jax.typing.ArrayLike = 1,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales updates by Adam with a block mean approximation of the full matrix.

    The method decays the statistics of :func:`scale_by_bma` as Adam does, corrects
    their bias, and scales the momentum m in place of the gradient:

    .. math::
        H = (1 - b_2) \sum_\tau b_2^{t - \tau} g_\tau g_\tau^T \,/\, (1 - b_2^t)
        \approx Z F Z, \qquad \text{update} = F^{-1/2} Z^{-1} m

    with :math:`Z = (\mathrm{diag} H + \epsilon_{root})^{1/2} + \epsilon`, F = I + E (M
    - I) Eᵀ and M = I + (U - diag U) / (v vᵀ). The entries of U are the sums of H over
    pairs of blocks, and v are the block sums of Z's diagonal, in which
    :math:`\epsilon_{root}` is added to the squared means, as :math:`\epsilon` is in
    :func:`scale_by_bma`. The method uses the full matrix on the L block means and is
    Adam on everything else. With one block it equals ``optax.scale_by_adam``.

    Args:
      b1: the decay of the momentum, a number in [0, 1).
      b2: the decay of diag H and U, a number in [0, 1).
      eps: a number >= 0, added to the root of diag H.
      eps_root: a number >= 0, added to diag H inside the root.
      mu_dtype: the floating dtype of the momentum. None takes the dtype of the
        parameters.
      partition: the rule that cuts the parameters into blocks, such as
        ``bma.per_leaf``; see :func:`bma_optax.partition`. An array without blocks gets
        plain Adam.
      estimator: "report" for the M above. "projection" for M = S^½ U / (v vᵀ) S^½ with
        S the diagonal matrix of block sizes and the diagonal of U included; see
        :func:`scale_by_bma`. None decides group by group: "projection" for a block
        alone, where "report" is plain Adam, and "report" for blocks that see each
        other.
      weights: "constant" or "learned", see :func:`scale_by_bma`. The direction q
        follows that of :math:`Z^{-1} m`.
      min_eigenvalue: the floor of M's eigenvalues, a number >= 0. At 1 the update along
        block means can shrink but not grow. None stands for 1 with "projection", and
        for 0.3 with "report", which bounds the growth of the norm by 1.8.
      update_interval: k, an integer >= 1: the steps from one computation of M^-½ to the
        next. M^-½ is also computed at steps 1, 2, 4, 8, ... below k, because the first
        gradients change M most.

    Returns:
      A ``GradientTransformationExtraArgs`` with the state :class:`ScaleByAdamBMAState`.
      Updates keep the dtype of the gradients. Statistics are float32, or float64 for
      float64 parameters. Where an element of the gradient is not finite, the update of
      this element is not finite either. The statistics take the element for 0, and U
      leaves its block out.

    Raises:
      TypeError: if ``partition`` is not a rule, or if a number is not one or has 16
        bits; at ``init`` and ``update``, if a leaf is not a real floating array.
      ValueError: if ``estimator`` or ``weights`` is unknown, or if a number is out of
        its range; at ``init``, if the rule does not fit the parameters, or if learned
        weights have the estimator "report"; at ``update``, if the gradients do not have
        the structure and shapes that ``init`` saw, or if the state belongs to
        parameters of another dtype, to another partition or to other weights.

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

    Source: Lu, Harandi, Hartley and Pascanu, `Block Mean Approximation for Efficient
    Second Order Optimization <https://arxiv.org/abs/1804.05484>`_, 2018, slide
    "AdaGrad-BMA"; Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, 2014.
    """
    _rules.check_rule(partition)
    _checks.one_of(_inverse_root.ESTIMATORS, estimator=estimator)
    _checks.one_of(_columns.WEIGHTS, weights=weights)
    _checks.below_one(b1=b1, b2=b2)
    _checks.not_negative(
        eps=eps,
        eps_root=eps_root,
        min_eigenvalue=_inverse_root.floor(min_eigenvalue, estimator),
    )
    _checks.at_least_one(update_interval=update_interval)
    _checks.mu_dtype(mu_dtype)
    update_interval = _checks.plain(update_interval)

    def init_fn(params):
        params = _tree.parameters(params)
        blocks = _build.dense_partition(params, partition)
        nu = _tree.zeros_like(params, _tree.statistic_dtype)
        _inverse_root.by_bucket(estimator, blocks, weights)
        U, v, inverse_root = _inverse_root.start(blocks, nu)
        return ScaleByAdamBMAState(
            count=_tree.no_steps(v),
            mu=_moments.start_momentum(params, mu_dtype),
            nu=nu,
            U=U,
            v=v,
            inverse_root=inverse_root,
            failures=_tree.no_steps(v),
            direction=_columns.start(weights, blocks, nu),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        _tree.check_statistics(params, state.nu)
        updates = _tree.like_init(updates, state.nu)
        state = _tree.whole(state, "count", "failures")
        updates, state = _tree.arrays((updates, state))
        blocks = _build.layout(updates, partition)
        blocks.check_state(state.U.shape)
        _columns.check_state(weights, blocks, state.direction)
        estimators = _inverse_root.by_bucket(estimator, blocks, weights)
        columns = _columns.Columns(blocks, state.direction)
        count = optax.safe_increment(state.count)

        # Gather the momentum, diag H and U, all without bias correction.
        def moments(raw, old_mu, old_nu):
            g = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0), raw)
            mu = jax.tree.map(lambda g, m: _moments.decay(g, m, b1), g, old_mu)
            nu = jax.tree.map(
                lambda g, h: _moments.decay(jnp.square(g), h, b2), g, old_nu
            )
            return mu, nu

        raw, old = _tree.astype(updates, state.nu), (state.mu, state.nu)
        mu, nu = moments(raw, *old)
        u = columns.sums(raw)
        U = _moments.decay(_inverse_root.outer(blocks, u), state.U, b2)

        # Compute M and its inverse root. Neither U nor v² has a bias correction here,
        # so that it cancels in U / (v vᵀ); eps and eps_root are scaled to match.
        def refresh():
            start = _moments.bias_correction(count, b2, state.v.dtype)
            inside = start * jnp.asarray(eps_root, start.dtype)
            v = _inverse_root.root_sums(columns, nu, inside)
            sizes = jnp.asarray(blocks.sizes, v.dtype)
            v = v + jnp.sqrt(start) * jnp.asarray(eps, v.dtype) * sizes
            root, failures = _inverse_root.inverse_root(
                blocks, U, v, state.inverse_root, min_eigenvalue, estimators
            )
            return v, root, state.failures + failures

        v, inverse_root, failures = _refresh.every(
            update_interval,
            state.count,
            refresh,
            (state.v, state.inverse_root, state.failures),
        )

        # Apply them to r = Z^-1 m: the update is r + E (M^-½ - I) Eᵀ r.
        # With learned weights XLA would copy g, unless its sums come before r.
        later = eps if weights == "constant" else _xla.after_on_cpu(eps, u)

        def scale(m, h, g):
            m = m / _moments.bias_correction(count, b1, m.dtype)
            h = h / _moments.bias_correction(count, b2, h.dtype)
            r = _moments.over_root(m, h, later, eps_root)
            return jnp.where(jnp.isfinite(g), r, g)

        def anew(raw, old, *earlier):
            """The moments and r in a pass of their own, after what is earlier."""
            raw, old, *earlier = _xla.second_pass((raw, old, *earlier))
            mu, nu = moments(raw, *old)
            return mu, nu, jax.tree.map(scale, mu, nu, raw), *earlier

        # A branch for v stores nu, so that one pass is left.
        one_pass = not _refresh.at_each_step(update_interval)
        r = jax.tree.map(scale, mu, nu, raw)
        sums = columns.sums(r)
        along = _inverse_root.correction(blocks, inverse_root, sums)
        if weights == "learned" and not one_pass:
            *_, r, sums = anew(raw, old, sums)
        direction = columns.turned(r, sums)
        if not one_pass:
            mu, nu, r, along = anew(raw, old, along)
        # The update takes the memory of r, which the next directions are made of.
        y = jax.tree.map(_xla.after_on_cpu, state.direction, direction)
        correction = _columns.Columns(blocks, y).expand(along, r)
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
            direction=direction,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
