"""The step rule of Newton-BMA: the length of a step, and its momentum.

    δ = a Δ + b δ_previous,   (a, b) = argmin gᵀδ + δᵀGδ / 2

for a direction Δ, the gradient g and the curvature G, all on trees like the parameters.
Two products with G give the 2 x 2 matrix of the quadratic model; backtracking on the
loss then shortens the step if it needs to.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bma_optax import _checks, _control_flow, _sharding, _tree, _xla
from bma_optax.algebra import _symmetric_power
from bma_optax.curvature import _kinds, _probing, _user_functions
from bma_optax.curvature._kinds import Curvature
from bma_optax.curvature._probing import LinearOperator

_TRIALS = 12  # Each that fails shrinks the step to between a tenth and a half.
_SUFFICIENT_DECREASE = 1e-4  # The part of the slope's decrease that a step must reach.


class ScaleByQuadraticModelState(NamedTuple):
    """State of :func:`scale_by_quadratic_model`.

    Example:
      >>> import jax.numpy as jnp, bma_optax as bma
      >>> state = bma.scale_by_quadratic_model().init(jnp.ones(3))
      >>> print(state.previous_step, state.learning_rate)
      [0. 0. 0.] 0.0
    """

    key: jax.Array  # shape (2,), uint32: the data of a random key.
    previous_step: optax.Updates  # like params.
    learning_rate: jax.Array  # shape (): a of the last step, backtracking included.
    momentum: jax.Array  # shape (): b of the last step, backtracking included.
    backtracking: jax.Array  # shape (): the part of the model's step that was taken.
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

    Δ are the incoming updates. Two products with G and a 2 x 2 solve give a and b.
    Backtracking then shortens δ until the loss falls by at least 1e-4 of the decrease
    that its slope predicts, up to the rounding of the loss. After 12 failed trials
    there is no step. The rule has nothing to tune. On a quadratic loss with a constant
    preconditioner it is the preconditioned conjugate gradient method. If the model is
    not convex, the absolute eigenvalues of the 2 x 2 matrix keep δ a descent direction,
    even if Δ is not.

    Args:
      curvature: what G is: ``bma.Hessian()`` or another :class:`Curvature`.
      max_norm: the largest global norm of a step, a number > 0. None sets no limit.
      key: a seed or a random key, for ``bma.Fisher``.

    Returns:
      A ``GradientTransformationExtraArgs`` with the state
      :class:`ScaleByQuadraticModelState`. ``update`` takes ``value_fn``, the loss, and
      passes its other keywords to the functions that name them. Like Optax's line
      searches it comes last in a chain and takes updates that descend. It computes the
      gradient of ``value_fn`` itself; under one ``jax.jit`` XLA may merge this with the
      caller's.

    Raises:
      TypeError: if ``curvature`` is not a curvature.
      ValueError: if ``max_norm`` is not positive; at ``update``, if ``params`` or
        ``value_fn`` is missing.

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
            key=_probing.key_data(key),
            previous_step=_tree.zeros_like(params),
            learning_rate=zero(),
            momentum=zero(),
            backtracking=zero(),
            products=zero().astype(jnp.int32),
        )

    def update_fn(updates, state, params=None, *, value_fn=None, **extra_args):
        if params is None:
            raise ValueError(
                "`update` needs the parameters here. Pass update(grads, state, params, "
                "...)."
            )
        _tree.check_statistics(params, state.previous_step)
        updates = _tree.like_init(updates, state.previous_step)
        state = _tree.whole(state, "products")
        updates, state, params = _tree.arrays((updates, state, params))
        f = _user_functions.loss(value_fn, extra_args)
        next_key, key = jax.random.split(_probing.typed_key(state.key))
        dtype = state.learning_rate.dtype
        value, gradient = jax.value_and_grad(f)(params)
        product = _kinds.product_at(curvature, params, key, value_fn, extra_args)
        G = LinearOperator(product, params)
        previous = _tree.zero_like(state.previous_step, updates)
        direction, previous = (
            jax.tree.map(_sharding.typed_like, _tree.astype(x, params), params)
            for x in (updates, previous)
        )
        a, b, slope = _minimise(gradient, G, direction, previous, dtype)
        step = _combine(a, direction, b, previous)
        if max_norm is not None:
            square = _tree.vdot(step, step).astype(dtype)
            limit = jnp.asarray(max_norm).astype(dtype)
            long = square > jnp.square(limit)
            part = jnp.where(long, limit * jax.lax.rsqrt(jnp.where(long, square, 1)), 1)
            a, b, slope = a * part, b * part, slope * part
            step = _scale(part, step)
        t = _backtrack(f, params, step, value, slope, dtype)
        step = _scale(t, step)
        # Keep no step along a direction that is not finite: none was accepted. The
        # updates still show it.
        accepted = t > 0
        kept = jax.tree.map(lambda x: jnp.where(accepted, x, 0), step)
        return _tree.astype(step, updates), ScaleByQuadraticModelState(
            key=jax.random.key_data(next_key),
            previous_step=_tree.astype(kept, state.previous_step),
            learning_rate=t * a,
            momentum=t * b,
            backtracking=t,
            products=state.products + 2,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _minimise(gradient, G, direction, previous, dtype):
    """The minimiser (a, b) of the model over the two directions, and its slope.

    Args:
      gradient, direction, previous: trees like the parameters.
      G: the curvature, a function of such trees.
      dtype: the dtype of the three results, which have shape ().
    """
    gradient, curved, curved_previous = (
        _xla.materialize_for_sums(x, previous)
        for x in (gradient, G(direction), G(previous))
    )
    vdot = _tree.vdot
    mixed = vdot(direction, curved_previous)
    A = jnp.array(
        [
            [vdot(direction, curved), mixed],
            [mixed, vdot(previous, curved_previous)],
        ]
    ).astype(dtype)
    r = -jnp.array([vdot(gradient, direction), vdot(gradient, previous)]).astype(dtype)
    # Solve in units in which both directions have curvature 1. A direction without
    # curvature gets at most a thousand times its length: only backtracking limits it.
    size = jnp.abs(jnp.diagonal(A))
    size = jnp.maximum(size, jnp.array([1e-3, 0.0], dtype) * jnp.abs(r))
    usable = size > 0
    unit = jnp.where(usable, jax.lax.rsqrt(jnp.where(usable, size, 1)), 0)
    scaled = A * unit[:, None] * jnp.broadcast_to(unit, (2, 2))
    floor = jnp.asarray(float(jnp.finfo(dtype).eps) ** 0.5, dtype)
    inverse = _symmetric_power.matrix_power(scaled, -1.0, floor, absolute=True)
    a, b = unit * _xla.product(inverse, unit * r)
    finite = jnp.isfinite(a) & jnp.isfinite(b)
    a, b = jnp.where(finite, a, 1), jnp.where(finite, b, 0)
    return a, b, -(a * r[0] + b * r[1])


def _backtrack(f, params, step, value, slope, dtype):
    """A t in (0, 1] with f(params + t step) low enough, or 0 if none is found."""
    value = value.astype(dtype)
    slack = 10 * float(jnp.finfo(dtype).eps) * jnp.abs(value)

    def attempt(t):
        """Returns t and True if t is accepted, else the next t and False."""
        new = f(_combine(jnp.ones((), dtype), params, t, step)).astype(dtype)
        accepted = new <= value + _SUFFICIENT_DECREASE * t * slope + slack
        # Go to the minimum of the parabola through both values and the slope, but not
        # below 0.1 t or above 0.5 t.
        bend = new - value - t * slope
        best = -slope * jnp.square(t) / (2 * jnp.where(bend > 0, bend, 1))
        shorter = jnp.where(
            jnp.isfinite(best) & (bend > 0), jnp.clip(best, 0.1 * t, 0.5 * t), 0.1 * t
        )
        return jnp.where(accepted, t, shorter), accepted

    def trial(carry, _):
        t, accepted = carry
        return _control_flow.cond(accepted, lambda t: (t, accepted), attempt, t), None

    first = attempt(jnp.ones((), dtype))
    (t, accepted), _ = _control_flow.scan(trial, first, length=_TRIALS - 1)
    return jnp.where(accepted, t, 0)


def _combine(a, x, b, y):
    """a x + b y, for numbers a and b and trees x and y."""
    return jax.tree.map(
        lambda x, y: a.astype(x.dtype) * x + b.astype(y.dtype) * y, x, y
    )


def _scale(t, step):
    """t x, for a number t and each array x of the tree ``step``."""
    return jax.tree.map(lambda x: t.astype(x.dtype) * x, step)
