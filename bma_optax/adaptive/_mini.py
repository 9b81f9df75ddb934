"""Mini-BMA: two numbers a block in place of Adam's second moment.

The blocks of an array are its units: its gradient is a matrix G, units x inputs, with s
inputs. The units share a unit vector q over the inputs. With decayed averages h_i of
Σ_j G_ij² and M_i of (G q)_i², unit i has the block mean matrix (Lu et al. 2018, eq. 2)

    Λ_i (I - q qᵀ) + M_i q qᵀ,   Λ_i = (h_i - M_i) / (s - 1),

and eq. 4 gives its inverse root, which scales the momentum. ``_direction`` learns q.
Numbers of units and of inputs keep all axes of the array, of length 1 where summed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bma_optax import _checks, _tree, _xla
from bma_optax.adaptive import _direction, _moments
from bma_optax.partitions import _build, _rules, _unit_rules, _units
from bma_optax.partitions._combinators import within


class ScaleByMiniBMAState(NamedTuple):
    """State of :func:`scale_by_mini_bma`.

    An array of n units with s inputs has n numbers in ``nu``, n in ``mean_nu`` and s in
    ``direction``. Each of the three keeps all axes of the array, with length 1 along
    the axes that it does not vary along. An array that Adam updates has its second
    moment in ``nu`` and one unused number in each of the other two.

    Example:
      >>> import jax, jax.numpy as jnp, bma_optax as bma
      >>> state = bma.scale_by_mini_bma().init({"w": jnp.ones((9, 5)), "b": jnp.ones(5)})
      >>> print(jax.tree.map(jnp.shape, state.nu), state.mean_nu["w"].shape)
      {'b': (5,), 'w': (1, 5)} (1, 5)
      >>> state.direction["w"].shape
      (9, 1)
    """  # noqa: E501

    count: jax.Array  # type: ignore[assignment]  # shape (), int32: steps taken.
    mu: optax.Updates  # like params: the momentum.
    nu: optax.Updates  # a number a unit: h, its decayed sum of squares.
    mean_nu: optax.Updates  # a number a unit: M, the part of h along q.
    direction: optax.Updates  # a number an input: y, a multiple of q.


def scale_by_mini_bma(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    partition: _rules.Rule = _unit_rules.per_unit,
    b3: jax.typing.ArrayLike = 0.95,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales momentum by a block mean approximation with two numbers a block.

    Array names of Flax, Haiku, Equinox and PyTorch tell which axis counts the units.

    The blocks of an array are its units: the rows of its gradient G, units x inputs.
    The units share one unit vector q over the inputs. Let :math:`h_i` be the decayed
    average of :math:`\sum_j G_{ij}^2` and :math:`M_i` that of :math:`(G q)_i^2`. Lu et
    al. 2018, eq. 2 then approximates unit i's :math:`\sum g g^T` by :math:`\Lambda_i (I
    - q q^T) + M_i q q^T`, with q in place of plain means. Its inverse root (eq. 4)
    scales the momentum m:

    .. math::
        r_i = \frac{m_i}{\sqrt{\Lambda_i} + \epsilon}, \qquad
        \Lambda_i = \frac{h_i - M_i}{s - 1}, \qquad
        r_i + \big(\max(M_i / \Lambda_i, 1)^{-1/2} - 1\big) (r_i^T q) \, q

    for s inputs. The component along q can shrink but not grow, and :math:`\Lambda_i`
    is at least :math:`10^{-3} h_i / s`. The direction q starts at plain means and
    follows the leading direction of the gradients by one step of power iteration a
    step: :math:`y \leftarrow b_3 y + (1 - b_3) G^T G q / \|G^T G q\|`, q = y / ‖y‖. The
    averages have Adam's bias correction.

    The method stores two numbers a unit and one an input beside the momentum, which is
    half of Adam's state in all. A step costs two products with G and one with m. Adam
    updates an array with fewer than two units, or with fewer than two inputs (biases,
    scales).

    Args:
      b1: the decay of the momentum, a number in [0, 1).
      b2: the decay of h and M, a number in [0, 1).
      eps: a number >= 0, added to the root of Λ.
      partition: the rule whose blocks are the units. The default ``bma.per_unit`` knows
        their axis from the array's name: the last axis for ``kernel`` and ``w`` (Flax
        and Haiku, convolutions too), the first axis for ``weight`` (Equinox, PyTorch)
        and ``embedding``. For other names ``init`` takes the last axis and warns: pass
        ``bma.per_column`` (last axis) or ``bma.per_row`` (first axis) for them. Pass
        ``bma.stacked(rule)`` where a leading axis counts layers. Adam updates the
        arrays whose rule is None in ``bma.by_path``. ``print(bma.partition(params,
        bma.within("block", rule)))`` shows the units and the bytes of state.
      b3: the decay of the direction, a number in [0, 1).
      mu_dtype: the floating dtype of the momentum. None takes the dtype of the
        parameters.

    Returns:
      A ``GradientTransformationExtraArgs`` with the state :class:`ScaleByMiniBMAState`.
      Updates keep the dtype of the gradients. Statistics are float32, or float64 for
      float64 parameters. A gradient that is not finite makes the update of its unit not
      finite. That step leaves the statistics of the unit and the direction of the array
      as they are.

    Raises:
      TypeError: if ``partition`` is not a rule, or if a number is not one or has 16
        bits; at ``init`` and ``update``, if a leaf is not a real floating array.
      ValueError: if a number is out of its range; at ``init``, if the rule does not fit
        the parameters or its tiles do not divide an array; at ``update``, if the
        gradients do not have the structure and shapes that ``init`` saw, or if the
        state belongs to parameters of another dtype.

    Warns:
      UserWarning: at ``init``, if a name does not tell the axis of units.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import bma_optax as bma
      >>> x = jnp.array([[3.0, 1.0], [2.0, 2.0], [3.0, 0.0]])
      >>> def f(w): return jnp.mean((x @ w - jnp.array([[1.0, -1.0]])) ** 2)
      >>> params = jnp.zeros((2, 2))
      >>> tx = optax.chain(bma.scale_by_mini_bma(), optax.scale(-0.1))
      >>> state = tx.init(params)
      >>> for step in range(1, 31):
      ...     updates, state = tx.update(jax.grad(f)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     if step % 10 == 0: print(f"Objective function: {f(params):.3f}")
      Objective function: 0.035
      Objective function: 0.015
      Objective function: 0.007

    Source: derived from Lu, Harandi, Hartley and Pascanu, `Block Mean Approximation for
    Efficient Second Order Optimization <https://arxiv.org/abs/1804.05484>`_, 2018, eq.
    2 and 4; see :meth:`BlockMeanMatrix.project` with ``weights``. Zhang et al.,
    `Adam-mini <https://arxiv.org/abs/2406.16793>`_, 2024, keep one number a block.
    """
    _rules.check_rule(partition)
    _checks.below_one(b1=b1, b2=b2, b3=b3)
    _checks.not_negative(eps=eps)
    _checks.mu_dtype(mu_dtype)

    def init_fn(params):
        params = _tree.parameters(params)
        arrays = _build.partition(params, within("block", partition)).arrays
        start = _units.map_arrays(_Array, _start, arrays, params)
        return ScaleByMiniBMAState(
            count=jnp.zeros((), jnp.int32),
            mu=_moments.start_momentum(params, mu_dtype),
            nu=start.nu,
            mean_nu=start.mean_nu,
            direction=start.direction,
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        _tree.check_statistics(params, state.nu)
        updates = _tree.like_init(updates, state.mu)
        state = _tree.whole(state, "count")
        updates, state = _tree.arrays((updates, state))
        arrays = _build.layout(updates, within("block", partition)).arrays
        _units.check_state(arrays, state.nu, partition)
        count = optax.safe_increment(state.count)

        def step(units, gradient, old_mu, nu, mean_nu, direction):
            """Updates one array and its statistics.

            An array with units is split into ``units.view``, the shape in which each
            axis counts units, inputs or stacked matrices. ``units`` is None for an
            array that Adam updates.
            """
            g, mu = gradient.astype(nu.dtype), old_mu.astype(nu.dtype)
            if units is None:
                r, mu, nu = _moments.adam(g, mu, nu, count, b1, b2, eps)
                r, mu = r.astype(gradient.dtype), mu.astype(old_mu.dtype)
                return _Array(r, mu, nu, mean_nu, direction)

            # Gather m, h and M of the finite units, and move y towards Gᵀ G q.
            g, old = units.split(g), units.split(mu)
            q = units.direction(direction)
            squares = units.over_inputs(jnp.square(g))
            finite = jnp.isfinite(squares)
            product = units.times(g, q)
            a = jnp.where(finite, product, 0)

            def momentum(g, old):
                return jnp.where(finite, _moments.decay(g, old, b1), old)

            mu = momentum(g, old)

            # Off the CPU all sums are one pass, before mu is written.
            def times_q(written, mu, old, product, q):
                if written:
                    return units.times(mu, q)
                return momentum(product, units.times(old, q))

            along = _xla.by_platform(times_q, True, False, mu, old, product, q)
            nu = jnp.where(finite, _moments.decay(squares, nu, b2), nu)
            mean = _moments.decay(jnp.square(a), mean_nu, b2)
            mean_nu = jnp.where(finite, mean, mean_nu)
            direction = _direction.turn(units, direction, g, a, b3)

            # Apply them: change the momentum along q, then divide by the root of Λ.
            # Each number of a unit ends in a division: XLA stores the result of a
            # division, and computes anything cheaper again for each element.
            Lambda = _direction.rest(nu, mean_nu, units.num_inputs)
            along = (_direction.shrink(mean_nu, Lambda) - 1) * along
            started = _moments.bias_correction(count, b1, g.dtype)
            Lambda = Lambda / _moments.bias_correction(count, b2, g.dtype)
            known = jnp.where(jnp.isfinite(product), 1 / started, jnp.nan)
            # Compute the update after the direction, the last use of the gradient: the
            # update can then take the gradient's memory.
            known = _xla.after(known, direction)
            g, old, known, along = _xla.second_pass((g, old, known, along))
            mu = momentum(g, old)
            r = mu * _moments.over_root(known, Lambda, eps)
            r = r + _moments.over_root(known * along, Lambda, eps) * q
            r = units.join(r, gradient).astype(gradient.dtype)
            mu = units.join(mu, gradient).astype(old_mu.dtype)
            return _Array(r, mu, nu, mean_nu, direction)

        new = _units.map_arrays(_Array, step, arrays, updates, *state[1:])
        return new.update, ScaleByMiniBMAState(count, *new[1:])

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Array(NamedTuple):
    """The update, momentum and statistics of one array."""

    update: jax.Array | None
    mu: jax.Array | None
    nu: jax.Array
    mean_nu: jax.Array
    direction: jax.Array


def _start(units, p):
    """Initial statistics of one array p, whose ``units`` are None if Adam updates it.

    They are made from sums over zeros like p, so that they are sharded as p is.
    """
    zeros = _tree.zeros_like(p, _tree.statistic_dtype)
    unused = _units.placeholder(zeros)
    if units is None:
        return _Array(None, None, zeros, unused, jnp.copy(unused))
    zeros = units.split(zeros)
    nu, mean_nu = units.over_inputs(zeros), units.over_inputs(zeros)
    return _Array(None, None, nu, mean_nu, units.constant(zeros))
