"""What Newton-BMA gathers of a curvature: N, the diagonal, and whether it is local."""

import jax
import jax.numpy as jnp

from bma_optax import _coarse, _diagonal, _layout, _sizes


def plan(params, rule, couple, reach, levels, warn=False):
    """The partition of parameters and its coarse systems; static."""
    blocks = _layout.layout(params, rule, couple)
    if warn:
        _layout.warn_of_guesses(blocks)
        _sizes.check_dense(blocks, reach is not None)
    systems = _coarse.systems(blocks, reach, levels)
    if warn:
        _sizes.check_nested(systems, blocks)
    return blocks, systems


def gather(curvature, systems, blocks, product, params, key, extra_args):
    """N of all systems, |diag G| like params, and whether a declared reach is true."""
    key_N, key_diagonal = jax.random.split(key)
    N, error = _coarse.gather(systems, product, blocks, params, key_N)
    diagonal, diagonal_error = _diagonal.diagonal(
        curvature, systems, product, blocks, N, params, key_diagonal, extra_args
    )
    # How exact a product by a declared reach is, with room for rounding.
    eps = [float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(params)]
    tolerance = max(eps, default=0.0) ** 0.5
    return N, diagonal, jnp.maximum(error, diagonal_error) <= tolerance


def raise_if_not_local(local, reach) -> None:
    """Raises a ValueError if the flag is False and not traced."""
    try:
        failed = not bool(local)
    except jax.errors.ConcretizationTypeError:
        return  # Under jit: the state has the flag.
    if failed:
        raise ValueError(
            f"The curvature reaches further than `reach`={reach} declares, or around a "
            "periodic grid whose number of tiles is no multiple of 2k + 1 (k the reach "
            "in tiles) or whose number of elements is none of reach + 1. A larger "
            "reach, or None, is accepted."
        )
