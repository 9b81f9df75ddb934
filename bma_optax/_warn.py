"""Warnings that point at the user's line."""

import sys
import warnings

# Who stands between a user and ``init``: Optax's chains, a jit around it, an optimiser
# object. Python 3.12 has `skip_file_prefixes` for this.
_BETWEEN = ("bma_optax", "optax", "jax", "flax", "equinox")


def warn(message: str) -> None:
    """A UserWarning at the innermost line outside of the packages above."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _package(frame) in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _package(frame) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]
