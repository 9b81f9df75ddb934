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
    run = functools.partial(_run, method, refresh, product)
    runs, local, ratio, products = jax.device_get(jax.jit(run)(params, noise))
    ratio, products = float(ratio), int(products)
    if not local:
        return Trial(None, None, 0, 1.0, 1.0, True, ratio, False, products)
    falls, others = (
        np.asarray(x[:steps], float)
        for x, steps in zip(runs.falls, runs.steps, strict=True)
    )
    most = min(_MORE * len(falls), MOST_STEPS)
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
        convex=bool(runs.convex[0]),
        coarse_ratio=ratio,
        local=True,
        products=products + 1 + len(falls) + len(others),
    )


def _steps(falls) -> int:
    """The steps until 1e-6 of the gap is left, where the last one ends it."""
    left = np.sum(falls) - np.cumsum(falls)
    return 1 + int(np.argmax(left <= _GAP * np.sum(falls))) if len(falls) else 0


def _is_flat(falls) -> bool:
    """Whether the last step gained next to nothing."""
    return len(falls) == 0 or falls[-1] <= 0.1 * _GAP * np.sum(falls)


class _Run(NamedTuple):
    """How conjugate gradients went."""

    falls: jax.Array  # shape (MOST_STEPS,): by how much each step lowers the model.
    steps: jax.Array  # shape (), int32: how many there were.
    convex: jax.Array  # shape (), bool: whether all directions curve up.


def _run(method, refresh, product, params, noise):
    """Refreshes, and solves with the blocks and then without, all in one program.

    What :func:`trial` is given makes a program of its own each time, whose parts would
    take longer to compile one by one.

    Returns:
      A :class:`_Run` of two, whether G is local, the coarse ratio, and the number of
      products of the refresh.
    """
    found, factor = refresh(params)
    C = factor.inverse_diagonal, found.N, factor.K
    # An element without curvature does not move.
    z2 = jax.tree.map(lambda z: jnp.where(z > 0, z, 1), found.diagonal)

    def correct(r):
        return _tree.astype(method.apply(*C, r), r)

    def divide(r):
        return _tree.astype(jax.tree.map(jnp.divide, r, z2), r)

    b = _tree.astype(product(params, correct(noise)), params)

    def solve(last, with_blocks):
        most = jnp.where(with_blocks, MOST_STEPS, jnp.minimum(_MORE * last, MOST_STEPS))
        run = _conjugate_gradients(
            functools.partial(product, params),
            lambda r: jax.lax.cond(with_blocks, correct, divide, r),
            b,
            jnp.where(found.local, most, 0),
            jnp.where(with_blocks, 1e-3 * _GAP, 0),
        )
        return run.steps, run

    _, runs = jax.lax.scan(solve, jnp.int32(0), jnp.array([True, False]))
    return runs, found.local, factor.coarse_ratio, found.products


def _conjugate_gradients(product, precondition, b: Any, most, enough) -> _Run:
    """Runs until a step gains no more than the part ``enough`` of all."""
    z = precondition(b)
    rho = _tree.vdot(b, z)

    def going(carry):
        *_, rho, falls, k, convex = carry
        last = falls[jnp.maximum(k - 1, 0)]
        slow = (k > 0) & (last <= enough.astype(last.dtype) * jnp.sum(falls))
        return (k < most) & convex & (rho > 0) & ~slow

    def step(carry):
        r, p, rho, falls, k, _ = carry
        Gp = product(p)
        curved = _tree.vdot(p, Gp)
        convex = curved > 0
        a = jnp.where(convex, rho / jnp.where(convex, curved, 1), 0)
        r = jax.tree.map(lambda r, y: r - a.astype(r.dtype) * y.astype(r.dtype), r, Gp)
        z = precondition(r)
        new = _tree.vdot(r, z)
        beta = new / rho
        p = jax.tree.map(lambda z, p: z + beta.astype(p.dtype) * p, z, p)
        return r, p, new, falls.at[k].set(a * rho / 2), k + 1, convex

    start = b, z, rho, jnp.zeros(MOST_STEPS, rho.dtype), jnp.int32(0), jnp.asarray(True)
    *_, falls, k, convex = jax.lax.while_loop(going, step, start)
    return _Run(falls, k, convex)
