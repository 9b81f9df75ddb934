"""Functions of the user: what they are given, and what to say where they fail."""

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import jax


def loss(value_fn: Any, extra_args: dict[str, Any]) -> Callable[[Any], jax.Array]:
    """``value_fn`` as a function of the parameters alone."""
    if value_fn is None:
        raise ValueError(
            "`update` needs the loss here: update(grads, state, params, "
            "value_fn=loss, ...)."
        )
    return bind(value_fn, extra_args)


def bind(fn: Callable[..., Any], extra_args: dict[str, Any]) -> Callable[..., Any]:
    """``fn`` with those of the extra arguments that its signature names."""
    parameters = inspect.signature(fn).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        named = extra_args
    else:
        names = [p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY]
        named = {k: v for k, v in extra_args.items() if k in names}
    return lambda *args: fn(*args, **named)


@contextlib.contextmanager
def explained():
    """JAX's error about a ``custom_vjp``, in the words of this library."""
    try:
        yield
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise TypeError(
            "`value_fn` has no second derivatives: a part of it is a custom_vjp, which "
            "knows no forward mode. bma.GaussNewton, or a bma.Operator with the "
            "product in its own words, is accepted as `curvature`."
        ) from error
