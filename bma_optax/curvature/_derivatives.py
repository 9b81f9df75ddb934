"""Products with Jacobians, J v and Jᵀ u, and with Hessians, H v, by differentiation.

x and v are trees of the same shapes; f(x) and u are a scalar or trees of the same
shapes. Forward mode (``jax.linearize``) comes first. JAX refuses it where ``f`` holds a
``custom_vjp``, which defines reverse mode alone. Two uses of reverse mode then take its
place: J v is the transpose of u -> Jᵀ u, and the Hessian, being symmetric, is the
transposed Jacobian of the gradient.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Product = Callable[[Any], Any]

OPERATOR = "a bma.Operator with the product in its own words as `curvature`"
# The errors that JAX raises where a function has no derivative.
_REFUSALS = (TypeError, ValueError, NotImplementedError, AssertionError)


def hessian(
    f: Callable[..., Any], x: Any, name: str, instead: str = OPERATOR
) -> Product:
    """Returns v -> H v, with H the Hessian at ``x`` of f, which returns a scalar.

    Args:
      f: the function, from trees like ``x`` to shape ().
      x: a tree of real floating arrays.
      name: the user's name for ``f``, for errors.
      instead: the advice of an error, if ``f`` has no second derivatives.
    """
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
    """Returns f(x), v -> J v and u -> Jᵀ u, with J the Jacobian of ``f`` at ``x``.

    ``name`` is the user's name for ``f``, for errors.
    """

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
    """Raises JAX's TypeError if ``product`` holds a ``custom_vjp``.

    ``jax.linearize`` itself does not raise. An error would come later, when the product
    is run or batched, and reverse mode could then no longer take its place.
    """

    def batched(x):
        return jax.vmap(product)(jax.tree.map(lambda p: p[None], x))

    try:
        jax.eval_shape(batched, x)
    except Exception as error:
        if _is_refusal(error):
            raise  # Other errors concern batches, which may not be needed.


def _is_refusal(error: Exception) -> bool:
    """Whether JAX refuses forward mode because of a ``custom_vjp``."""
    return isinstance(error, TypeError) and "custom_vjp" in str(error)


def _first(forward, reverse, once, message):
    """Returns ``forward()``, or ``reverse()`` where a custom_vjp forbids that.

    Raises a TypeError with ``message`` if JAX refuses both. If JAX also refuses
    ``once``, which takes a first derivative, its own error is raised.
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
            raise  # The user's function fails by itself.
        raise TypeError(message) from error
