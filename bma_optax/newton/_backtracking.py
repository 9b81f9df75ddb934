"""Backtracking: how much of a step to take, from the loss alone.

The first trial is the whole step, and is evaluated by the caller. Each trial that fails
shrinks the step to the minimum of the parabola through both values and the slope, but
to no less than a tenth and no more than a half (Dennis and Schnabel 1983, section 6.3).
A step is a tree like the parameters, t a number of shape ().
"""

import jax
import jax.numpy as jnp

from bma_optax import _control_flow

_TRIALS = 12
_SUFFICIENT_DECREASE = 1e-4  # The part of the slope's decrease that a step must reach.


def backtrack(f, params, step, value, slope, new):
    """Returns a t in (0, 1] with f(params + t step) low enough, or 0 if none is found.

    Args:
      f: the loss.
      params, step: trees of the same shapes.
      value, new: the loss at ``params`` and after the whole step, shape ().
      slope: the derivative of the loss along the step, shape ().
    """
    one = jnp.ones_like(value)
    accepted, shorter = _judged(one, value, slope, new)

    def attempt(t, _):
        new = f(moved(params, t, step)).astype(value.dtype)
        accepted, shorter = _judged(t, value, slope, new)
        return jnp.where(accepted, t, shorter), accepted

    def trial(carry, _):
        t, accepted = carry
        keep = lambda t, accepted: (t, accepted)  # noqa: E731
        return _control_flow.cond(accepted, keep, attempt, t, accepted), None

    def search(t):
        (t, found), _ = _control_flow.scan(
            trial, (t, accepted), length=_TRIALS - 1, operands=(params, step)
        )
        return jnp.where(found, t, 0)

    with jax.named_scope("backtracking"):
        return _control_flow.cond(accepted, jnp.ones_like, search, shorter)


def _judged(t, value, slope, new):
    """Returns whether the loss ``new`` accepts t, and the t to try next if not."""
    accepted = new <= value + _SUFFICIENT_DECREASE * t * slope + _slack(value)
    bend = new - value - t * slope
    best = -slope * jnp.square(t) / (2 * jnp.where(bend > 0, bend, 1))
    best = jnp.clip(best, 0.1 * t, 0.5 * t)
    return accepted, jnp.where(jnp.isfinite(best) & (bend > 0), best, 0.1 * t)


def moved(params, t, step):
    """Returns params + t step, for a number t and trees of the same shapes."""
    return jax.tree.map(
        lambda x, y: x + t.astype(x.dtype) * y.astype(x.dtype), params, step
    )


def model_error(value, new, foretold):
    """|1 - decrease / foretold decrease| of a step, up to the rounding of the loss.

    1 also stands for more than that, as where the loss rises or is not finite.

    Args:
      value, new: the loss before and after the step.
      foretold: what a model says of ``new - value``; below 0, or 0 for no step.
    """
    missed = jnp.abs(new - value - foretold) - _slack(value)
    error = missed / jnp.where(foretold < 0, -foretold, 1)
    return jnp.where(jnp.isfinite(error), jnp.clip(error, 0, 1), 1)


def _slack(value):
    """How far rounding moves a loss."""
    return 10 * float(jnp.finfo(value.dtype).eps) * jnp.abs(value)
