"""Warnings: at the user's line while JAX traces, or at run time about values.

``warn`` is for what shapes and settings tell. It points at the user's line, in whose
terms the message is. ``raise_or_warn`` is for what only values tell, a boolean of shape
(): it raises an error outside ``jax.jit``. Inside, values are not known and nothing can
be raised, so it warns at run time, through ``jax.debug.callback``.
"""

import sys
import warnings
from collections.abc import Callable

import jax

# The packages between a user's line and ``init``: Optax's chains, a ``jax.jit``, an
# optimiser object. Python 3.12 has `skip_file_prefixes` for this.
_BETWEEN = ("bma_optax", "optax", "jax", "flax", "equinox")


def warn(message: str) -> None:
    """Warns at the innermost line outside of the packages in ``_BETWEEN``."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _package(frame) in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _package(frame) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]


def raise_or_warn(
    wrong: jax.Array, message: Callable[..., str], *numbers: jax.Array
) -> None:
    """If ``wrong``, raises a ValueError, or warns at run time where JAX traces.

    Args:
      wrong: boolean, shape ().
      message: a function that makes the text from the values of ``numbers``.
      numbers: arrays of shape ().
    """
    if not isinstance(wrong, jax.core.Tracer):
        if wrong:
            raise ValueError(message(*numbers))
        return

    def warn_now(wrong, *numbers):
        if wrong:  # Under jax.vmap both branches of the cond run.
            warnings.warn(message(*numbers), stacklevel=2)

    if not _ignored():
        jax.lax.cond(
            wrong,
            lambda *x: jax.debug.callback(warn_now, *x),
            lambda *x: None,
            wrong,
            *numbers,
        )


def _ignored() -> bool:
    """Whether Python ignores warnings while JAX traces.

    There is then no callback in the program, and ``jax.export`` can write it to a file.
    """
    for action, message, category, module, _ in warnings.filters:
        every = message is None and module is None
        if every and issubclass(UserWarning, category):
            return action == "ignore"
    return False
