"""Newton-BMA: eq. (1) and (3) with true curvature."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bma_optax import _checks, _refresh, _tree
from bma_optax.curvature import _kinds, _probing, _user_functions
from bma_optax.curvature._kinds import Curvature
from bma_optax.multilevel import _gather, _two_level
from bma_optax.newton import _damping
from bma_optax.partitions import _rules


class ScaleByNewtonBMAState(NamedTuple):
    """State of :func:`scale_by_newton_bma`, for L blocks.

    With several groups (:func:`within`) the L x L arrays hold the groups' small
    matrices one after the other, shape (Σ L_group²,).

    Example:
      >>> import jax.numpy as jnp, bma_optax as bma
      >>> state = bma.scale_by_newton_bma().init({"w": jnp.ones((2, 3))})
      >>> state.inverse_diagonal["w"].shape, state.N.shape
      ((2, 3), (1, 1))
    """

    count: jax.Array  # type: ignore[assignment]  # shape (), int32: steps taken.
    key: jax.Array  # shape (2,), uint32: the numbers of a random key, never another.
    inverse_diagonal: optax.Updates  # like params: 1 / (Λ̄ z²).
    Lambda: jax.Array  # shape (L,): the damped Λ.
    K: jax.Array  # shape (L, L): (M^-1 - Λ^-1) / (n nᵀ) of the last good factor.
    N: jax.Array  # shape (L, L): block sums of G, averaged.
    refreshes: jax.Array  # shape (), int32: factors made.
    damping: jax.Array  # shape ().
    previous_params: optax.Params  # like params if the damping adapts, else ().
    products: jax.Array  # shape (), int32: products with G spent.
    failures: jax.Array  # shape (), int32: factors that were not finite.
    coarse_ratio: jax.Array  # shape (): min eig(M) / median(Λ).
    floored: jax.Array  # shape (), int32: eigenvalues of M negative or below the floor.
    local: jax.Array  # shape (), bool: whether G reached no further than declared.


def scale_by_newton_bma(
    partition: _rules.Rule = _rules.per_leaf,
    *,
    curvature: Curvature = _kinds.Hessian(),  # noqa: B008 - a frozen value.
    update_interval: jax.typing.ArrayLike = 10,
    b2: jax.typing.ArrayLike = 0.0,
    damping: jax.typing.ArrayLike = 0.0,
    adaptive_damping: bool = False,
    min_eigenvalue: jax.typing.ArrayLike = 0.0,
    key: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales updates by the inverse of a block mean of true curvature (Newton-BMA).

    .. math::
        C = Z^{-1} [\bar\Lambda^{-1} (I - E E^T) + E M^{-1} E^T] Z^{-1}, \qquad
        z^2 = |\mathrm{diag}\, G|, \quad F = Z^{-1} G Z^{-1}, \quad M = E^T F E, \quad
        \Lambda_i = \frac{s_i - M_{ii}}{s_i - 1}

    for the curvature G of eq. (1), with E weighted by z inside each block: a diagonal
    smoother, plus Newton's method on the L block means. M is exact and costs L products
    with G and four more, which tell what rounding leaves of it; the diagonal costs up
    to ``curvature.num_probes`` (none where every block has one element, which is
    Newton's method itself). No d x d matrix is built.

    C is positive definite whatever G is, so :math:`-C g` is always a descent direction.
    A factor that is not finite is not taken: the last good one (at first the
    identity) stays.

    Args:
      partition: the rule that cuts parameters into blocks, ``bma.per_leaf`` and so on.
        An array without blocks is scaled by its diagonal. Each refresh checks a
        ``reach`` that the rule declares (:func:`per_tile`) by products with a random
        vector, to what the arithmetic of the loss resolves. Where it is not true,
        ``update`` raises a ValueError outside ``jax.jit``; within it warns once, at
        run time, takes the diagonal alone, by random signs, and sets ``state.local``
        to False. ``jax.export`` cannot write such a warning: trace under
        ``warnings.simplefilter("ignore")`` for it.
      curvature: what G is: ``bma.Hessian()``, ``bma.GaussNewton(...)``, ...
      update_interval: steps from one refresh of the factor to the next; the first step
        has one. A constant curvature needs no other; each costs all products anew.
      b2: the decay of the averages of N and diag G over refreshes, in [0, 1); for
        mini-batches. Bias-corrected.
      damping: μ >= 0: the inverse is that of the block mean of F + μ I, that is M + μ I
        and Λ + μ.
      adaptive_damping: whether μ follows Levenberg and Marquardt's rule from there: at
        a refresh it is halved if the last step's decrease of the loss was above 3/4
        of what the quadratic model at its start foretold, and doubled if it was below
        1/4. This costs a gradient and a product a refresh, and a copy of the
        parameters.
      min_eigenvalue: the least eigenvalue of M, >= 0. Below it, the damping, and what
        the dtype resolves, absolute eigenvalues are raised to these.
      key: a seed or a random key, for the probes and for ``bma.Fisher``.

    Returns:
      A ``GradientTransformationExtraArgs`` with the state
      :class:`ScaleByNewtonBMAState`. ``update`` takes ``value_fn``, the loss, and
      passes its other keywords to the functions that name them in their signatures:
      ``tx.update(grads, state, params, value_fn=loss, batch=batch)``. Under
      ``optax.masked`` or ``optax.partition`` these functions get the tree that the
      wrapper leaves, as those of Optax's line searches do.

      An array whose whole gradient is 0 gets no update: it is frozen, by
      ``optax.chain(optax.masked(optax.set_to_zero(), frozen), tx)``, or waits until it
      has one, as layers below one that starts at 0 do for a step.

    Raises:
      TypeError: if ``partition`` is no rule or ``curvature`` no curvature; at ``init``,
        if a leaf is no real floating array.
      ValueError: if a number is out of its range; at ``init``, if the rule does not fit
        the parameters; at ``update``, without ``params`` or a needed ``value_fn``, or
        if the gradients are not of the structure and shapes that ``init`` saw.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import bma_optax as bma
      >>> def f(x): return jnp.sum(x["a"] ** 2) + jnp.sum(x["a"] - x["b"]) ** 2
      >>> params = {"a": jnp.array([3.0, 2.0]), "b": jnp.array(2.0)}
      >>> tx = optax.chain(bma.scale_by_newton_bma(), optax.scale(-1.0))
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     updates, state = tx.update(jax.grad(f)(params), state, params, value_fn=f)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"Objective function: {f(params):.3f}")
      Objective function: 0.000
      Objective function: 0.000
      Objective function: 0.000

    For quadratic losses heavy ball costs least, ``optax.chain(scale_by_newton_bma(),
    optax.trace(0.45), optax.scale(-1.3))``, where the largest eigenvalue of C G is
    below 2.2 (about 1.9 for Laplacians, far more for blurs). :func:`newton_bma`, with
    its own step rule, has no such condition.

    Source: the report's eq. (1) and (3).
    """
    _rules.check_rule(partition)
    _kinds.check_curvature(curvature)
    _checks.not_negative(damping=damping, min_eigenvalue=min_eigenvalue)
    _checks.below_one(b2=b2)
    _checks.at_least_one(update_interval=update_interval)
    _checks.random_key(key)
    update_interval = _checks.plain(update_interval)
    _checks.boolean(adaptive_damping=adaptive_damping)
    if adaptive_damping and _checks.is_zero(damping):
        raise ValueError("`adaptive_damping` needs a `damping` above 0 to start from.")

    def init_fn(params):
        params = _tree.parameters(params)
        blocks, systems = _gather.plan(params, partition, warn=True)
        inverse = _two_level.identity(systems, blocks, params)

        def zero():  # A new one each time: donated buffers must not be shared.
            return jnp.zeros_like(inverse.floored)

        return ScaleByNewtonBMAState(
            count=jnp.zeros((), jnp.int32),
            key=_probing.key_data(key),
            inverse_diagonal=inverse.inverse_diagonal,
            Lambda=inverse.Lambda,
            K=inverse.K,
            N=0 * inverse.coarse_ratio
            + jnp.zeros(_two_level.shapes(systems)[0], inverse.K.dtype),
            refreshes=zero(),
            damping=jnp.zeros_like(inverse.coarse_ratio)
            + jnp.asarray(damping).astype(inverse.coarse_ratio.dtype),
            previous_params=_tree.zeros_like(params) if adaptive_damping else (),
            products=zero(),
            failures=zero(),
            coarse_ratio=inverse.coarse_ratio,
            floored=zero(),
            local=zero() == 0,
        )

    def update_fn(updates, state, params=None, *, value_fn=None, **extra_args):
        if params is None:
            raise ValueError(
                "`update` needs the parameters here. Pass update(grads, state, params, "
                "...)."
            )
        _tree.check_statistics(params, state.inverse_diagonal)
        updates = _tree.like_init(updates, state.inverse_diagonal)
        updates, state, params = _tree.arrays((updates, state, params))
        random_key = _probing.typed_key(state.key)
        state = _tree.whole(
            state,
            *("count", "refreshes", "products", "failures", "floored"),
            flags=("local",),
        )
        blocks, systems = _gather.plan(updates, partition)
        blocks.check_state(
            state.N.shape,
            state.K.shape,
            expected=_two_level.shapes(systems),
        )

        def refresh():
            # The same probes at every refresh, or the directions that conjugate
            # gradients build would lose their meaning; new ones where averages gain.
            again = jnp.where(jnp.asarray(b2) > 0, state.refreshes, 0)
            key_labels = jax.random.fold_in(random_key, state.count)

            def linearize(params):
                return _kinds.product_at(
                    curvature, params, key_labels, value_fn, extra_args
                )

            if adaptive_damping:
                adapted = _damping.levenberg_marquardt(
                    state.damping,
                    _user_functions.loss(value_fn, extra_args),
                    linearize,
                    _tree.astype(state.previous_params, params),
                    params,
                )
                mu = jnp.where(state.count > 0, adapted, state.damping)
            else:
                mu = jnp.full_like(state.damping, damping)

            # Gather: N and diag G.
            product = linearize(params)
            key_probes = jax.random.fold_in(random_key, again)
            N, diagonal, rounding, local, products = _gather.gather(
                curvature,
                systems,
                blocks,
                product,
                params,
                key_probes,
                extra_args,
                known=~state.local,
            )
            N = N.reshape(state.N.shape)
            if not (isinstance(b2, (int, float)) and b2 == 0):
                last = _two_level.diagonal_of(
                    blocks, state.inverse_diagonal, state.Lambda, state.damping
                )
                b = jnp.asarray(b2).astype(N.dtype)
                weight = (1 - b) / (1 - b ** (state.refreshes + 1).astype(N.dtype))
                N, diagonal = jax.tree.map(
                    lambda new, old: _average(new, old, weight.astype(new.dtype)),
                    (N, diagonal),
                    (state.N, last),
                )

            # The small matrix and its inverse.
            inverse = _two_level.invert(
                systems, blocks, N, diagonal, rounding, mu, min_eigenvalue, local
            )
            refreshed = state._replace(
                inverse_diagonal=inverse.inverse_diagonal,
                Lambda=inverse.Lambda,
                K=inverse.K,
                N=N,
                refreshes=optax.safe_increment(state.refreshes),
                damping=mu,
                coarse_ratio=inverse.coarse_ratio,
                floored=inverse.floored,
                local=local,
            )
            failed = state._replace(failures=optax.safe_increment(state.failures))
            finite = _tree.all_finite((inverse, N, diagonal))
            chosen = jax.tree.map(
                lambda x, y: x if x is y else jnp.where(finite, x, y),
                refreshed,
                failed,
            )
            return chosen._replace(
                products=state.products + products + int(adaptive_damping)
            )

        state = _refresh.every(update_interval, state.count, refresh, state)

        # Apply.
        result = _two_level.apply(
            systems,
            blocks,
            state.inverse_diagonal,
            state.K,
            updates,
        )
        # An array without a gradient is frozen, or at rest: P C P is positive definite
        # on the others, where P C g were no descent direction.
        result = _tree.zero_like(_tree.astype(result, updates), updates)
        return result, state._replace(
            count=optax.safe_increment(state.count),
            previous_params=_tree.astype(params, state.previous_params)
            if adaptive_damping
            else (),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _average(new, old, weight):
    """The bias-corrected moving average: ``new`` alone at the first refresh."""
    return (1 - weight) * old + weight * new
