"""Checks of hyperparameters; traced values pass."""

import math
from typing import Any


def not_negative(**numbers: Any) -> None:
    """Raises a ValueError for a number below 0."""
    for name, value in numbers.items():
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:
            raise ValueError(f"`{name}` must be a number >= 0, got {value}.")


def positive(**numbers: Any) -> None:
    """Raises a ValueError for a number that is not above 0."""
    for name, value in numbers.items():
        if isinstance(value, (int, float)) and not 0 < value < math.inf:
            raise ValueError(f"`{name}` must be a number > 0, got {value}.")


def below_one(**numbers: Any) -> None:
    """Raises a ValueError for a number outside [0, 1)."""
    for name, value in numbers.items():
        if isinstance(value, (int, float)) and not 0 <= value < 1:
            raise ValueError(f"`{name}` must be a number in [0, 1), got {value}.")


def at_least_one(**numbers: Any) -> None:
    """Raises a ValueError for a number that is no integer of at least 1."""
    for name, value in numbers.items():
        if isinstance(value, float) or (isinstance(value, int) and value < 1):
            raise ValueError(f"`{name}` must be an integer >= 1, got {value}.")
