"""Products with Jacobians and Hessians, also where JAX has reverse mode alone.

A ``custom_vjp`` says how a function is transposed and knows no forward mode. Two uses
of reverse mode stand in for it: J v is the transpose of u -> Jᵀ u, and the Hessian,
which is symmetric, is the transposed Jacobian of the gradient.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Product = Callable[[Any], Any]

OPERATOR = "a bma.Operator with the product in its own words as `curvature`"
# What JAX raises where a function has no derivative.
_REFUSALS = (TypeError, ValueError, NotImplementedError, AssertionError)


def hessian(
    f: Callable[..., Any], x: Any, name: str, instead: str = OPERATOR
) -> Product:
    """v -> Hessian of f times v; the words are for an error."""
    gradient = jax.grad(f)

    def forward():
        product = jax.linearize(gradient, x)[1]
        _check_forward(product, x)
        return product

    def reverse():
        transpose = jax.vjp(gradient, x)[1]
        return lambda v: transpose(v)[0]

    def once():
        jax.eval_shape(gradient, x)

    message = (
        f"`{name}` has no second derivatives: JAX cannot differentiate its gradient. "
        f"Pass {instead} instead."
    )
    return _first(forward, reverse, once, message)


def jacobian(f: Callable[..., Any], x: Any, name: str) -> tuple[Any, Product, Product]:
    """f(x), v -> J v and u -> Jᵀ u; ``name`` is for an error."""

    def forward():
        y, product = jax.linearize(f, x)
        _check_forward(product, x)
        transpose = jax.linear_transpose(product, x)
        return y, product, lambda u: transpose(u)[0]

    def reverse():
        y, vjp = jax.vjp(f, x)
        transpose = jax.vjp(lambda u: vjp(u)[0], jax.tree.map(jnp.zeros_like, y))[1]
        return y, lambda v: transpose(v)[0], lambda u: vjp(u)[0]

    def once():
        jax.eval_shape(lambda x: jax.vjp(f, x)[1](f(x)), x)

    message = (
        f"`{name}` has no products with its Jacobian: it holds a custom_vjp whose "
        f"backward pass JAX cannot differentiate. Pass {OPERATOR} instead."
    )
    return _first(forward, reverse, once, message)


def _check_forward(product: Product, x: Any) -> None:
    """Raises JAX's TypeError where a part of ``product`` is a ``custom_vjp``.

    ``jax.linearize`` lets it pass. What runs or batches the product raises, which may
    be too late to do something else.
    """

    def batched(x):
        return jax.vmap(product)(jax.tree.map(lambda p: p[None], x))

    try:
        jax.eval_shape(batched, x)
    except Exception as error:
        if _is_refusal(error):
            raise  # Others are about batches, which may not be needed.


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, TypeError) and "custom_vjp" in str(error)


def _first(forward, reverse, once, message):
    """What ``forward`` gives; ``reverse`` where JAX refuses that for a custom_vjp.

    Raises a TypeError where JAX refuses both, but not ``once``, the first derivative.
    """
    try:
        try:
            return forward()
        except TypeError as error:
            if not _is_refusal(error):
                raise
            return reverse()
    except _REFUSALS as error:
        try:
            once()
        except Exception:
            first = False
        else:
            first = True
        if not first:
            raise  # The function itself is at fault.
        raise TypeError(message) from error
