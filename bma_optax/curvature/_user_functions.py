"""Functions of the user: what they are given, and what to say where they fail."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax

from bma_optax import _names, _tree


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
    return scalar(bind(value_fn, extra_args, "value_fn"), "value_fn")


def scalar(fn: Callable[..., Any], name: str) -> Callable[..., jax.Array]:
    """``fn``, with an error for a value that is no floating scalar."""

    def checked(*args):
        value = fn(*args)
        if isinstance(value, jax.Array) and value.shape == ():
            if _tree.is_floating(value):
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
    _tree.check_vectors(tree, f"`{name}`: the output")
    return tree


def vector(values: Any, name: str) -> jax.Array:
    """``values``, or an error where they are not one loss an example."""
    if not isinstance(values, jax.Array) or not _tree.is_floating(values):
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
    difference = _tree.unlike(tree, params)
    if difference is not None:
        path, new, old = difference
        found, wanted = map(_described, (new, old))
        raise ValueError(
            f"At {path!r} `{name}` gave {found}, where {wanted} is needed. Pass one "
            "that gives a tree like the parameters."
        )
    _tree.check_vectors(tree, f"What `{name}` gave at")
    return _tree.in_order(tree, params)


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
        known = x.dtype in (_tree.dtype_of(p), _tree.statistic_dtype(p))
        return x if known else x.astype(_tree.statistic_dtype(p))

    def checked(v):
        result = like_params(fn(v), params, name)
        return jax.tree.map(convert, _tree.arrays(result), params)

    return checked


def _described(value: Any) -> str:
    """A value by its dtype and shape; trees of them in their structure."""
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(map(_described, value))}"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}{list(value.shape)}"
    return "nothing" if value is None else f"a {type(value).__name__}"


def bind(
    fn: Callable[..., Any], extra_args: dict[str, Any], name: str
) -> Callable[..., Any]:
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

    def bound(*args):
        try:
            return fn(*args, **named)
        except Exception as error:
            masked = _masked(args[0])
            if not masked:
                raise
            raise ValueError(_MASKED.format(masked[0], name)) from error

    return bound


_MASKED = """\
{0!r} is an optax.MaskedNode, left by optax.masked or optax.partition, and `{1}` failed
on a tree with it. Pass a `{1}` that takes such arrays from a keyword of `update`,
update(..., whole=params), where `fn` is the present one:

    def filled(p, whole):
        is_masked = lambda x: isinstance(x, optax.MaskedNode)
        pick = lambda x, y: y if is_masked(x) else x
        return fn(jax.tree.map(pick, p, whole, is_leaf=is_masked))

Or freeze arrays by gradients of 0 instead, before the optimiser:
optax.chain(optax.masked(optax.set_to_zero(), frozen), optimiser)."""


def _masked(tree: Any) -> list[str]:
    """The names of what Optax's wrappers have taken out of a tree."""

    def is_masked(x):
        return isinstance(x, optax.MaskedNode)

    return [
        _names.name_of(_names.path_of(keys))
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_masked)
        if is_masked(leaf)
    ]
