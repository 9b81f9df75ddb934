"""Sums over parts of an array, as XLA computes them in one pass and stores nothing.

XLA on CPU is fast at products of matrices. In a sum over all but the last axis it takes
one element at a time. On a GPU it computes several sums over the same arrays in one
pass, if each sum has many results. The functions here choose for both.
``tests/test_xla.py`` fails when a new XLA no longer needs it.
"""

import functools
import string

import jax
import jax.numpy as jnp

from bma_optax import _sharding

_PIECES = 8


def total(x, axes):
    """Σ x over ``axes``, which keep length 1, where x is stored or cheap."""

    def product_with_ones(x):
        other = tuple(i for i in range(x.ndim) if i not in axes)
        ones = [1 if i in other else n for i, n in enumerate(x.shape)]
        return _product(x, jnp.ones(ones, x.dtype), axes, other)

    if not 0 < len(axes) < x.ndim or not _sharding.is_whole(x):
        return jnp.sum(x, axis=axes, keepdims=True)
    return jax.lax.platform_dependent(
        x, cpu=product_with_ones, default=lambda x: total_in_two_steps(x, axes)
    )


def total_of(f, axes, *arrays):
    """Σ f(*arrays) over ``axes``, which keep length 1, for f element by element.

    XLA on CPU computes f one element at a time if it fuses f into a sum over all but
    the last axis, and stores f for a product of matrices. So a few pieces are added up
    first, many elements at a time, and a product of matrices adds what is left.

    Args:
      f: from arrays to an array.
      axes: positions, of none or more.
      arrays: of shapes that broadcast; the first has the shape of the result.
    """
    shape = arrays[0].shape
    axis = max(axes, key=lambda i: shape[i], default=0)
    length = shape[axis] if 0 < len(axes) < len(shape) else 0
    size = length // _PIECES

    def by_pieces(*arrays):
        def of(start, stop):
            cut = functools.partial(
                jax.lax.slice_in_dim, start_index=start, limit_index=stop, axis=axis
            )
            return f(*(x if x.shape[axis] == 1 else cut(x) for x in arrays))

        parts = [of(i * size, (i + 1) * size) for i in range(_PIECES)]
        sums = total(sum(parts[1:], parts[0]), axes)
        if length % _PIECES:
            sums += total(of(_PIECES * size, length), axes)
        return sums

    def at_once(*arrays):
        return total(f(*arrays), axes)

    if size == 0 or not all(map(_sharding.is_whole, arrays)):
        return at_once(*arrays)
    return jax.lax.platform_dependent(*arrays, cpu=by_pieces, default=at_once)


def total_in_two_steps(x, axes):
    """Σ x over ``axes``, which keep length 1, for XLA on a GPU.

    A sum over all but the last axis has few results, and few processors would compute
    x, so XLA stores x. Sums over fewer than 32 elements each have many results: XLA
    fuses x into them, and makes one pass of several such sums over the same arrays.
    """
    if axes and x.ndim - 1 not in axes and _sharding.is_whole(x):
        axis = max(axes, key=lambda i: x.shape[i])
        n = x.shape[axis]
        few = max(k for k in range(1, 32) if n % k == 0)
        if 1 < few < n:
            x = x.reshape(*x.shape[:axis], n // few, few, *x.shape[axis + 1 :])
            x = jax.lax.optimization_barrier(jnp.sum(x, axis=axis + 1))
    return jnp.sum(x, axis=axes, keepdims=True)


def sum_of_products(x, y, axes, other):
    """Σ x y over ``axes``, for y of length 1 along the ``other`` ones.

    On CPU it is a product of matrices, which takes less time than a sum of products.
    Along sharded axes it is a sum: for a product JAX wants to be told what becomes of
    the shards. On other platforms it is a sum, into which XLA fuses the arithmetic that
    makes x, so that x is not stored.
    """

    def as_sum(x, y):
        return total_in_two_steps(x * y, axes)

    if any(axis is not None for axis in jax.typeof(x).sharding.spec):
        return as_sum(x, y)
    product = functools.partial(_product, axes=axes, other=other)
    return jax.lax.platform_dependent(x, y, cpu=product, default=as_sum)


def _product(x, y, axes, other):
    """Σ x y over ``axes`` by a product of matrices, for y of length 1 along ``other``.

    Where the axes that are summed come first, so does y: in the other order XLA would
    turn x around in a copy.
    """
    letters = string.ascii_letters[: x.ndim]
    left = "".join(letters[i] for i in range(x.ndim) if i not in axes)
    mine = "".join(letters[i] for i in range(x.ndim) if i not in other)
    factors = [(letters, x), (mine, jnp.squeeze(y, other))]
    if min(axes, default=0) < min(other, default=0):
        factors.reverse()
    (first, a), (second, b) = factors
    terms, highest = f"{first},{second}->{left}", jax.lax.Precision.HIGHEST
    return jnp.expand_dims(jnp.einsum(terms, a, b, precision=highest), axes)


@jax.custom_jvp
def sqrt(x):
    """The root of x >= 0; its derivative is 0 at 0, where others were infinite.

    It has no comparison, so that XLA on CPU fuses it into a sum over it.
    """
    return jnp.sqrt(x)


@sqrt.defjvp
def _sqrt_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    root = sqrt(x)
    return root, jnp.where(x > 0, tangent / (2 * jnp.where(x > 0, root, 1)), 0)
