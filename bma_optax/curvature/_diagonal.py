"""The diagonal of G: given by the curvature, or probed.

diag G is a tree like params, in the dtype of statistics. Probing takes one product with
each unit vector, e_iᵀ G e_i, if there are at most ``num_probes`` of them. Otherwise it
averages x ∘ G x over that many vectors x of random signs.
"""

import jax
import jax.numpy as jnp

from bma_optax import _tree
from bma_optax.curvature import _probing, _user_functions
from bma_optax.curvature._probing import LinearOperator, Probed


def given(curvature, params, extra_args):
    """Returns the diagonal that ``curvature`` knows, like ``params``, or None."""
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
    """Probes diag G: a tree like the parameters, 0 in arrays that are not active.

    Args:
      curvature: the curvature, whose ``num_probes`` bounds the number of products.
      G: the curvature at the parameters.
      active: a flag for each array: whether to probe its diagonal.
      key: the numbers of a random key, uint32 of shape (2,).
    """
    leaves = jax.tree.leaves(G.params)
    size = sum(x.size for x, on in zip(leaves, active, strict=True) if on)
    if size <= curvature.num_probes:
        return _probing.by_units(G, active)
    return _probing.by_signs(G, active, key, curvature.num_probes)
