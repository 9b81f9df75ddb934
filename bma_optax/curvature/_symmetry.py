"""Whether G is symmetric, by products with a few random vectors.

With F = Z^-1 G Z^-1 and vectors u and v of random signs, uᵀ F v - vᵀ F u is a random
number of about the size of F - Fᵀ. It is 0 for a symmetric G.
"""

import jax
import jax.numpy as jnp

from bma_optax import _random, _sharding, _tree, _warnings
from bma_optax.curvature import _probing
from bma_optax.curvature._probing import LinearOperator

_PAIRS = ((0, 1), (1, 2), (2, 0))  # Of vectors: a single pair can agree by chance.
# Conjugate gradients bear a smaller difference, such as that of products which iterate
# themselves.
_TOLERANCE = 1e-2
_MOST = 0.1  # What rounding is taken to explain at most.


def check(G: LinearOperator, z2, key) -> None:
    """Raises a ValueError, or warns where JAX traces, if G is not symmetric.

    Args:
      G: the operator, on trees with at least one array.
      z2: |diag G|, a tree like the parameters, without zeros.
      key: the numbers of a random key, uint32 of shape (2,).
    """
    product = _sharding.explicit(G.product, G.params)

    def measure(params, z2, key):
        return _skewness(LinearOperator(product, params), z2, key)

    skew, tolerance = _sharding.automatic(
        *(measure, G.params, z2, key),
        out=lambda: _sharding.replicated((0.0, 0.0), G.params),
    )
    # NaN is not above the tolerance: another check finds products that are not finite.
    _warnings.raise_or_warn(skew > tolerance, _message, skew)


def _skewness(G, z2, key):
    """The largest difference over pairs of vectors, and what rounding explains of it.

    Both are relative to the size of F v and have shape ().
    """
    unit = jax.tree.map(_probing.power_of_2, z2, G.params)
    every = [True] * len(jax.tree.leaves(unit))

    def vector(number):
        signs = _probing.random_signs(G.params, _random.fold(key, number), every)
        return _tree.astype(signs, unit)

    def image(number, scale):
        """F v of a multiple of a vector, over that multiple."""

        def scaled(v, unit):
            return scale.astype(unit.dtype) * v * unit

        y = G(_tree.astype(jax.tree.map(scaled, vector(number), unit), G.params))
        return jax.tree.map(
            lambda y, u: y.astype(u.dtype) * u / scale.astype(u.dtype), y, unit
        )

    numbers = jnp.asarray([0, 1, 2, 0])
    scales = jnp.asarray([1, 1, 1, _probing.SCALE], jnp.float32)
    images = _probing.batched(image, (numbers, scales), G.params)
    # Divide by the largest number first, or squares would overflow or vanish.
    dtype = _tree.common_statistic_dtype(unit)
    sizes = [jnp.max(jnp.abs(y), initial=0) for y in jax.tree.leaves(images)]
    largest = _probing.or_one(jnp.max(jnp.stack([x.astype(dtype) for x in sizes])))
    images = jax.tree.map(lambda y: y / largest.astype(y.dtype), images)
    first, *_, again = F = [jax.tree.map(lambda y, i=i: y[i], images) for i in range(4)]

    def norm(x):
        return jnp.sqrt(_tree.vdot(x, x))

    def difference(i, j):
        return jnp.abs(_tree.vdot(vector(i), F[j]) - _tree.vdot(vector(j), F[i]))

    size = _probing.or_one(norm(first))
    skew = jnp.max(jnp.stack([difference(*pair) for pair in _PAIRS])) / size
    rounding = norm(jax.tree.map(jnp.subtract, again, first)) / size
    return skew, jnp.clip(_probing.ROUNDINGS * rounding, _TOLERANCE, _MOST)


def _message(skew) -> str:
    return (
        "`product_fn` is not symmetric: for random u and v, uᵀAv and vᵀAu differ by "
        f"{float(skew):.1e}, relative. Conjugate gradients need a symmetric A, and so "
        "does its preconditioner. Pass the products with its symmetric part instead, "
        "lambda v: (A(v) + jax.linear_transpose(A, v)(v)[0]) / 2, and solve with A by "
        "jax.scipy.sparse.linalg.gmres."
    )
