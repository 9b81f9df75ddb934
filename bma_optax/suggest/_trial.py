"""Conjugate gradients on G x = b with the blocks and without: whether they pay.

The k-th step lowers the quadratic model by (r_k · z_k)² / 2 p_k · G p_k. What all
later steps lower it by is the gap that is left after k steps.
"""

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _tree

MOST_STEPS = 300
_MORE = 10  # As many times more steps are tried without blocks.
_GAP = 1e-6
_RIGHT_SIDE, _NOISE = 0, -1  # What conjugate gradients begin with, see there.
_SECONDS = 0.05  # A solve is timed for so long, or once.


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
    seconds: float  # of a step with blocks.


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
        return Trial(None, None, 0, 1.0, 1.0, True, ratio, False, products, 0.0)

    def coarse(C, r):
        return _tree.astype(method.apply(*C, r), r)

    C = factor.inverse_diagonal, found.N, factor.K
    most = MOST_STEPS, 1e-3 * _GAP
    solve = _conjugate_gradients.lower(product, coarse, _NOISE, most, C, params, noise)
    run = solve.compile()
    solved, seconds = _timed(lambda: run(_NOISE, most, C, params, noise))
    b, falls, convex = _falls(solved)
    most = min(_MORE * len(falls), MOST_STEPS), 0.0
    _, others, _ = _falls(
        _conjugate_gradients(
            product, _divide, _RIGHT_SIDE, most, found.diagonal, params, b
        )
    )
    whole = max(np.sum(falls), np.sum(others))
    converged = len(falls) < MOST_STEPS
    # Both sums are as exact as the numbers in them, and no more.
    rounding = 1e3 * float(jnp.finfo(_tree.common_statistic_dtype(params)).eps)
    done = len(others) < most[0] or _is_flat(others)
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
        seconds=seconds / (1 + len(falls)),
    )


def _divide(z2, r):
    """The diagonal method, as a function that is the same for every rule.

    An element without curvature has no residual.
    """
    return jax.tree.map(
        lambda x, z: (x / jnp.where(z > 0, z, 1)).astype(x.dtype), r, z2
    )


def _timed(run) -> tuple[Any, float]:
    """Runs a function; adds its seconds, the least of several runs if it is short."""
    seconds: list[float] = []
    while sum(seconds) < _SECONDS:
        start = time.perf_counter()
        found = jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return found, min(seconds)


def _steps(falls) -> int:
    """The steps until 1e-6 of the gap is left, where the last one ends it."""
    left = np.sum(falls) - np.cumsum(falls)
    return 1 + int(np.argmax(left <= _GAP * np.sum(falls))) if len(falls) else 0


def _is_flat(falls) -> bool:
    """Whether the last step gained next to nothing."""
    return len(falls) == 0 or falls[-1] <= 0.1 * _GAP * np.sum(falls)


def _falls(solved) -> tuple[Any, np.ndarray, bool]:
    """The right side, by how much each step lowers the model, and convexity."""
    b, falls, count, convex = solved
    return b, np.asarray(falls, float)[: int(count)], bool(convex)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _conjugate_gradients(product, precondition, first, limits, C, params, r: Any):
    """Solves G x = b until a step gains too little.

    The loop holds the product and C once, so that they are compiled once: it also makes
    the right side, as its step -1.

    Args:
      product: (params, v) -> G v.
      precondition: (C, r) -> C r.
      first: 0 for the right side b = r; -1 for b = G C r.
      limits: the number of steps, and the part of all gains that is too little.
      C, params, r: arrays.

    Returns:
      b, the gains, their number, and whether all directions curve up.
    """
    most, enough = limits

    def going(carry):
        *_, falls, k, convex, solved = carry
        last = falls[jnp.maximum(k - 1, 0)]
        slow = (k > 0) & (last <= enough * jnp.sum(falls))
        return (k < most) & convex & ~solved & ~slow

    def step(carry):
        b, r, p, rho, falls, k, *_ = carry
        z = precondition(C, r)
        new = _tree.vdot(r, z)
        solved = ~(new > 0)
        beta = jnp.where(k > 0, new / rho, 0)
        p = jax.tree.map(lambda z, p: z + beta.astype(p.dtype) * p, z, p)
        Gp = _tree.astype(product(params, p), r)
        curved = _tree.vdot(p, Gp)
        convex = (curved > 0) | solved | (k < 0)
        a = jnp.where(curved > 0, new / jnp.where(curved > 0, curved, 1), 0)

        def residual(r, y):
            return jnp.where(k < 0, y, r - a.astype(r.dtype) * y.astype(r.dtype))

        b = jax.tree.map(lambda b, y: jnp.where(k < 0, y, b), b, Gp)
        r = jax.tree.map(residual, r, Gp)
        gain = jnp.where((k < 0) | solved, 0, a * new / 2)
        falls = falls.at[jnp.maximum(k, 0)].set(gain)
        return b, r, p, new, falls, jnp.where(solved, k, k + 1), convex, solved

    one = jnp.ones((), _tree.vdot(r, r).dtype)
    start = r, r, r, one, jnp.zeros(MOST_STEPS, one.dtype), jnp.int32(first)
    b, *_, falls, k, convex, _ = jax.lax.while_loop(
        going, step, (*start, jnp.asarray(True), jnp.asarray(False))
    )
    return b, falls, jnp.maximum(k, 0), convex
