"""Decayed averages of gradients and their squares, as in Adam."""

import jax
import jax.numpy as jnp

from bma_optax import _tree, _xla


def start_momentum(params, mu_dtype):
    """Zeros like params, of the dtype ``mu_dtype`` or their own."""
    if mu_dtype is not None:
        mu_dtype = jax.dtypes.canonicalize_dtype(mu_dtype)
    return jax.tree.map(
        lambda p: jnp.zeros_like(p, dtype=mu_dtype or _tree.dtype_of(p)), params
    )


def decay(new, old, b):
    """(1 - b) new + b old, in the dtype of ``new``."""
    old = old.astype(new.dtype)
    return jnp.asarray(1 - b, new.dtype) * new + jnp.asarray(b, new.dtype) * old


def bias_correction(count, b, dtype):
    """1 - b^count, by which averages over ``count`` steps are divided."""
    return 1 - jnp.asarray(b, dtype) ** count.astype(dtype)


def over_root(x, nu, eps, eps_root=0.0):
    """x / (√(nu + eps_root) + eps), and 0 where nu is: there has been no gradient."""
    root = _xla.sqrt(nu + jnp.asarray(eps_root, nu.dtype))
    root = root + jnp.asarray(eps, nu.dtype)
    alive = nu > 0
    return jnp.where(alive, x, 0) / jnp.where(alive, root, 1)


def adam(g, mu, nu, count, b1, b2, eps):
    """Adam's update of one array, and its moments after ``count`` steps.

    A gradient that is not finite counts as 0 and gives itself for an update.
    """
    finite = jnp.isfinite(g)
    mu = decay(jnp.where(finite, g, 0), mu, b1)
    nu = decay(jnp.where(finite, jnp.square(g), 0), nu, b2)
    m = mu / bias_correction(count, b1, g.dtype)
    r = over_root(m, nu / bias_correction(count, b2, g.dtype), eps)
    return jnp.where(finite, r, g), mu, nu
