"""Checks of arguments: what is known is checked, traced values pass."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_integer(value: Any) -> bool:
    """Whether ``value`` is an integer of Python or NumPy."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def not_negative(**arguments: Any) -> None:
    """Raises a ValueError for a number below 0."""
    _check(arguments, "a number >= 0", lambda x: 0 <= x < math.inf)


def positive(**arguments: Any) -> None:
    """Raises a ValueError for a number that is not above 0."""
    _check(arguments, "a number > 0", lambda x: 0 < x < math.inf)


def below_one(**arguments: Any) -> None:
    """Raises a ValueError for a number outside [0, 1)."""
    _check(arguments, "a number in [0, 1)", lambda x: 0 <= x < 1)


def finite(**arguments: Any) -> None:
    """Raises a ValueError for an infinite number or NaN."""
    _check(arguments, "a finite number", math.isfinite)


def rates(**arguments: Any) -> None:
    """As :func:`not_negative`; a schedule passes, and a number of 16 bits.

    ``optax.inject_hyperparams`` gives rates the dtype of the parameters. A decay of
    .999 is 1 there, but a rate is only rounded.
    """
    for name, value in arguments.items():
        if not callable(value):
            wanted = "a number >= 0 or a schedule"
            _check({name: value}, wanted, lambda x: 0 <= x < math.inf, narrow=True)


def at_least_one(**arguments: Any) -> None:
    """Raises a ValueError for a number that is no integer of at least 1."""
    wanted = "an integer >= 1, of 32 bits"
    for name, value in arguments.items():
        _check({name: value}, wanted, lambda x: is_integer(x) and 1 <= x < 2**31)
        dtype = getattr(value, "dtype", np.dtype(int))
        if not jnp.issubdtype(dtype, jnp.integer):  # A traced float.
            raise TypeError(f"`{name}` must be {wanted}, got {value!r}.")


def boolean(**arguments: Any) -> None:
    """Raises a TypeError for what is neither True nor False."""
    for name, value in arguments.items():
        if not isinstance(value, (bool, np.bool_)):
            raise TypeError(f"`{name}` must be True or False, got {value!r}.")


def is_zero(value: Any) -> bool:
    """Whether ``value`` is 0 in Python or NumPy, and so will stay."""
    return isinstance(value, (int, float, np.number)) and value == 0


def plain(value: Any) -> Any:
    """NumPy's numbers as Python's, which take the dtype of what they meet."""
    is_numpy = isinstance(value, (np.number, np.ndarray)) and value.ndim == 0
    return value.item() if is_numpy else value


def random_key(key: Any) -> None:
    """Raises an error for what is neither a seed nor one random key."""
    dtype: Any = getattr(key, "dtype", None)
    shape = getattr(key, "shape", None)
    if is_integer(key):
        if not -(2**63) <= key < 2**63:
            raise ValueError(f"`key` must fit into 64 bits, got {key}.")
    elif dtype is None or not (
        (shape == () and jnp.issubdtype(dtype, jax.dtypes.prng_key))
        or (shape == () and jnp.issubdtype(dtype, jnp.integer))
        or (shape in ((2,), (4,)) and dtype == jnp.uint32)
    ):
        found = repr(key) if dtype is None else f"an array of {dtype}, shape {shape}"
        raise TypeError(
            f"`key` must be a seed or one random key, got {found}. Pass an integer, "
            "jax.random.key(0) or jax.random.PRNGKey(0) instead."
        )


def mu_dtype(dtype: Any) -> None:
    """Raises a TypeError for a dtype that no momentum can have."""
    try:
        valid = dtype is None or jnp.issubdtype(np.dtype(dtype), jnp.floating)
    except TypeError:
        valid = False
    if not valid:
        raise TypeError(
            f"`mu_dtype` must be a floating dtype or None, got {dtype!r}. Pass a dtype "
            "such as jnp.float32."
        )


def functions(**arguments: Any) -> None:
    """Raises a TypeError for what cannot be called."""
    for name, value in arguments.items():
        if callable(value):
            continue
        found, advice = repr(value), "a function"
        if hasattr(value, "shape"):
            found, advice = f"an array of shape {value.shape}", "lambda v: A @ v"
        raise TypeError(
            f"`{name}` must be a function, got {found}. Pass {advice} instead."
        )


def _check(arguments, wanted, holds: Callable[[Any], bool], narrow=False) -> None:
    for name, value in arguments.items():
        number = _number(name, value, wanted, narrow)
        if number is not None and not holds(number):
            raise ValueError(f"`{name}` must be {wanted}, got {value}.")


def _number(name, value, wanted, narrow):
    """``value`` as a number of Python's, None where it is traced; else a TypeError."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    dtype: Any = getattr(value, "dtype", None)
    is_array = isinstance(value, (np.generic, np.ndarray, jax.Array))
    if (
        not is_array
        or value.ndim
        or not any(jnp.issubdtype(dtype, d) for d in (jnp.integer, jnp.floating))
    ):
        advice = ""
        if hasattr(value, "stacked_axes"):  # A rule; rules lie above this module.
            ours = type(value).__module__.startswith("bma_optax.")
            advice = f" Pass the rule as partition={'bma.' * ours}{value!r}."
        raise TypeError(f"`{name}` must be {wanted}, got {value!r}.{advice}")
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
        if not narrow:
            raise TypeError(
                f"`{name}` has dtype {dtype}, in which a decay of .999 is 1. Pass "
                "a Python number, or float32; to optax.inject_hyperparams pass "
                "`hyperparam_dtype=jnp.float32`."
            )
    return None if isinstance(value, jax.core.Tracer) else jax.device_get(value).item()
