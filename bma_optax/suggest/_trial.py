"""Conjugate gradients on G x = b with the blocks and without: whether they pay.

The k-th step lowers the quadratic model by (r_k · z_k)² / 2 p_k · G p_k. What all
later steps lower it by is the gap that is left after k steps.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _tree

MOST_STEPS = 300
_MORE = 10  # As many times more steps are tried without blocks.
_GAP = 1e-6


class Trial(NamedTuple):
    """How conjugate gradients went with the blocks of a rule and without any."""

    steps: int | None  # to 1e-6 of the gap; None: not in MOST_STEPS.
    steps_without: int | None  # by the diagonal alone; None: not in ``tried``.
    tried: int  # steps without blocks.
    left: float  # the part of the gap, as far as it is known, left in the end.
    left_without: float
    convex: bool  # whether no direction of negative curvature was met.
    coarse_ratio: float
    local: bool  # whether G reaches no further than the rule declares.
    products: int


def trial(method, refresh, product, params, noise) -> Trial:
    """Refreshes C of a rule, then solves with it and with the diagonal alone.

    The right side is G C times noise, which is like noise and in the range of G. A
    gradient could be a single eigenvector, which any method finds at once.

    Args:
      method: the :class:`TwoLevel` of the rule.
      refresh: params -> what :meth:`TwoLevel.gather` and ``invert`` give.
      product: (params, v) -> G v.
      params: the parameters.
      noise: a tree like them.
    """
    found, factor = jax.jit(refresh)(params)
    products = int(found.products)
    ratio = float(factor.coarse_ratio)
    if not bool(found.local):
        return Trial(None, None, 0, 1.0, 1.0, True, ratio, False, products)

    def coarse(C, r):
        return _tree.astype(method.apply(*C, r), r)

    C = factor.inverse_diagonal, found.N, factor.K
    # An element without curvature does not move.
    z2 = jax.tree.map(lambda z: jnp.where(z > 0, z, 1), found.diagonal)
    b = product(params, coarse(C, noise))
    b = _tree.astype(b, params)
    solve = functools.partial(_falls, product)
    falls, convex = solve(coarse, C, params, b, MOST_STEPS, 1e-3 * _GAP)
    most = min(_MORE * len(falls), MOST_STEPS)
    others, _ = solve(_divide, z2, params, b, most, 0.0)
    whole = max(np.sum(falls), np.sum(others))
    converged = len(falls) < MOST_STEPS
    # Both sums are as exact as the numbers in them, and no more.
    rounding = 1e3 * float(jnp.finfo(_tree.common_statistic_dtype(params)).eps)
    done = len(others) < most or _is_flat(others)
    as_far = np.sum(others) >= (1 - rounding) * whole and done
    left, left_without = (
        float(1 - np.sum(x) / whole) if whole else 0.0 for x in (falls, others)
    )
    return Trial(
        steps=_steps(falls) if converged else None,
        steps_without=_steps(others) if converged and as_far else None,
        tried=len(others),
        left=left,
        left_without=left_without,
        convex=convex,
        coarse_ratio=ratio,
        local=True,
        products=products + 1 + len(falls) + len(others),
    )


def _divide(z2, r):
    """The diagonal method, as a function that is the same for every rule."""
    return jax.tree.map(lambda x, z: (x / z).astype(x.dtype), r, z2)


def _steps(falls) -> int:
    """The steps until 1e-6 of the gap is left, where the last one ends it."""
    left = np.sum(falls) - np.cumsum(falls)
    return 1 + int(np.argmax(left <= _GAP * np.sum(falls))) if len(falls) else 0


def _is_flat(falls) -> bool:
    """Whether the last step gained next to nothing."""
    return len(falls) == 0 or falls[-1] <= 0.1 * _GAP * np.sum(falls)


def _falls(
    product, precondition, C, params, b, most, enough
) -> tuple[np.ndarray, bool]:
    """By how much each step lowers the model, and whether all directions curve up."""
    falls, count, convex = _conjugate_gradients(
        product, precondition, most, enough, C, params, b
    )
    return np.asarray(falls, float)[: int(count)], bool(convex)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _conjugate_gradients(product, precondition, most, enough, C, params, b: Any):
    """Runs until a step gains no more than the part ``enough`` of all."""
    z = precondition(C, b)
    rho = _tree.vdot(b, z)

    def going(carry):
        *_, rho, falls, k, convex = carry
        last = falls[jnp.maximum(k - 1, 0)]
        slow = (k > 0) & (last <= enough * jnp.sum(falls))
        return (k < most) & convex & (rho > 0) & ~slow

    def step(carry):
        r, p, rho, falls, k, _ = carry
        Gp = product(params, p)
        curved = _tree.vdot(p, Gp)
        convex = curved > 0
        a = jnp.where(convex, rho / jnp.where(convex, curved, 1), 0)
        r = jax.tree.map(lambda r, y: r - a.astype(r.dtype) * y.astype(r.dtype), r, Gp)
        z = precondition(C, r)
        new = _tree.vdot(r, z)
        beta = new / rho
        p = jax.tree.map(lambda z, p: z + beta.astype(p.dtype) * p, z, p)
        return r, p, new, falls.at[k].set(a * rho / 2), k + 1, convex

    start = b, z, rho, jnp.zeros(MOST_STEPS, rho.dtype), jnp.int32(0), jnp.asarray(True)
    *_, falls, k, convex = jax.lax.while_loop(going, step, start)
    return falls, k, convex
