"""Calls to the user's functions: the keywords they get, and checks of their results.

The functions are the loss (``value_fn``: params -> shape ()), the parts of a curvature
(``model_fn``, ``loss_fn``, ...) and products v -> G v with trees like params. An error
names the function, says what it returned by dtype and shape, and what to pass instead.
Checks look at types and shapes only, so that they hold at trace time.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from bma_optax import _names, _tree


def loss(value_fn: Any, extra_args: dict[str, Any]) -> Callable[[Any], jax.Array]:
    """Returns ``value_fn`` as a function of the parameters alone, with its checks."""
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
    free_names(value_fn, extra_args, "`update`", ("value", "grad"))
    return scalar(bind(value_fn, extra_args, "value_fn"), "value_fn")


def free_names(value_fn: Any, given: Any, caller: str, taken: tuple[str, ...]) -> None:
    """Raises a ValueError if the loss needs an argument of a name that is ``taken``.

    Args:
      value_fn: the loss.
      given: the names of the arguments that it gets.
      caller: what has arguments of the names ``taken``, for the message.
      taken: these names.
    """
    for name in _needed(value_fn):
        if name in taken and name not in given:
            raise ValueError(
                f"`value_fn` needs an argument `{name}`, and {caller} has an argument "
                "of that name. Pass it under another name, data=..., with "
                f"value_fn=lambda params, data: fn(params, {name}=data)."
            )


def value_and_grad(value: Any, grad: Any, params: Any) -> tuple[jax.Array, Any]:
    """Returns the loss and its gradient as ``update`` was given them, after checks.

    Under ``optax.masked`` or ``optax.partition`` the gradient has more leaves than the
    parameters here; it comes back without those.
    """
    if not _tree.is_floating(value) or np.shape(value) != ():
        raise TypeError(
            f"`value` must be the loss at the parameters, shape (), got "
            f"{_described(value)}. Pass the value of `value_fn`, or neither `value` "
            "nor `grad`."
        )
    found = dict(_names.named_leaves(grad))
    if all(path in found for path, _ in _names.named_leaves(params)):
        grad = _tree.in_order(grad, params)
    grad = _tree.astype(like_params(grad, params, "grad"), params)
    return _tree.arrays(value), grad


def scalar(fn: Callable[..., Any], name: str) -> Callable[..., jax.Array]:
    """Returns ``fn`` with a TypeError for values that are not floating, shape ()."""

    def checked(*args):
        value = fn(*args)
        if isinstance(value, jax.Array) and value.shape == ():
            if _tree.is_floating(value):
                return value
            advice = "a function whose value is floating"
        elif isinstance(value, (tuple, list)):
            advice = (
                f"lambda *args, **kwargs: {name}(*args, **kwargs)[0], without what "
                "comes with the loss"
            )
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
    """Returns ``tree``; raises a TypeError for a leaf that is not real floating."""
    _tree.check_vectors(tree, f"`{name}`: the output")
    return tree


def vector(values: Any, name: str) -> jax.Array:
    """Returns ``values``; raises an error if they are not floating, shape (n,)."""
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
    """Returns ``tree``, which the function ``name`` gave, in ``params``' structure.

    Raises an error that names the first leaf of another shape, or not floating.
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
    """Returns ``fn`` as a product v -> G v with trees like ``params``.

    The product checks each result with :func:`like_params`. A result may have the dtype
    of its parameter or of the parameter's statistics; otherwise it is cast to the
    latter.
    """
    if not callable(fn):
        raise TypeError(
            f"`{name}` must return a function v -> G v, got {_described(fn)}. For a "
            "matrix A pass bma.Operator(lambda params: lambda v: A @ v)."
        )

    def convert(x, p):
        known = x.dtype in (_tree.dtype_of(p), _tree.statistic_dtype(p))
        return x if known else x.astype(_tree.statistic_dtype(p))

    def checked(v):
        result = like_params(fn(v), params, name)
        return jax.tree.map(convert, _tree.arrays(result), params)

    return checked


def _described(value: Any) -> str:
    """Describes a value by its dtype and shape, and a tuple or list by its items."""
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(map(_described, value))}"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}{list(value.shape)}"
    return "nothing" if value is None else f"a {type(value).__name__}"


def names_of_arguments(fn: Callable[..., Any]) -> list[str]:
    """Returns the names of the arguments after the first, in their order."""
    return [p.name for p in (_parameters(fn) or [])[1:]]


def _needed(fn: Callable[..., Any]) -> list[str]:
    """Returns the names of the arguments after the first that have no default."""
    named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    others = (_parameters(fn) or [])[1:]
    return [p.name for p in others if p.kind in named and p.default is p.empty]


def _parameters(fn: Callable[..., Any]) -> list[inspect.Parameter] | None:
    """Returns the parameters of a function; some that are written in C tell none."""
    try:
        return list(inspect.signature(fn).parameters.values())
    except ValueError:
        return None


def bind(
    fn: Callable[..., Any], extra_args: dict[str, Any], name: str
) -> Callable[..., Any]:
    """Returns ``fn`` with the extra arguments that its signature names.

    A function with ``**kwargs`` gets all of them. If ``fn`` fails on a tree that Optax
    has masked, the error says so.
    """
    parameters = _parameters(fn)
    if parameters is None:
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
    """Returns the names of the leaves that Optax's wrappers took out of ``tree``."""

    def is_masked(x):
        return isinstance(x, optax.MaskedNode)

    return [
        _names.name_of(_names.path_of(keys))
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_masked)
        if is_masked(leaf)
    ]
