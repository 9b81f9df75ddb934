"""Functions of the user: what they are given, and what to say where they fail."""

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import jax

from bma_optax import _trees


def loss(value_fn: Any, extra_args: dict[str, Any]) -> Callable[[Any], jax.Array]:
    """``value_fn`` as a function of the parameters alone."""
    if value_fn is None:
        raise ValueError(
            "`update` needs the loss here. Pass update(grads, state, params, "
            "value_fn=loss, ...)."
        )
    if not callable(value_fn):
        raise TypeError(
            f"`value_fn` must be the loss as a function, got {_described(value_fn)}. "
            "Pass the function itself, not its value."
        )
    return scalar(bind(value_fn, extra_args), "value_fn")


def scalar(fn: Callable[..., Any], name: str) -> Callable[..., jax.Array]:
    """``fn``, with an error for a value that is no floating scalar."""

    def checked(*args):
        value = fn(*args)
        if isinstance(value, jax.Array) and value.shape == ():
            if _trees.is_floating(value):
                return value
            advice = "a function whose value is floating"
        elif isinstance(value, (tuple, list)):
            advice = f"lambda *args: {name}(*args)[0], without what comes with the loss"
        elif isinstance(value, jax.Array):
            advice = "a function that takes their mean"
        else:
            advice = "a function that returns an array of JAX, shape ()"
        raise TypeError(
            f"`{name}` must return one floating number, shape (), got "
            f"{_described(value)}. Pass {advice} instead."
        )

    return checked


def floating(tree: Any, name: str) -> Any:
    """``tree``, or a TypeError for outputs that have no derivative."""
    _trees.check_vectors(tree, f"`{name}`: the output")
    return tree


def vector(values: Any, name: str) -> jax.Array:
    """``values``, or an error where they are not one loss an example."""
    if not isinstance(values, jax.Array) or not _trees.is_floating(values):
        raise TypeError(
            f"`{name}` must return floating losses, shape (n,), got "
            f"{_described(values)}. Pass a function that returns one array."
        )
    if values.ndim != 1:
        raise ValueError(
            f"`{name}` must return one loss an example, shape (n,), got shape "
            f"{values.shape}. Pass a function that keeps the axis of examples alone."
        )
    return values


def like_params(tree: Any, params: Any, name: str) -> Any:
    """What the function of this name returned, in the structure of ``params``.

    An error names the first leaf that is not of its shape, or not floating.
    """
    difference = _trees.unlike(tree, params)
    if difference is not None:
        path, new, old = difference
        found, wanted = map(_described, (new, old))
        raise ValueError(
            f"At {path!r} `{name}` gave {found}, where {wanted} is needed. Pass one "
            "that gives a tree like the parameters."
        )
    _trees.check_vectors(tree, f"What `{name}` gave at")
    return _trees.in_order(tree, params)


def product(fn: Any, params: Any, name: str) -> Callable[[Any], Any]:
    """``fn`` as a product with vectors like ``params``, whose results are checked.

    They have the dtype of the parameters, or of their statistics where it is another.
    """
    if not callable(fn):
        raise TypeError(
            f"`{name}` must be a function v -> G v, got {_described(fn)}. Pass "
            "such a function, lambda v: A @ v for a matrix A."
        )

    def convert(x, p):
        known = x.dtype in (_trees.dtype_of(p), _trees.statistic_dtype(p))
        return x if known else x.astype(_trees.statistic_dtype(p))

    def checked(v):
        result = like_params(fn(v), params, name)
        return jax.tree.map(convert, _trees.arrays(result), params)

    return checked


def _described(value: Any) -> str:
    """A value by its dtype and shape; trees of them in their structure."""
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(map(_described, value))}"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}{list(value.shape)}"
    return "nothing" if value is None else f"a {type(value).__name__}"


def bind(fn: Callable[..., Any], extra_args: dict[str, Any]) -> Callable[..., Any]:
    """``fn`` with those of the extra arguments that its signature names."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except ValueError:  # Functions of C have none.
        return fn
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
            "knows no forward mode. Pass bma.GaussNewton, or a bma.Operator with the "
            "product in its own words, as `curvature`."
        ) from error
