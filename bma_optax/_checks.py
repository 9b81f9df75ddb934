"""Checks of scalar arguments, made when a transformation is built.

Each check takes keywords, name=value, and raises an error that names the argument, says
what is wrong and what to pass. Values are Python or NumPy numbers or JAX arrays of
shape (). A traced value, as ``optax.inject_hyperparams`` passes under ``jax.jit``, is
not known yet: only its dtype and shape are checked.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_integer(value: Any) -> bool:
    """Whether ``value`` is a Python or NumPy integer; a boolean is not one."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def not_negative(**arguments: Any) -> None:
    """Raises a ValueError if a number is below 0, infinite or NaN."""
    _check(arguments, "a number >= 0", lambda x: 0 <= x < math.inf)


def positive(**arguments: Any) -> None:
    """Raises a ValueError if a number is not above 0, or infinite or NaN."""
    _check(arguments, "a number > 0", lambda x: 0 < x < math.inf)


def below_one(**arguments: Any) -> None:
    """Raises a ValueError if a number is outside [0, 1)."""
    _check(arguments, "a number in [0, 1)", lambda x: 0 <= x < 1)


def rates(**arguments: Any) -> None:
    """Raises a ValueError if a rate is below 0, infinite or NaN; schedules pass.

    Numbers of 16 bits pass too, unlike in the other checks:
    ``optax.inject_hyperparams`` gives rates the dtype of the parameters. In 16 bits a
    decay of .999 becomes 1, but a rate is only rounded.
    """
    for name, value in arguments.items():
        if not callable(value):
            wanted = "a number >= 0 or a schedule"
            _check({name: value}, wanted, lambda x: 0 <= x < math.inf, narrow=True)


def at_least_one(**arguments: Any) -> None:
    """Raises an error if a number is not an integer in [1, 2^31)."""
    wanted = "an integer >= 1, of 32 bits"
    for name, value in arguments.items():
        _check({name: value}, wanted, lambda x: is_integer(x) and 1 <= x < 2**31)
        dtype = getattr(value, "dtype", np.dtype(int))
        if not jnp.issubdtype(dtype, jnp.integer):  # The value is a traced float.
            raise TypeError(f"`{name}` must be {wanted}, got {value!r}.")


def one_of(options: tuple[Any, ...], **arguments: Any) -> None:
    """Raises a ValueError if a value is none of the ``options``, strings or None."""
    for name, value in arguments.items():
        if not isinstance(value, str | None) or value not in options:
            raise ValueError(f"`{name}` must be one of {options}, got {value!r}.")


def is_zero(value: Any) -> bool:
    """Whether ``value`` is a Python or NumPy number 0, which cannot change later."""
    return isinstance(value, (int, float, np.number)) and value == 0


def plain(value: Any) -> Any:
    """Returns a NumPy number as a Python number, other values as they are.

    JAX gives a Python number the dtype of the array that it meets.
    """
    is_numpy = isinstance(value, (np.number, np.ndarray)) and value.ndim == 0
    return value.item() if is_numpy else value


def random_key(key: Any) -> None:
    """Raises an error if ``key`` is neither a seed nor a single random key."""
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
    """Raises a TypeError if ``dtype`` is neither a floating dtype nor None."""
    try:
        valid = dtype is None or jnp.issubdtype(np.dtype(dtype), jnp.floating)
    except TypeError:
        valid = False
    if not valid:
        raise TypeError(
            f"`mu_dtype` must be a floating dtype or None, got {dtype!r}. Pass a dtype "
            "such as jnp.float32."
        )


def given(params: Any) -> None:
    """Raises a ValueError if ``update`` was not given the parameters."""
    if params is None:
        raise ValueError(
            "`update` needs the parameters here. Pass update(grads, state, params, "
            "...)."
        )


def flag(**arguments: Any) -> None:
    """Raises a TypeError if a value is neither a boolean nor one in an array."""
    for name, value in arguments.items():
        dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
        if not isinstance(value, bool) and not (dtype == np.bool_ and shape == ()):
            found = repr(value) if shape is None else f"{dtype}{list(shape)}"
            raise TypeError(
                f"`{name}` must be a boolean, got {found}. Pass True, False or a "
                "boolean array of shape ()."
            )


def functions(in_place_of_an_array: str = "a function", **arguments: Any) -> None:
    """Raises a TypeError if a value cannot be called.

    ``in_place_of_an_array`` is what the error says to pass where an array was given.
    """
    for name, value in arguments.items():
        if callable(value):
            continue
        found, advice = repr(value), "a function"
        if hasattr(value, "shape"):
            found = f"an array of shape {value.shape}"
            advice = in_place_of_an_array
        raise TypeError(
            f"`{name}` must be a function, got {found}. Pass {advice} instead."
        )


def _check(arguments, wanted, holds: Callable[[Any], bool], narrow=False) -> None:
    """Raises a ValueError "must be ``wanted``" for known numbers if not ``holds``."""
    for name, value in arguments.items():
        number = _number(name, value, wanted, narrow)
        if number is not None and not holds(number):
            raise ValueError(f"`{name}` must be {wanted}, got {value}.")


def _number(name, value, wanted, narrow):
    """Returns ``value`` as a Python number, None if it is traced.

    Raises a TypeError if it is not a real number, or one of 16 bits and not ``narrow``.
    """
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
        # Only rules have `stacked_axes`; this module may not import their class.
        if hasattr(value, "stacked_axes"):
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
