"""When an expensive quantity, such as a factorisation, is computed anew.

A quantity is refreshed at steps 0, k, 2k, ... or where it is known to be out of date,
and kept in the state between: its arrays have the same shapes and dtypes at every step.
``count``, int32 of shape (), numbers the steps from 0.
"""

import jax

from bma_optax import _control_flow


def every(interval, count, refresh, last):
    """Returns ``refresh()`` at every ``interval``-th step, else ``last``.

    It also refreshes after 1, 3, 7, 15, ... steps (that is at steps 2, 4, 8, 16, ...)
    below the interval. The first gradients change statistics most.

    Args:
      interval: the number of steps from one refresh to the next, at least 1.
      count: the number of steps before this one, shape ().
      refresh: a function without arguments that returns a tree like ``last``.
      last: the result of the last refresh.
    """
    if at_each_step(interval):
        return refresh()
    young = (count & (count + 1) == 0) & (count + 1 < interval)
    with jax.named_scope("refresh"):
        return _control_flow.cond(_due(interval, count) | young, refresh, lambda: last)


def in_place(interval, count, refresh, last, also):
    """Does what :func:`every` does for large arrays, which it does not copy.

    ``refresh`` takes ``last``. It runs where ``also`` holds, too, but not at the early
    steps below the interval.
    """
    if at_each_step(interval):
        return refresh(last)
    with jax.named_scope("refresh"):
        return _control_flow.renewed(_due(interval, count) | also, refresh, last)


def _due(interval, count):
    return count == 0 if interval is None else count % interval == 0


def at_each_step(interval):
    """Whether :func:`every` is known not to need a branch."""
    return isinstance(interval, int) and interval == 1
