"""What is found to be wrong in values: an error where they are known, else a warning.

Under ``jax.jit`` nothing can be raised. A warning comes at run time, through
``jax.debug.callback``.
"""

import warnings
from collections.abc import Callable

import jax


def alarm(wrong: jax.Array, message: Callable[..., str], *numbers: jax.Array) -> None:
    """Raises a ValueError or warns, with ``message(*numbers)``, if ``wrong`` holds.

    Args:
      wrong: shape (), bool.
      message: makes the text from the values of ``numbers``.
      numbers: shape ().
    """
    if not isinstance(wrong, jax.core.Tracer):
        if wrong:
            raise ValueError(message(*numbers))
        return

    def warn(wrong, *numbers):
        if wrong:  # Under jax.vmap both branches run.
            warnings.warn(message(*numbers), stacklevel=2)

    if not _ignored():
        jax.lax.cond(
            wrong,
            lambda *x: jax.debug.callback(warn, *x),
            lambda *x: None,
            wrong,
            *numbers,
        )


def _ignored() -> bool:
    """Whether warnings are ignored while this is traced.

    Then there is no callback, which ``jax.export`` could not write.
    """
    for action, message, category, module, _ in warnings.filters:
        every = message is None and module is None
        if every and issubclass(UserWarning, category):
            return action == "ignore"
    return False
