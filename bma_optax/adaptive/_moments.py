"""Decayed averages of gradients and of their squares, as in Adam (Kingma and Ba, 2014).

    m <- b1 m + (1 - b1) g,   nu <- b2 nu + (1 - b2) g²,
    update = (m / (1 - b1^t)) / ((nu / (1 - b2^t) + eps_root)^½ + eps)

after t steps. The functions work on single arrays, of any shape, unless they say tree.
"""

import jax
import jax.numpy as jnp

from bma_optax import _tree, _xla_sums


def start_momentum(params, mu_dtype):
    """Zeros like the tree params, of dtype ``mu_dtype``, or of their own if None."""
    if mu_dtype is not None:
        mu_dtype = jax.dtypes.canonicalize_dtype(mu_dtype)
    return _tree.zeros_like(params, lambda p: mu_dtype or _tree.dtype_of(p))


def decay(new, old, b):
    """(1 - b) new + b old, in the dtype of ``new``."""
    old = old.astype(new.dtype)
    return jnp.asarray(1 - b, new.dtype) * new + jnp.asarray(b, new.dtype) * old


def bias_correction(count, b, dtype):
    """1 - b^count, the divisor of averages over ``count`` steps; shape ()."""
    return 1 - jnp.asarray(b, dtype) ** count.astype(dtype)


def over_root(x, nu, eps, eps_root=0.0):
    """x / ((nu + eps_root)^½ + eps), and 0 where nu is 0: no gradient has been there.

    nu has the shape of x or broadcasts to it.
    """
    root = _xla_sums.sqrt(nu + jnp.asarray(eps_root, nu.dtype))
    root = root + jnp.asarray(eps, nu.dtype)
    alive = nu > 0
    return jnp.where(alive, x, 0) / jnp.where(alive, root, 1)


def adam(g, mu, nu, count, b1, b2, eps):
    """Adam's update of one array, and its moments after ``count`` steps.

    An element of g that is not finite counts as 0 in the moments and is its own update.
    """
    finite = jnp.isfinite(g)
    mu = decay(jnp.where(finite, g, 0), mu, b1)
    nu = decay(jnp.where(finite, jnp.square(g), 0), nu, b2)
    m = mu / bias_correction(count, b1, g.dtype)
    r = over_root(m, nu / bias_correction(count, b2, g.dtype), eps)
    return jnp.where(finite, r, g), mu, nu
