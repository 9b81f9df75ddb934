"""Mini-BMA with more than one direction an array: four of inputs, or one of units too.

Experiments of networks.py, built on the library's mini-BMA. G is an array's gradient
as units x inputs, n x s; m the momentum; averages decay by b2 and have Adam's
correction. Arrays that are no such matrix have the library's Adam. No LAPACK.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bma_optax as bma
from bma_optax import _tree
from bma_optax.adaptive import _mini, _moments
from bma_optax.partitions import _build, _units


def scale_by_mini_bma_of(
    k: int, partition, b1: Any = 0.9, b2: Any = 0.99, eps: Any = 1e-8, b3: Any = 0.95
):
    r"""Mini-BMA with k orthonormal directions over the inputs of an array.

    With Q (s x k) and decayed averages h_i of sum_j G_ij^2 and M_ic of (G Q)_ic^2,

        Lambda_i = max((h_i - sum_c M_ic) / (s - k), 1e-3 h_i / s)
        update_i = (m_i + sum_c (max(M_ic / Lambda_i, 1)^-1/2 - 1) (m_i Q)_c Q_c)
                   / (Lambda_i^1/2 + eps)

    every component can shrink and not grow. Then a step of subspace iteration:

        Y_c <- b3 Y_c + (1 - b3) G^T G Q_c / |G^T G Q_c|,  Q = orthonormalized Y,

    from the first k cosines (DCT-II), of which the first is plain means. An array has
    min(k, s - 1, n) directions, k (n + s) + n numbers of state beside the momentum:
    `mean_nu` and `direction` have an axis of k in front.
    """

    def init(params):
        arrays = _build.layout(params, partition, "block").arrays

        def one(units, p):
            zeros = jnp.zeros_like(p, dtype=_tree.statistic_dtype(p))
            if units is None:
                return _mini._Array(None, None, zeros, *[_units.placeholder(zeros)] * 2)
            nu = units.over_inputs(units.split(zeros))
            start = cosines(units, min(k, units.num_inputs - 1, units.num_units))
            direction = start.astype(nu.dtype) + jnp.zeros_like(units.constant(zeros))
            mean_nu = jnp.zeros((len(start), *nu.shape), nu.dtype)
            return _mini._Array(None, None, nu, mean_nu, direction)

        start = _units.map_arrays(_mini._Array, one, arrays, params)
        mu = _moments.start_momentum(params, None)
        return bma.ScaleByMiniBMAState(jnp.zeros((), jnp.int32), mu, *start[2:])

    def update(updates, state, params=None):
        arrays = _build.layout(updates, partition, "block").arrays
        count = optax.safe_increment(state.count)

        def one(units, gradient, mu, nu, mean_nu, direction):
            if units is None:
                r, mu, nu = _moments.adam(gradient, mu, nu, count, b1, b2, eps)
                return _mini._Array(r, mu, nu, mean_nu, direction)
            g, mu = units.split(gradient), units.split(mu)
            Q = orthonormal(direction, units.inputs)
            times = jax.vmap(units.times, (None, 0))
            squares = units.over_inputs(jnp.square(g))
            finite = jnp.isfinite(squares)
            a = jnp.where(finite, times(g, Q), 0)
            mu = jnp.where(finite, _moments.decay(g, mu, b1), mu)
            nu = jnp.where(finite, _moments.decay(squares, nu, b2), nu)
            mean = _moments.decay(jnp.square(a), mean_nu, b2)
            mean_nu = jnp.where(finite, mean, mean_nu)
            turn = jax.vmap(units.turn, (0, None, 0, None))
            direction, _ = turn(direction, g, a, b3)

            s = units.num_inputs
            rest = (nu - jnp.sum(mean_nu, axis=0)) / (s - len(Q))
            Lambda = jnp.maximum(rest, _mini._MIN_LAMBDA / s * nu)
            started = _moments.bias_correction(count, b2, g.dtype)
            m = mu / _moments.bias_correction(count, b1, g.dtype)
            along = (_mini.shrink(mean_nu, Lambda) - 1) * times(m, Q)
            r = m + jnp.sum(along * Q, axis=0)
            r = _moments.over_root(r, Lambda / started, eps)
            r = jnp.where(finite, r, jnp.nan)
            r, mu = units.join(r, gradient), units.join(mu, gradient)
            return _mini._Array(r, mu, nu, mean_nu, direction)

        new = _units.map_arrays(_mini._Array, one, arrays, updates, *state[1:])
        return new.update, bma.ScaleByMiniBMAState(count, *new[1:])

    return optax.GradientTransformation(init, update)


def cosines(units, k: int):
    """(k, ...): orthonormal over the inputs, plain means first."""
    s = units.num_inputs
    sizes = [n if i in units.inputs else 1 for i, n in enumerate(units.view)]
    frequencies, places = np.arange(k)[:, None], np.arange(s) + 0.5
    rows = np.cos(np.pi / s * frequencies * places) * np.sqrt(2 / s)
    rows[0] = 1 / np.sqrt(s)
    return jnp.asarray(rows.reshape(k, *sizes))


def orthonormal(Y, axes: tuple[int, ...]):
    """Y's vectors by Gram and Schmidt, each of them twice; 0 where one has no part."""
    basis: list[jax.Array] = []
    for y in Y:
        q = unit(y, axes)
        for _ in range(2 if basis else 0):
            for other in basis:
                q = q - jnp.sum(other * q, axis=axes, keepdims=True) * other
            q = unit(q, axes)
        basis.append(q)
    return jnp.stack(basis)


