"""AdaGrad-BMA: AdaGrad with a block mean approximation of its matrix, Lu et al. 2018.

For gradients g with block sums u, shape (L,), the statistics are diag H = Σ g², shaped
like the parameters, and U = Σ u uᵀ, shape (L, L). With Z = (diag H + eps)^½ and v the
block sums of Z's diagonal, shape (L,), in which eps is added to the squared means, the
update is

    F^-½ Z^-1 g,   F^-½ = I + E (M^-½ - I) Eᵀ,   M = I + (U - diag U) / (v vᵀ).

E is the d x L matrix of normalised block indicators; no array of d x d or d x L
elements is built. ``_inverse_root`` computes M, its inverse root and the correction.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bma_optax import _checks, _refresh, _sharding, _tree, _xla
from bma_optax.adaptive import _columns, _inverse_root
from bma_optax.partitions import _build, _rules

_FORMS = ("left", "symmetric")


class ScaleByBMAState(NamedTuple):
    """State of :func:`scale_by_bma`, for L blocks.

    With several groups of blocks (:func:`within`), the L x L arrays hold the small
    matrices of the groups one after the other, shape (Σ L_group²,).

    Example:
      >>> import jax.numpy as jnp, bma_optax as bma
      >>> state = bma.scale_by_bma().init({"w": jnp.ones((2, 3)), "b": jnp.ones(3)})
      >>> state.sum_of_squares["w"].shape, state.U.shape, state.v.shape
      ((2, 3), (2, 2), (2,))
    """

    count: jax.Array  # type: ignore[assignment]  # shape (), int32: steps taken.
    sum_of_squares: optax.Updates  # like params, float32 or float64: diag H.
    U: jax.Array  # shape (L, L): sum of u uᵀ, u the block sums of g.
    v: jax.Array  # shape (L,): block sums of z at the last refresh.
    inverse_root: jax.Array  # shape (L, L): the last finite M^-½.
    failures: jax.Array  # shape (), int32: factorisations that were not finite.
    direction: optax.Updates | None = None  # a number an input: learned weights.


def scale_by_bma(
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
    r"""Scales updates by the inverse root of a block mean approximation (AdaGrad-BMA).

    AdaGrad-Full scales the gradient by the inverse root of the d x d matrix
    :math:`H = \sum g g^T`. AdaGrad-BMA replaces this matrix by :math:`Z F Z` with
    :math:`Z = (\mathrm{diag} H + \epsilon)^{1/2}` and

    .. math::
        F = I + E (M - I) E^T, \qquad
        M = I + \frac{U - \mathrm{diag} U}{v v^T}, \\
        u_i = \sum_{j \in i} g_j, \quad U = \sum u u^T, \quad
        v_i^2 = (\sum_{j \in i} (\mathrm{diag} H)_j^{1/2})^2 + s_i^2 \epsilon.

    Column i of E is :math:`1 / \sqrt{s_i}` on block i, which has s_i elements, and 0
    elsewhere. Therefore :math:`F^{-1/2} = I + E (M^{-1/2} - I) E^T`, which takes one
    ``eigh`` of size L x L for L blocks. The method is full-matrix AdaGrad on the L
    block means and diagonal AdaGrad on everything else. With one block it equals
    ``optax.scale_by_rss``; with ``per_element`` it is AdaGrad-Full.

    An element whose gradient has always been 0 does not move. Where an element of the
    gradient is not finite, the update of this element is not finite either, as in
    Optax. The step leaves the element out of diag H, and its block out of U and the
    correction.

    Args:
      partition: the rule that cuts the parameters into blocks, such as
        ``bma.per_leaf``; see :func:`bma_optax.partition`. An array without blocks gets
        plain AdaGrad.
      initial_accumulator_value: the initial value of diag H, a number >= 0. The default
        is 0, where Optax has 0.1: a large start dominates z and keeps M at the
        identity.
      eps: a number >= 0, added to diag H inside the root, and to the squared block
        means of that root. With ``per_element`` the method is then AdaGrad-Full of
        H + eps I.
      min_eigenvalue: the floor of M's eigenvalues, a number >= 0. M can be singular, as
        at the first step and in softmax layers. At 0 the floor is what the dtype
        resolves beside the largest eigenvalue: 4 √L times the machine epsilon times it.
        At 1 the update along block means can shrink but not grow. None stands for 1
        with "projection", and for 0.3 with "report", which bounds the growth of the
        norm by 1.8. A small block that sees a large one can still move far, and against
        its gradient, while the gradients of both have one sign. With "report" deeper
        networks can diverge below 0.1 at the second step, where M is nearly singular;
        on digits the value changes little (``benchmarks.costs``). Pass 0 for
        AdaGrad-Full to the letter.
      form: "left" for the update :math:`F^{-1/2} Z^{-1} g`. "symmetric" for
        :math:`Z^{-1/2} F^{-1/2} Z^{-1/2} g`, which is always a descent direction, but
        large where z is tiny and blocks are fine: with ``per_unit`` on digits its
        largest entry was 13.5, against 2.0 with "left" (``benchmarks.costs``).
      estimator: "report" for the M above, which Lu et al. 2018 use. "projection" for
        :math:`M = S^{1/2} \frac{U}{v v^T} S^{1/2}` with S = diag(s) and the diagonal of
        U included: eq. 2 applied to :math:`Z^{-1} H Z^{-1}`. "report" shrinks the
        off-diagonal entries of that M by :math:`\sqrt{s_i s_j}`. None decides group by
        group: "projection" for a block alone, as under ``bma.units``, where "report"
        has M = 1 and equals AdaGrad, and neither needs an ``eigh``; "report" for blocks
        that see each other, and for all if the rule sets no bounds.
      weights: "constant" for the block sums above. "learned" for weighted sums: the
        units of an array share a unit vector q over their s inputs, which takes the
        place of :math:`1 / \sqrt{s}` in E and follows the leading direction of the
        rows R of :math:`Z^{-1} g` by one step of power iteration a step: :math:`y
        \leftarrow 0.95 y + 0.05 R^T R q / \|R^T R q\|`, q = y / ‖y‖, from plain means.
        It needs the estimator "projection" and stores one number an input. The blocks
        of an array must be of one shape. An array of one block, or of blocks of one
        element, keeps constant weights. With the form "symmetric" R has the rows of
        :math:`Z^{-1/2} g`.
      update_interval: k, an integer >= 1: the steps from one computation of M^-½ to the
        next. M^-½ is also computed at steps 1, 2, 4, 8, ... below k, because the first
        gradients change M most. Every gradient enters U and diag H, whatever k is. With
        1000 blocks and 0.9 million parameters a step took 9.4 times as long as
        AdaGrad's with k = 1, and 2.3 times with k = 10 (``benchmarks.costs``).

    Returns:
      A ``GradientTransformationExtraArgs`` with the state :class:`ScaleByBMAState`.
      Updates keep the dtype of the gradients, float16 to float64. Statistics are
      float32, or float64 for float64 parameters.

    Raises:
      TypeError: if ``partition`` is not a rule, or if a number is not one or has 16
        bits; at ``init`` and ``update``, if a leaf is not a real floating array.
      ValueError: if ``form``, ``estimator`` or ``weights`` is unknown, or if a number
        is negative or NaN; at ``init``, if the rule does not fit the parameters, or if
        learned weights have the estimator "report"; at ``update``, if the gradients do
        not have the structure and shapes that ``init`` saw, or if the state belongs to
        parameters of another dtype, to another partition or to other weights.

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

    Source: Lu, Harandi, Hartley and Pascanu, `Block Mean Approximation for Efficient
    Second Order Optimization <https://arxiv.org/abs/1804.05484>`_, 2018, slides
    "Application to AdaGrad" and "AdaGrad-BMA".
    """
    _rules.check_rule(partition)
    _checks.one_of(_inverse_root.ESTIMATORS, estimator=estimator)
    _checks.one_of(_columns.WEIGHTS, weights=weights)
    _checks.one_of(_FORMS, form=form)
    _checks.not_negative(
        initial_accumulator_value=initial_accumulator_value,
        eps=eps,
        min_eigenvalue=_inverse_root.floor(min_eigenvalue, estimator),
    )
    _checks.at_least_one(update_interval=update_interval)
    update_interval = _checks.plain(update_interval)

    def init_fn(params):
        params = _tree.parameters(params)
        blocks = _build.dense_partition(params, partition)
        sum_of_squares = jax.tree.map(
            lambda x: _sharding.alike(jnp.full_like(x, initial_accumulator_value), x),
            _tree.zeros_like(params, _tree.statistic_dtype),
        )
        _inverse_root.by_bucket(estimator, blocks, weights)
        U, v, inverse_root = _inverse_root.start(blocks, sum_of_squares)
        return ScaleByBMAState(
            count=_tree.no_steps(v),
            sum_of_squares=sum_of_squares,
            U=U,
            v=v,
            inverse_root=inverse_root,
            failures=_tree.no_steps(v),
            direction=_columns.start(weights, blocks, sum_of_squares),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        _tree.check_statistics(params, state.sum_of_squares)
        updates = _tree.like_init(updates, state.sum_of_squares)
        state = _tree.whole(state, "count", "failures")
        updates, state = _tree.arrays((updates, state))
        blocks = _build.layout(updates, partition)
        blocks.check_state(state.U.shape)
        _columns.check_state(weights, blocks, state.direction)
        estimators = _inverse_root.by_bucket(estimator, blocks, weights)
        columns = _columns.Columns(blocks, state.direction)

        # A step passes over memory to update h, to sum g, √h and r, and to write the
        # update, in the memory of g where g is donated. XLA on CPU makes no pass of two
        # sums. Sums over large units compute r, and the update computes it again. Over
        # a whole array a sum would take in no comparison: r is written for it, once,
        # where the update will be, and the root has no comparison.

        # Gather diag H (h) and U.
        g, old = _tree.astype(updates, state.sum_of_squares), state.sum_of_squares
        h = jax.tree.map(_add_square, g, old)
        u = columns.sums(g)
        U = state.U + _inverse_root.outer(blocks, u)

        # Compute M and its inverse root.
        def refresh():
            v = _inverse_root.root_sums(columns, h, eps)
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

        # Apply them to r = Z^-1 g: the update is r + E (M^-½ - I) Eᵀ r.
        power = -0.5 if form == "left" else -0.25
        # With learned weights XLA would copy g, unless its sums come before r.
        later = eps if weights == "constant" else _xla.after_on_cpu(eps, u)

        def scale(g, h):
            return g * _scale(h, later, power)

        def anew(g, old, *earlier):
            """h and r in a pass of their own, after what is earlier."""
            g, old, *earlier = _xla.second_pass((g, old, *earlier))
            h = jax.tree.map(_add_square, g, old)
            return h, jax.tree.map(scale, g, h), *earlier

        # A branch for v stores h, so that one pass is left.
        one_pass = not _refresh.at_each_step(update_interval)
        r = jax.tree.map(scale, g, h)
        sums = columns.sums_of(scale, r, g, h)
        along = _inverse_root.correction(blocks, inverse_root, sums)
        if weights == "learned" and not one_pass:
            _, r, sums = anew(g, old, sums)
        direction = columns.turned(r, sums)
        if not one_pass:
            h, r, along = anew(g, old, along)
        # The update takes the memory of r, which the next directions are made of.
        y = jax.tree.map(_xla.after_on_cpu, state.direction, direction)
        correction = _columns.Columns(blocks, y).expand(along, r)
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
            direction=direction,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _add_square(g, h):
    """h + g², and h where g is not finite; arrays of one shape."""
    return jnp.where(jnp.isfinite(g), h + jnp.square(g), h)


def _scale(h, eps, power):
    """(h + eps)^power, and 0 where h is 0, as in ``optax.scale_by_rss``."""
    alive = h > 0
    shifted = jnp.where(alive, h, 1) + jnp.asarray(eps, h.dtype)
    root = jax.lax.rsqrt(shifted if power == -0.5 else jnp.sqrt(shifted))
    return jnp.where(alive, root, 0)
