"""AdaGrad-BMA: the report's transformation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bma_optax import _checks, _rates, _refresh, _tree, _xla
from bma_optax.adaptive import _inverse_root
from bma_optax.partitions import _build, _rules

_FORMS = ("left", "symmetric")


class ScaleByBMAState(NamedTuple):
    """State of :func:`scale_by_bma`, for L blocks.

    With several groups (:func:`within`) the L x L arrays hold the groups' small
    matrices one after the other, shape (Σ L_group²,).

    Example:
      >>> import jax.numpy as jnp, bma_optax as bma
      >>> state = bma.scale_by_bma().init({"w": jnp.ones((2, 3)), "b": jnp.ones(3)})
      >>> state.sum_of_squares["w"].shape, state.U.shape, state.v.shape
      ((2, 3), (2, 2), (2,))
    """

    count: jax.Array  # type: ignore[assignment]  # shape (), int32: steps taken.
    sum_of_squares: optax.Updates  # like params, float32 or float64: diag H.
    U: jax.Array  # shape (L, L): sum of the outer products of block sums.
    v: jax.Array  # shape (L,): block sums of z, as M has them.
    inverse_root: jax.Array  # shape (L, L): the last finite M^-½.
    failures: jax.Array  # shape (), int32: factorisations that were not finite.


def scale_by_bma(
    partition: _rules.Rule = _rules.per_leaf,
    *,
    initial_accumulator_value: jax.typing.ArrayLike = 0.0,
    eps: jax.typing.ArrayLike = 1e-7,
    min_eigenvalue: jax.typing.ArrayLike = 0.3,
    form: str = "left",
    estimator: str | None = None,
    update_interval: jax.typing.ArrayLike = 1,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales updates by the inverse root of a block mean approximation (AdaGrad-BMA).

    AdaGrad-Full scales by the inverse root of :math:`H = \sum g g^T`, d x d. This
    takes :math:`H \approx Z F Z` with :math:`Z = (\mathrm{diag} H + \epsilon)^{1/2}`
    and

    .. math::
        F = I + E (M - I) E^T, \qquad
        M = I + \frac{U - \mathrm{diag} U}{v v^T}, \\
        u_i = \sum_{j \in i} g_j, \quad U = \sum u u^T, \quad
        v_i = \sum_{j \in i} Z_{jj}

    for blocks i, where column i of E is :math:`1 / \sqrt{s_i}` on block i; so
    :math:`F^{-1/2} = I + E (M^{-1/2} - I) E^T` for one ``eigh`` of size L x L. It is
    diagonal AdaGrad on everything but the L block means, and full-matrix AdaGrad there.
    With one block it equals ``optax.scale_by_rss``, with ``per_element`` AdaGrad-Full.

    An element that never had a gradient does not move. A gradient that is not finite
    gives an update that is not finite, as in Optax, at that element alone: it is left
    out of diag H, and its whole block out of U and of that step's correction.

    Args:
      partition: the rule that cuts parameters into blocks, ``bma.per_leaf`` and so on;
        see :func:`bma_optax.partition`. An array without blocks gets plain AdaGrad.
      initial_accumulator_value: the start of diag H, >= 0. It is 0 here, not Optax's
        0.1: a large start swamps z, and M then stays at the identity.
      eps: added to diag H inside the root, >= 0: with ``per_element`` this is
        AdaGrad-Full of H + eps I.
      min_eigenvalue: the least eigenvalue of M, >= 0. M is singular in real cases (at
        the first step; in softmax layers). At 0 the floor is only what the dtype can
        resolve beside the largest eigenvalue, 4 √L eps times it; at 1 the update along
        block means can shrink but not grow. The default bounds the growth by 1.8: below
        0.1 the second step, where M is nearly singular, can throw deeper nets off, and
        on digits little changes (``benchmarks.costs``). To the letter of
        AdaGrad-Full take 0.
      form: "left" for :math:`F^{-1/2} Z^{-1} g`, "symmetric" for
        :math:`Z^{-1/2} F^{-1/2} Z^{-1/2} g`, always a descent direction but
        large where z is tiny and blocks are fine: with ``per_unit`` on digits its
        largest entry was 13.5, that of "left" 2.0 (``benchmarks.costs``).
      estimator: "report" for the M above; "projection" for
        :math:`M = S^{1/2} \frac{U}{v v^T} S^{1/2}`, S = diag(s), diagonal included:
        eq. (2) of :math:`Z^{-1} H Z^{-1}`, whose off-diagonal entries the report's M
        shrinks by :math:`\sqrt{s_i s_j}`. Take ``min_eigenvalue=1`` with it on
        networks. None for the report's, or for the projection if the rule leaves every
        block alone: there the report's M is 1, which is AdaGrad; no ``eigh`` is run.
      update_interval: k, the steps from one inverse root to the next. Before step k
        there is also one at steps 1, 2, 4, 8, ..., as the first gradients change M
        most. U and diag H take up every gradient whatever it is. With 1000 blocks and
        0.9 million parameters a step took 9.9 times AdaGrad's at 1, 2.4 times at 10
        (``benchmarks.costs``).

    Returns:
      A ``GradientTransformationExtraArgs`` with the state :class:`ScaleByBMAState`.
      Updates keep the dtype of the gradients, float16 to float64; statistics are
      float32, or float64 for float64 parameters.

    Raises:
      TypeError: if ``partition`` is no rule or a number is none, or of 16 bits; at
        ``init`` and ``update``, if a leaf is no real floating array.
      ValueError: if ``form`` or ``estimator`` is unknown or a number is
        negative or NaN; at ``init``, if the rule does not fit the parameters; at
        ``update``, if the gradients are not of the structure and shapes that ``init``
        saw, or the state is of parameters of another dtype.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import bma_optax as bma
      >>> def f(x): return jnp.sum(x["a"] ** 2) + jnp.sum(x["a"] - x["b"]) ** 2
      >>> params = {"a": jnp.array([3.0, 2.0]), "b": jnp.array(2.0)}
      >>> tx = optax.chain(bma.scale_by_bma(), optax.scale(-1.0))
      >>> state = tx.init(params)
      >>> for _ in range(5):
      ...     updates, state = tx.update(jax.grad(f)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"Objective function: {f(params):.3f}")
      Objective function: 8.673
      Objective function: 4.639
      Objective function: 2.788
      Objective function: 1.784
      Objective function: 1.165

    Source: the report's slides "Application to AdaGrad" and "AdaGrad-BMA"; Lu, Harandi,
    Hartley and Pascanu, `arXiv 1804.05484 <https://arxiv.org/abs/1804.05484>`_, 2018.
    """
    _rules.check_rule(partition)
    _inverse_root.check_estimator(estimator)
    if form not in _FORMS:
        raise ValueError(f"`form` must be one of {_FORMS}, got {form!r}.")
    _checks.not_negative(
        initial_accumulator_value=initial_accumulator_value,
        eps=eps,
        min_eigenvalue=min_eigenvalue,
    )
    _checks.at_least_one(update_interval=update_interval)
    update_interval = _checks.plain(update_interval)

    def init_fn(params):
        params = _tree.parameters(params)
        blocks = _build.dense_partition(params, partition)
        sum_of_squares = jax.tree.map(
            lambda p: jnp.full_like(
                p, initial_accumulator_value, dtype=_tree.statistic_dtype(p)
            ),
            params,
        )
        U, v, inverse_root = _inverse_root.start(blocks, sum_of_squares)
        return ScaleByBMAState(
            count=jnp.zeros((), jnp.int32),
            sum_of_squares=sum_of_squares,
            U=U,
            v=v,
            inverse_root=inverse_root,
            failures=jnp.sum(v).astype(jnp.int32),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        _tree.check_statistics(params, state.sum_of_squares)
        updates = _tree.like_init(updates, state.sum_of_squares)
        state = _tree.whole(state, "count", "failures")
        updates, state = _tree.arrays((updates, state))
        blocks = _build.layout(updates, partition)
        blocks.check_state(state.U.shape)
        kind = _inverse_root.chosen(estimator, blocks)

        # The passes over memory: g and h to h; sums of g and of √h; g and h to r, in
        # the gradient's place where it is donated; a sum of r; r and h to the update.
        # XLA on CPU makes a sum one pass with the arithmetic before it, but not with a
        # comparison or with another sum, and stores what two passes share: hence a bare
        # root, and r written once, where it will become the update.

        # Gather: diag H, U.
        g = _tree.astype(updates, state.sum_of_squares)
        h = jax.tree.map(_add_square, g, state.sum_of_squares)
        U = state.U + _inverse_root.outer(blocks, blocks.block_sums(g))

        # The small matrix and its root.
        def refresh():
            v = _inverse_root.root_sums(blocks, h, eps, state.v)
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
        power = -0.5 if form == "left" else -0.25
        r = jax.tree.map(lambda g, h: g * _scale(h, eps, power), g, h)
        correction = blocks.expand(
            _inverse_root.correction(blocks, inverse_root, blocks.block_sums(r)), r
        )
        start = initial_accumulator_value
        result = jax.tree.map(
            lambda r, c, h: r + jnp.where(h > jnp.asarray(start, h.dtype), c, 0),
            r,
            correction,
            h,
        )
        if form == "symmetric":
            result = jax.tree.map(
                lambda x, h: x * _scale(h, eps, power), result, _xla.recompute(h)
            )
        return _tree.astype(result, updates), ScaleByBMAState(
            count=optax.safe_increment(state.count),
            sum_of_squares=h,
            U=U,
            v=v,
            inverse_root=inverse_root,
            failures=failures,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def adagrad_bma(
    learning_rate: optax.ScalarOrSchedule,
    partition: _rules.Rule = _rules.per_leaf,
    *,
    initial_accumulator_value: jax.typing.ArrayLike = 0.0,
    eps: jax.typing.ArrayLike = 1e-7,
    min_eigenvalue: jax.typing.ArrayLike = 0.3,
    form: str = "left",
    estimator: str | None = None,
    update_interval: jax.typing.ArrayLike = 1,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaGrad with a block mean approximation of the full matrix.

    .. math:: \theta \leftarrow \theta - \eta \, F^{-1/2} Z^{-1} g

    Args:
      learning_rate: a number or a schedule.
      partition: see :func:`scale_by_bma`, as for the arguments below.
      initial_accumulator_value: the start of diag H.
      eps: added to diag H inside the root.
      min_eigenvalue: the least eigenvalue of M.
      form: "left" or "symmetric".
      estimator: "report", "projection" or None.
      update_interval: steps from one inverse root to the next.

    Returns:
      ``optax.chain(scale_by_bma(...), optax.scale_by_learning_rate(learning_rate))``.

    Raises:
      TypeError, ValueError: as :func:`scale_by_bma`.

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

    Source: the report's slide "AdaGrad-BMA".
    """
    return optax.chain(
        scale_by_bma(
            partition,
            initial_accumulator_value=initial_accumulator_value,
            eps=eps,
            min_eigenvalue=min_eigenvalue,
            form=form,
            estimator=estimator,
            update_interval=update_interval,
        ),
        _rates.scale(learning_rate),
    )


def _add_square(g, h):
    """diag H takes g² up, but for a gradient that is not finite."""
    return jnp.where(jnp.isfinite(g), h + jnp.square(g), h)


def _scale(h, eps, power):
    """(h + eps)^power, and 0 where there has been no gradient, as ``scale_by_rss``."""
    alive = h > 0
    shifted = jnp.where(alive, h, 1) + jnp.asarray(eps, h.dtype)
    root = jax.lax.rsqrt(shifted if power == -0.5 else jnp.sqrt(shifted))
    return jnp.where(alive, root, 0)