def unit(x, axes: tuple[int, ...]):
    """x over its norm along ``axes``; 0 where that is 0 or not finite."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axes, keepdims=True))
    usable = (largest > 0) & jnp.isfinite(largest)
    x = jnp.where(usable, x, 1) / jnp.where(usable, largest, 1)
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True))
    return jnp.where(usable, x / norm, 0)


class UnitSide(NamedTuple):
    """What there is of one array."""

    update: Any
    direction: Any  # A number a unit: p times a number.
    nu: Any  # A number an input: c.
    mean_nu: Any  # A number an input: N.


def scale_by_two_sided_mini_bma(
    partition, whiten: Any = 0.0, b2: Any = 0.99, b3: Any = 0.95, factor: Any = None
):
    r"""Mini-BMA, then a learned direction p over the units, shrunk for every input.

    R is mini-BMA's update, with Lambda, M and its direction q over the inputs. With
    w = `whiten`, p and its statistics are those of

        W = Lambda^(-w/2) (G + w (max(M / Lambda, 1)^-1/2 - 1) (G q) q^T),

    the gradient for w = 0, and for w = 1 what mini-BMA makes of it, so that nothing is
    shrunk twice. With decayed averages c_j of sum_i W_ij^2 and N_j of (p^T W)_j^2,

        L_j = max((c_j - N_j) / (n - 1), 1e-3 c_j / n)
        update = R + p ((max(N_j / L_j, 1)^-1/2 - 1) (p^T R)_j)_j

    and p = y / |y|, from plain means: y <- b3 y + (1 - b3) W W^T p / |W W^T p|. A
    number `factor` replaces that of N: 1 leaves R. d + 3 (n + s) numbers of state.
    """
    inner = bma.scale_by_mini_bma(b2=b2, b3=b3, partition=partition)

    def init(params):
        arrays = _build.layout(params, partition, "block").arrays

        def one(units, p):
            zeros = jnp.zeros_like(p, dtype=_tree.statistic_dtype(p))
            if units is None:
                return UnitSide(None, *[_units.placeholder(zeros)] * 3)
            side, zeros = transposed(units), units.split(zeros)
            return UnitSide(None, side.constant(zeros), *[side.over_inputs(zeros)] * 2)

        start = _units.map_arrays(UnitSide, one, arrays, params)
        return inner.init(params), *start[1:]

    def update(updates, state, params=None):
        arrays = _build.layout(updates, partition, "block").arrays
        old, *rest = state
        R, mini = inner.update(updates, old, params)

        def one(units, r, gradient, h, M, q, direction, nu, mean_nu):
            if units is None:
                return UnitSide(r, direction, nu, mean_nu)
            side, g, r = transposed(units), units.split(gradient), units.split(r)
            finite = jnp.isfinite(units.over_inputs(jnp.square(g)))
            g, known = jnp.where(finite, g, 0), jnp.where(finite, r, 0)
            q, p = units.direction(q), side.direction(direction)
            Lambda = _mini.rest(h, M, units.num_inputs)
            along = whiten * (_mini.shrink(M, Lambda) - 1) * units.times(g, q)
            Lambda = Lambda / _moments.bias_correction(mini.count, b2, g.dtype)
            power = jnp.where(Lambda > 0, Lambda, 1) ** (-0.5 * whiten)
            W = power * (g + along * q)

            a = side.times(W, p)
            nu = _moments.decay(side.over_inputs(jnp.square(W)), nu, b2)
            mean_nu = _moments.decay(jnp.square(a), mean_nu, b2)
            direction, _ = side.turn(direction, W, a, b3)
            L = _mini.rest(nu, mean_nu, side.num_inputs)
            part = _mini.shrink(mean_nu, L) if factor is None else factor
            r = r + (part - 1) * side.times(known, p) * p
            return UnitSide(units.join(r, gradient), direction, nu, mean_nu)

        # The old direction is the one that R was made with.
        trees = R, updates, mini.nu, mini.mean_nu, old.direction, *rest
        new = _units.map_arrays(UnitSide, one, arrays, *trees)
        return new.update, (mini, *new[1:])

    return optax.GradientTransformation(init, update)


def transposed(units):
    """Inputs as units and units as inputs."""
    return dataclasses.replace(units, units=units.inputs, inputs=units.units)
