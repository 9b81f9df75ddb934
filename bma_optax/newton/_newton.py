"""Newton-BMA: the direction C g of Lu et al. 2018, eq. 1 and 3, with true curvature G.

    C = Z^-1 [Λ̄^-1 (I - E Eᵀ) + E M^-1 Eᵀ] Z^-1 = (Λ̄ z²)^-1 + 1 K 1ᵀ

with z² = |diag G|, the normalised block indicators E, weighted by z, and the plain
indicators 1. A refresh, every so many steps, gathers N = 1ᵀ G 1 and diag G by
products with G, averages them and computes C. Every update applies the last C to the
gradient g. Trees have the shapes of the parameters; N and K are the arrays of the
coarse systems of ``multilevel``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bma_optax import _checks, _control_flow, _random, _refresh, _sharding, _tree
from bma_optax.curvature import _kinds, _probing
from bma_optax.curvature._kinds import Curvature
from bma_optax.curvature._probing import LinearOperator
from bma_optax.multilevel import _two_level
from bma_optax.partitions import _rules


class ScaleByNewtonBMAState(NamedTuple):
    """State of :func:`scale_by_newton_bma`, for L blocks.

    N, K and Λ are tuples with one part for each coarse system. Without blocks each is
    one empty array.

    - The first part belongs to the dense groups, if there are any. N and K have one
      array of shape (c, n, n) for each number n of blocks that c groups have; Λ has
      shape (L,) for the L blocks of these groups.
    - One part follows for each grid. For f fields on a grid of cells, with o offsets
      between cells that meet, N is a stencil of shape ``(f, f, *o, *cells)``. K is a
      named tuple of arrays of shape ``(f, *cells)`` and of the levels below. Λ has
      shape ``(f, *cells)``. With k columns a block (slopes beside the mean), N has f k
      in the place of f, and K f k k.

    ``optax.tree.map_params`` gives each of the three as a whole to
    ``transform_non_params``, which must then map over a tree.

    Example:
      >>> import jax.numpy as jnp, bma_optax as bma
      >>> state = bma.scale_by_newton_bma().init({"w": jnp.ones((2, 3))})
      >>> ((N,),) = state.N
      >>> state.inverse_diagonal["w"].shape, N.shape
      ((2, 3), (1, 1, 1))
    """

    count: jax.Array  # type: ignore[assignment]  # shape (), int32: steps taken.
    key: jax.Array  # shape (2,), uint32: the data of a random key; constant.
    inverse_diagonal: optax.Updates  # like params: 1 / (Λ̄ z²).
    Lambda: Any  # the damped Λ, a number for each block.
    K: Any  # (M^-1 - Λ^-1) / (n nᵀ) of the last finite factor.
    N: Any  # 1ᵀ G 1, the block sums of G, averaged over refreshes.
    refreshes: jax.Array  # shape (), int32: finite factors so far.
    damping: jax.Array  # shape (): μ of the last finite factor.
    products: jax.Array  # shape (), int32: products with G so far.
    failures: jax.Array  # shape (), int32: factors that were not finite.
    coarse_ratio: jax.Array  # shape (): min eig(M) / median(Λ).
    floored: jax.Array  # shape (), int32: eigenvalues of M negative or below the floor.
    local: jax.Array  # shape (), bool: whether G reached no further than declared.


def scale_by_newton_bma(
    partition: _rules.Rule = _rules.per_leaf,
    *,
    curvature: Curvature = _kinds.Hessian(),  # noqa: B008 - a frozen value.
    update_interval: jax.typing.ArrayLike | None = 10,
    b2: jax.typing.ArrayLike = 0.0,
    damping: jax.typing.ArrayLike = 0.0,
    min_eigenvalue: jax.typing.ArrayLike = 0.0,
    key: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales updates by the inverse of a block mean of true curvature (Newton-BMA).

    .. math::
        C = Z^{-1} [\bar\Lambda^{-1} (I - E E^T) + E M^{-1} E^T] Z^{-1}, \qquad
        z^2 = |\mathrm{diag}\, G|, \quad F = Z^{-1} G Z^{-1}, \quad M = E^T F E, \quad
        \Lambda_i = \frac{s_i - M_{ii}}{s_i - 1}

    G is the curvature in Lu et al. 2018, eq. 1. Column i of E is z on block i, which
    has s_i elements, scaled to norm 1, and 0 elsewhere. The direction :math:`C g` is
    Newton's method on the L block means, and a diagonal smoother on everything else.

    M is exact. It costs L products with G, and four more measure the rounding of M. A
    rule that declares a ``reach`` (:func:`per_tile`) needs a number of products that
    does not depend on L: for neighbours in two dimensions 10, with the diagonal.
    Elsewhere the diagonal costs up to ``curvature.num_probes`` products. Where every
    block has one element it costs none, and the method is Newton's method itself.

    C is positive definite whatever G is, so :math:`-C g` is always a descent direction.
    If a new C is not finite, the last finite one stays; the first one is the identity.

    Args:
      partition: the rule that cuts the parameters into blocks, such as
        ``bma.per_leaf``. An array without blocks is scaled by its diagonal. Each
        refresh checks the ``reach`` that a rule declares by a product with a random
        vector, to 16 times the rounding of such a product. It finds a weak pull between
        all elements too. If the reach is too small, ``update`` raises a ValueError
        outside ``jax.jit``. Inside it warns once, at run time, takes the diagonal alone
        for C, probed by random signs, and sets ``state.local`` to False. ``jax.export``
        cannot write such a warning: trace under ``warnings.simplefilter("ignore")``
        for it.
      curvature: what G is: ``bma.Hessian()``, ``bma.GaussNewton(...)`` or another
        :class:`Curvature`.
      update_interval: an integer >= 1, the steps from one refresh of C to the next. The
        first step has a refresh. Each refresh makes all products anew; if the curvature
        is constant, one is enough: pass None.
      b2: the decay of the averages of N and diag G over refreshes, a number in [0, 1).
        The averages are bias-corrected; they reduce the noise of mini-batches.
      damping: μ, a number >= 0. C is the inverse of the block mean of F + μ I, which
        has M + μ I in place of M and Λ + μ in place of Λ.
      min_eigenvalue: the floor of M's absolute eigenvalues, a number >= 0. The damping
        and the resolution of the dtype are floors too.
      key: a seed or a random key, for the probes and for ``bma.Fisher``.

    Returns:
      A ``GradientTransformationExtraArgs`` with the state
      :class:`ScaleByNewtonBMAState`. ``update`` takes ``value_fn``, the loss. It passes
      its other keywords to the functions that name them in their signatures:
      ``tx.update(grads, state, params, value_fn=loss, batch=batch)``. The keyword
      ``refresh``, a boolean, asks for a refresh at this step. The functions do not get
      ``refresh``, nor ``value`` and ``grad``, which are Optax's names. Under
      ``optax.masked`` or ``optax.partition`` these functions get the tree that the
      wrapper leaves, as do the functions of Optax's line searches.

      An array whose whole gradient is 0 gets no update. Such an array is frozen, as by
      ``optax.chain(optax.masked(optax.set_to_zero(), frozen), tx)``, or it waits for
      its first gradient, as the layers below a layer that starts at 0 do for one step.

    Raises:
      TypeError: if ``partition`` is not a rule or ``curvature`` is not a curvature; at
        ``init``, if a leaf is not a real floating array.
      ValueError: if a number is out of its range; at ``init``, if the rule does not fit
        the parameters; at ``update``, if ``params`` or a needed ``value_fn`` is
        missing, or if the gradients do not have the structure and shapes that ``init``
        saw.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import bma_optax as bma
      >>> def f(x): return jnp.sum(x["a"] ** 2) + jnp.sum(x["a"] - x["b"]) ** 2
      >>> params = {"a": jnp.array([3.0, 2.0]), "b": jnp.array(2.0)}
      >>> tx = optax.chain(bma.scale_by_newton_bma(), optax.scale(-1.0))
      >>> state = tx.init(params)
      >>> update = jax.jit(lambda g, s, p: tx.update(g, s, p, value_fn=f))
      >>> for _ in range(3):
      ...     updates, state = update(jax.grad(f)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"Objective function: {f(params):.3f}")
      Objective function: 0.000
      Objective function: 0.000
      Objective function: 0.000

    On quadratic losses, heavy ball is the cheapest step rule:
    ``optax.chain(scale_by_newton_bma(), optax.trace(0.45), optax.scale(-1.3))``. It
    needs the largest eigenvalue of C G to be below 2.2; that is about 1.9 for
    Laplacians and far more for blurs. The step rule of :func:`newton_bma` has no such
    condition.

    Source: Lu, Harandi, Hartley and Pascanu, `Block Mean Approximation for Efficient
    Second Order Optimization <https://arxiv.org/abs/1804.05484>`_, 2018, eq. 1 and 3.
    """
    _rules.check_rule(partition)
    _kinds.check_curvature(curvature)
    _checks.not_negative(damping=damping, min_eigenvalue=min_eigenvalue)
    _checks.below_one(b2=b2)
    if update_interval is not None:
        _checks.at_least_one(update_interval=update_interval)
    _checks.random_key(key)
    update_interval = _checks.plain(update_interval)

    def init_fn(params):
        params = _tree.parameters(params)
        method = _two_level.checked_two_level(params, partition)
        N, factor = method.initial(params)

        def zero():  # Makes a new array each time: donated buffers must not be shared.
            return jnp.zeros_like(factor.floored)

        return ScaleByNewtonBMAState(
            count=zero(),
            key=_probing.key_data(key) + zero().astype(jnp.uint32),
            N=N,
            refreshes=zero(),
            damping=jnp.full_like(factor.coarse_ratio, damping),
            products=zero(),
            failures=zero(),
            local=zero() == 0,
            **factor._asdict(),
        )

    def update_fn(
        updates,
        state,
        params=None,
        *,
        value=None,
        grad=None,
        value_fn=None,
        refresh=False,
        **extra_args,
    ):
        # Optax has these names for the loss and its gradient: no keyword of the loss.
        del value, grad
        _checks.flag(refresh=refresh)
        updates, state, params = _checked(updates, state, params)
        method = _two_level.two_level(updates, partition)
        method.check_state(state.N, state.K, state.Lambda)

        def renewed(state):
            key = state.key.astype(jnp.uint32)  # An average of states has floats.
            key_labels = jax.random.fold_in(_probing.typed_key(key), state.count)
            product = _kinds.product_at(
                curvature, params, key_labels, value_fn, extra_args
            )
            # Reuse the same probes at every refresh, so that C changes only when the
            # curvature does: conjugate directions need a constant C. When averaging
            # (b2 > 0), draw new ones: the average then reduces their noise.
            draw = jnp.where(jnp.asarray(b2) > 0, state.refreshes, 0)
            found = method.gather(
                curvature,
                LinearOperator(product, params),
                _random.fold(key, draw),
                extra_args,
                known_far=~state.local,
            )
            averaged = _averaged(method, found, state, b2)
            factor = method.invert(averaged, damping, min_eigenvalue)
            return _last_good(state, averaged, factor, damping)

        new = _refresh.in_place(update_interval, state.count, renewed, state, refresh)
        state = jax.tree.map(_sharding.alike, new, state)
        state = state._replace(K=method.replicate(state.K))
        result = method.apply(state.inverse_diagonal, state.N, state.K, updates)
        # An array whose gradient is 0 gets no update: with P the projection to the
        # other arrays, P C P is positive definite there and P C P g descends.
        result = _tree.zero_like(_tree.astype(result, updates), updates)
        return result, state._replace(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _checked(updates, state, params):
    """Returns the three with JAX's arrays, after checking that they fit each other."""
    _checks.given(params)
    _tree.check_statistics(params, state.inverse_diagonal)
    updates = _tree.like_init(updates, state.inverse_diagonal)
    params = _tree.like_init(params, state.inverse_diagonal, "Parameter")
    updates, state, params = _tree.arrays((updates, state, params))
    counters = "count", "refreshes", "products", "failures", "floored"
    return updates, _tree.whole(state, *counters, flags=("local",)), params


def _averaged(method, found, state, b2):
    """Returns ``found`` with the bias-corrected averages of N and diag G."""
    if isinstance(b2, (int, float)) and b2 == 0:
        return found
    last = method.diagonal(state.inverse_diagonal, state.Lambda, state.damping)
    b = _as(state.coarse_ratio, b2)
    # The weight of the new numbers is 1 at the first refresh.
    weight = (1 - b) / (1 - b ** (state.refreshes + 1).astype(b.dtype))
    N, diagonal = jax.tree.map(
        lambda new, old: (1 - _as(new, weight)) * old + _as(new, weight) * new,
        (found.N, found.diagonal),
        (state.N, last),
    )
    return found._replace(N=N, diagonal=diagonal)


def _last_good(state, found, factor, damping):
    """The state with this factor, or with its last one if this one is not finite."""
    refreshed = state._replace(
        N=found.N,
        refreshes=optax.safe_increment(state.refreshes),
        damping=jnp.full_like(state.damping, damping),
        local=found.local,
        **factor._asdict(),
    )
    failed = state._replace(failures=optax.safe_increment(state.failures))
    # A branch, because XLA would compute the condition anew for each array it selects.
    finite = _tree.all_finite((factor, found.N, found.diagonal))
    chosen = _control_flow.cond(finite, lambda: refreshed, lambda: failed)
    return chosen._replace(products=state.products + found.products)


def _as(like, number):
    return jnp.asarray(number).astype(like.dtype)
