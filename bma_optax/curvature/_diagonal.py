"""The diagonal of G: given by the curvature, or probed.

Probed by one product for each unit vector where these are few, else by products with
random signs: diag G is the mean of x ∘ G x.
"""

import jax
import jax.numpy as jnp

from bma_optax import _tree
from bma_optax.curvature import _probing, _user_functions
from bma_optax.curvature._probing import LinearOperator, Probed


def given(curvature, params, extra_args):
    """The diagonal that a curvature knows, in the dtypes of statistics, or None."""
    known = curvature.diagonal(params, extra_args)
    if known is None:
        return None
    own = f"{type(curvature).__name__}.diagonal"
    name = own if curvature.diagonal_fn is None else "diagonal_fn"
    return jax.tree.map(
        lambda x, p: jnp.asarray(x, _tree.statistic_dtype(p)),
        _user_functions.like_params(known, params, name),
        params,
    )


def probed(curvature, G: LinearOperator, active, key) -> Probed:
    """diag G on the active arrays, 0 on others; a tree like the parameters.

    Args:
      curvature: tells how many products it may cost.
      G: the curvature at the parameters.
      active: whether each array is to be probed.
      key: a random key.
    """
    leaves = jax.tree.leaves(G.params)
    size = sum(x.size for x, on in zip(leaves, active, strict=True) if on)
    if size <= curvature.num_probes:
        return _probing.by_units(G, active)
    return _probing.by_signs(G, active, key, curvature.num_probes)
