"""The step rule of Newton-BMA: the length of a step, and its momentum.

    δ = a Δ + b δ_previous,   (a, b) = argmin gᵀδ + δᵀGδ / 2

for a direction Δ, the gradient g and the curvature G, all on trees like the parameters.
G Δ is the one product of a step. G δ_previous is the difference of the gradients after
and before that step, the mean Hessian along it. Both give the 2 x 2 matrix of the
quadratic model; backtracking on the loss then shortens the step if it needs to.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bma_optax import _checks, _sharding, _tree
from bma_optax.curvature import _kinds, _probing, _user_functions
from bma_optax.curvature._kinds import Curvature
from bma_optax.curvature._probing import LinearOperator
from bma_optax.newton import _backtracking

# The error of the model above which the previous step is forgotten.
_TRUST = 0.5


class ScaleByQuadraticModelState(NamedTuple):
    """State of :func:`scale_by_quadratic_model`.

    Example:
      >>> import jax.numpy as jnp, bma_optax as bma
      >>> state = bma.scale_by_quadratic_model().init(jnp.ones(3))
      >>> print(state.previous_step, state.learning_rate)
      [0. 0. 0.] 0.0
    """

    key: jax.Array  # shape (2,), uint32: the data of a random key; constant.
    previous_step: optax.Updates  # like params.
    previous_product: optax.Updates  # like params: G times the previous step.
    value: jax.Array  # shape (): the loss after the step; inf if that was shortened.
    grad: optax.Updates  # like params: the gradient there, where the value is finite.
    learning_rate: jax.Array  # shape (): a of the last step, backtracking included.
    momentum: jax.Array  # shape (): b of the last step, backtracking included.
    backtracking: jax.Array  # shape (): the part of the model's step that was taken.
    model_error: jax.Array  # shape (): |1 - decrease / foretold|, of a whole step.
    drift: jax.Array  # shape (): the sum of these errors since the last refresh of Δ.
    products: jax.Array  # shape (), int32: products with G so far.


def scale_by_quadratic_model(
    curvature: Curvature = _kinds.Hessian(),  # noqa: B008 - a frozen value.
    *,
    max_norm: jax.typing.ArrayLike | None = None,
    key: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Takes the best combination of a descent direction and the previous step.

    .. math::
        \delta = a \, \Delta + b \, \delta_{previous}, \qquad
        (a, b) = \arg\min_{a, b} \; g^T \delta + \tfrac12 \delta^T G \delta

    Δ are the incoming updates. One product with G and a 2 x 2 solve give a and b: the
    product with the previous step is the difference of the gradients after and before
    it. Backtracking then shortens δ until the loss falls by at least 1e-4 of the
    decrease that its slope predicts, up to the rounding of the loss. After 12 failed
    trials there is no step. The rule has nothing to tune. On a quadratic loss with a
    constant preconditioner it is the preconditioned conjugate gradient method. If the
    model is not convex, the absolute eigenvalues of the 2 x 2 matrix keep δ a descent
    direction, even if Δ is not. A step whose decrease the model missed by more than
    half is forgotten: the next one is along Δ alone.

    Args:
      curvature: what G is: ``bma.Hessian()`` or another :class:`Curvature`.
      max_norm: the largest global norm of a step, a number > 0. None sets no limit.
      key: a seed or a random key, for ``bma.Fisher``.

    Returns:
      A ``GradientTransformationExtraArgs`` with the state
      :class:`ScaleByQuadraticModelState`. ``update`` takes ``value_fn``, the loss, and
      passes its other keywords to the functions that name them. Like Optax's line
      searches it comes last in a chain and takes updates that descend. It also takes
      ``value`` and ``grad``, the loss and its gradient at ``params``, and keeps both
      for the new parameters, where ``optax.value_and_grad_from_state`` finds them: an
      argument of the loss must have another name than these two, or ``refresh``.
      Without the two it computes them itself; under one ``jax.jit`` XLA may merge this
      with the caller's.

    Raises:
      TypeError: if ``curvature`` is not a curvature; at ``update``, if ``value`` is not
        a number.
      ValueError: if ``max_norm`` is not positive; at ``update``, if ``params`` or
        ``value_fn`` is missing, or if ``grad`` is not like ``params``.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import bma_optax as bma
      >>> def f(x): return jnp.sum(jnp.array([1.0, 4.0, 9.0]) * x ** 2)
      >>> tx = optax.chain(optax.scale(-1.0), bma.scale_by_quadratic_model())
      >>> params = jnp.ones(3)
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     updates, state = tx.update(jax.grad(f)(params), state, params, value_fn=f)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"Objective function: {f(params):.6f}")
      Objective function: 1.904282
      Objective function: 0.427148
      Objective function: 0.000000

    Source: Martens and Grosse, `Optimizing neural networks with Kronecker-factored
    approximate curvature <https://arxiv.org/abs/1503.05671>`_, 2015, section 7.
    """
    _kinds.check_curvature(curvature)
    if max_norm is not None:
        _checks.positive(max_norm=max_norm)
    _checks.random_key(key)

    def init_fn(params):
        params = _tree.parameters(params)

        def zero():  # Makes a new array each time: donated buffers must not be shared.
            return 0 * _tree.vdot(_tree.zeros_like(params), _tree.zeros_like(params))

        return ScaleByQuadraticModelState(
            key=_probing.key_data(key) + zero().astype(jnp.uint32),
            previous_step=_tree.zeros_like(params),
            previous_product=_tree.zeros_like(params),
            value=zero() + jnp.inf,
            grad=_tree.zeros_like(params),
            learning_rate=zero(),
            momentum=zero(),
            backtracking=zero(),
            model_error=zero(),
            drift=zero(),
            products=zero().astype(jnp.int32),
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
        _checks.given(params)
        _checks.flag(refresh=refresh)
        _tree.check_statistics(params, state.previous_step)
        updates = _tree.like_init(updates, state.previous_step)
        params = _tree.like_init(params, state.previous_step, "Parameter")
        state = _tree.whole(state, "products")
        updates, state, params = _tree.arrays((updates, state, params))
        f = _user_functions.loss(value_fn, extra_args)
        value_and_grad = jax.value_and_grad(f)
        if value is None or grad is None:
            value, grad = value_and_grad(params)
        else:
            value, grad = _user_functions.value_and_grad(value, grad, params)
        key = jax.random.fold_in(_probing.typed_key(state.key), state.products)
        product = _kinds.product_at(curvature, params, key, value_fn, extra_args)
        dtype = state.learning_rate.dtype
        direction, previous, previous_product = (
            jax.tree.map(_sharding.typed_like, _tree.astype(x, params), params)
            for x in (updates, state.previous_step, state.previous_product)
        )
        previous = _tree.zero_like(previous, updates)
        curved = LinearOperator(product, params)(direction)
        a, b, slope, bend = _minimise(
            grad, direction, previous, curved, previous_product, dtype
        )
        step = _combine(a, direction, b, previous)
        if max_norm is not None:
            square = _tree.vdot(step, step).astype(dtype)
            limit = jnp.asarray(max_norm).astype(dtype)
            long = square > jnp.square(limit)
            part = jnp.where(long, limit * jax.lax.rsqrt(jnp.where(long, square, 1)), 1)
            a, b, slope, bend = (x * part for x in (a, b, slope, bend * part))
            step = _scale(part, step)
        # Most steps are taken whole, and the gradient there is the next one.
        value = value.astype(dtype)
        new_value, new_grad = value_and_grad(
            _backtracking.moved(params, jnp.ones((), dtype), step)
        )
        new_value = new_value.astype(dtype)
        t = _backtracking.backtrack(f, params, step, value, slope, new_value)
        error = _backtracking.model_error(value, new_value, slope + bend / 2)
        whole, keep = t == 1, (t > 0) & (error <= _TRUST)

        def product_along_step(new, old, x, y):
            """The mean Hessian times the step, or what the model knows of it."""
            known = t.astype(x.dtype) * (a.astype(x.dtype) * x + b.astype(x.dtype) * y)
            return jnp.where(keep, jnp.where(whole, new - old, known), 0)

        step = _scale(t, step)
        product = jax.tree.map(
            product_along_step, new_grad, grad, curved, previous_product
        )
        # Nothing is kept of a step that is not finite. The updates show it.
        kept = jax.tree.map(lambda x: jnp.where(keep, x, 0), step)
        return _tree.astype(step, updates), ScaleByQuadraticModelState(
            key=state.key,
            previous_step=_tree.astype(kept, state.previous_step),
            previous_product=_tree.astype(product, state.previous_product),
            value=jnp.where(whole, new_value, jnp.inf),
            grad=_tree.astype(new_grad, state.grad),
            learning_rate=t * a,
            momentum=t * b,
            backtracking=t,
            model_error=error,
            drift=jnp.where(refresh, 0, state.drift) + error,
            products=state.products + 1,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _minimise(gradient, direction, previous, curved, curved_previous, dtype):
    """The minimiser (a, b) of the model over the two directions, and what it foretells.

    Args:
      gradient, direction, previous: trees like the parameters.
      curved, curved_previous: G times the two directions.
      dtype: the dtype of the results, which have shape ().

    Returns:
      a, b, the slope gᵀδ and the bend δᵀGδ of the step δ = a Δ + b δ_previous.
    """

    def vdot(x, y):
        return _tree.vdot(x, y).astype(dtype)

    # Solve in units in which both directions have curvature 1. A direction without
    # curvature gets at most a thousand times its length: only backtracking limits it.
    def unit(bend, slope, least):
        size = jnp.maximum(jnp.abs(bend), least * jnp.abs(slope))
        return jnp.where(size > 0, jax.lax.rsqrt(jnp.where(size > 0, size, 1)), 0)

    slopes = vdot(gradient, direction), vdot(gradient, previous)
    bends = vdot(direction, curved), vdot(previous, curved_previous)
    mixed = vdot(direction, curved_previous)
    u, v = unit(bends[0], slopes[0], 1e-3), unit(bends[1], slopes[1], 0.0)
    matrix = bends[0] * u * u, mixed * u * v, bends[1] * v * v
    floor = float(jnp.finfo(dtype).eps) ** 0.5
    a, b = _absolute_solve(matrix, (-slopes[0] * u, -slopes[1] * v), floor)
    a, b = a * u, b * v
    finite = jnp.isfinite(a) & jnp.isfinite(b)
    a, b = jnp.where(finite, a, 1), jnp.where(finite, b, 0)
    bend = a * a * bends[0] + 2 * a * b * mixed + b * b * bends[1]
    return a, b, a * slopes[0] + b * slopes[1], bend


def _absolute_solve(matrix, r, floor):
    """Solves |A| x = r for A = [[p, q], [q, s]], with |λ| of at least ``floor``.

    The rotation that makes A diagonal is written out, because a GPU takes longer for
    ``eigh`` than for all the rest of a step rule.
    """
    p, q, s = matrix
    round_ = (q == 0) & (p == s)  # Then any rotation will do, and none has a slope.
    angle = jnp.arctan2(2 * q, jnp.where(round_, 1, p - s)) / 2
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first = p * cos * cos + 2 * q * cos * sin + s * sin * sin
    second = p * sin * sin - 2 * q * cos * sin + s * cos * cos
    x = (cos * r[0] + sin * r[1]) / jnp.maximum(jnp.abs(first), floor)
    y = (cos * r[1] - sin * r[0]) / jnp.maximum(jnp.abs(second), floor)
    return cos * x - sin * y, sin * x + cos * y


def _combine(a, x, b, y):
    """a x + b y, for numbers a and b and trees x and y."""
    return jax.tree.map(
        lambda x, y: a.astype(x.dtype) * x + b.astype(y.dtype) * y, x, y
    )


def _scale(t, step):
    """t x, for a number t and each array x of the tree ``step``."""
    return jax.tree.map(lambda x: t.astype(x.dtype) * x, step)
