"""Mini-BMA: Adam with block means in place of its second moment.

The blocks of an array are its units: its gradient is a matrix G, units x inputs, with s
inputs. The units share a unit vector q over the inputs. Diag H, the decayed average of
G_ij², is not stored, but its block means over two partitions: r_i over unit i, and c_j
over input j. Their product has both of these means, and stands for diag H:

    h_ij = r_i c_j / c̄,   z = h^½,   c̄ the mean of c.

With the decayed average U_i of (G q)_i², unit i has a number along q, Lu et al. 2018,
eq. 2, of Z^-1 H Z^-1 with the weights √s q of ``_columns``:

    M_i = U_i / (Σ_j q_j² z_ij)² = U_i / (r_i β²),   β = Σ_j q_j² (c_j / c̄)^½,

and the update is (I + (max(M_i, 1)^-½ - 1) q qᵀ) Z^-1 m of the momentum m. As z is a
product, Z^-1 needs no root and no division of an element. ``_direction`` learns q.
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

    An array of n units with s inputs has n numbers in ``nu`` and in ``mean_nu``, and s
    in ``input_nu`` and in ``direction``. Each of the four keeps all axes of the array,
    with length 1 along the axes that it does not vary along. An array that Adam updates
    has its second moment in ``nu`` and one unused number in each of the other three.

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
    nu: optax.Updates  # a number a unit: r, the mean of diag H over its inputs.
    input_nu: optax.Updates  # a number an input: c, the mean of diag H over units.
    mean_nu: optax.Updates  # a number a unit: U, the decayed square of G q.
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
    r"""Scales momentum by block means of Adam's second moment, and along a direction.

    Array names of Flax, Haiku, Equinox and PyTorch tell which axis counts the units.

    The blocks of an array are its units: the rows of its gradient G, units x inputs.
    Adam stores an average of :math:`G_{ij}^2` for each element. Here two partitions of
    the array give its block means: :math:`r_i` is the mean over unit i, and :math:`c_j`
    the mean over input j. With the mean :math:`\bar c` of c,

    .. math::
        z_{ij} = \sqrt{r_i \, c_j / \bar c}, \qquad x_{ij} = \frac{m_{ij}}{(\sqrt{r_i}
        + \epsilon) \sqrt{c_j / \bar c}}

    takes the place of Adam's update, for the momentum m. It is Adafactor's second
    moment. Where squares of G are far from such a product, steps are long: more than n
    times Adam's for a diagonal G with the entries 1, 1/2, ..., 1/n.
    ``optax.clip_by_block_rms(1.0)`` behind this transformation bounds the root mean
    square of an array's update by 1, as Adafactor does. The units share one unit vector
    q over the s inputs. Let :math:`U_i` be the decayed average of :math:`(G q)_i^2`. Lu
    et al. 2018, eq. 2, with the weights :math:`\sqrt{s} \, q` in place of plain means,
    gives unit i the number

    .. math::
        M_i = \frac{U_i}{\big(\sum_j q_j^2 z_{ij}\big)^2}, \quad \text{and its update
        is} \quad x_i + \big(\max(M_i, 1)^{-1/2} - 1\big) (x_i^T q) \, q.

    The component along q can shrink but not grow. The direction q starts at plain means
    and follows the leading direction of X, with rows :math:`x_i`, by one step of power
    iteration a step: :math:`y \leftarrow b_3 y + (1 - b_3) X^T X q / \|X^T X q\|`, q =
    y / ‖y‖. The averages have Adam's bias correction.

    The method stores two numbers a unit and two an input beside the momentum, which is
    half of Adam's state in all. A step costs one product with G and two with m. Adam
    updates an array with fewer than two units, or with fewer than two inputs (biases,
    scales), and stores a second moment for each of its elements.

    Args:
      b1: the decay of the momentum, a number in [0, 1).
      b2: the decay of r, c and U, a number in [0, 1).
      eps: a number >= 0, added to the root of r.
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
      finite. That step changes neither the momentum and the statistics of the unit nor
      the number c of the input.

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
      Objective function: 0.185
      Objective function: 0.069
      Objective function: 0.024

    Source: derived from Lu, Harandi, Hartley and Pascanu, `Block Mean Approximation for
    Efficient Second Order Optimization <https://arxiv.org/abs/1804.05484>`_, 2018, eq.
    2 and 4; see :meth:`BlockMeanMatrix.project` with ``weights``. Shazeer and Stern,
    `Adafactor <https://arxiv.org/abs/1804.04235>`_, 2018, for r and c.
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
            count=_tree.no_steps(start.mean_nu),
            mu=_moments.start_momentum(params, mu_dtype),
            nu=start.nu,
            input_nu=start.input_nu,
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

        def step(units, gradient, old_mu, nu, input_nu, mean_nu, direction):
            """Updates one array and its statistics.

            An array with units is split into ``units.view``, the shape in which each
            axis counts units, inputs or stacked matrices. ``units`` is None for an
            array that Adam updates.
            """
            g, mu = gradient.astype(nu.dtype), old_mu.astype(nu.dtype)
            if units is None:
                r, mu, nu = _moments.adam(g, mu, nu, count, b1, b2, eps)
                r, mu = r.astype(gradient.dtype), mu.astype(old_mu.dtype)
                return _Array(r, mu, nu, input_nu, mean_nu, direction)

            # Gather r, c and U of what is finite.
            g, old = units.split(g), units.split(mu)
            q = units.direction(direction)
            squares, product = units.mean_squares(g), units.times(g, q)
            finite = jnp.isfinite(squares)
            nu = jnp.where(finite, _moments.decay(squares, nu, b2), nu)
            along = _moments.decay(jnp.square(product), mean_nu, b2)
            mean_nu = jnp.where(finite, along, mean_nu)
            squares = units.input_mean_squares(_xla.recompute(g))
            kept = _moments.decay(squares, input_nu, b2)
            input_nu = jnp.where(jnp.isfinite(squares), kept, input_nu)

            # Z^-1 m is m times a number a unit and a number an input. Each ends in a
            # division: XLA on CPU stores the result of a division, and computes
            # anything cheaper again for each element.
            share, Lambda = second_moment(units, nu, input_nu, q)
            started = _moments.bias_correction(count, b1, g.dtype)
            known = jnp.where(jnp.isfinite(product), 1 / started, jnp.nan)
            corrected = nu / _moments.bias_correction(count, b2, g.dtype)
            scale, input_scale = _moments.over_root(known, corrected, eps), 1 / share

            def momentum(g, old):
                return jnp.where(finite, _moments.decay(g, old, b1), old)

            # Sum, turn the direction, and write: off the CPU a pass each, and the sums
            # of m are in that of r and G q, before m is written.
            def times(written, mu, g, old, weights):
                if written:
                    return units.times(mu, weights)
                return momentum(units.times(g, weights), units.times(old, weights))

            mu = momentum(g, old)
            m_sums = _xla.by_platform(times, True, False, mu, g, old, input_scale * q)
            r_sums = scale * m_sums
            usable = jnp.where(jnp.isfinite(r_sums), scale * r_sums, 0)
            g, old, usable = _xla.second_pass((g, old, usable))
            mu = momentum(g, old)
            direction = _direction.turn(units, direction, mu, usable, b3, input_scale)
            along = (_direction.shrink(mean_nu, Lambda) - 1) * r_sums
            waiting = g, old, scale, along, direction
            g, old, scale, along, direction = _xla.second_pass(waiting)
            mu = momentum(g, old)
            r = mu * scale * input_scale + along * q
            r = units.join(r, gradient).astype(gradient.dtype)
            mu = units.join(mu, gradient).astype(old_mu.dtype)
            return _Array(r, mu, nu, input_nu, mean_nu, direction)

        new = _units.map_arrays(_Array, step, arrays, updates, *state[1:])
        return new.update, ScaleByMiniBMAState(count, *new[1:])

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def second_moment(units, nu, input_nu, q):
    """Returns the factors of h = r c / mean c, without bias correction.

    Args:
      units: the :class:`Units` of the array.
      nu: r, a number a unit.
      input_nu: c, a number an input.
      q: the direction, a number an input.

    Returns:
      (c / mean c)^½, a number an input, which is 1 where there is no c yet, or where
      it has left the range of the dtype; and Λ = r (Σ q² (c / mean c)^½)², a number a
      unit, with which M = U / Λ.
    """
    mean = jnp.mean(input_nu, axis=units.inputs, keepdims=True)
    known = (mean > 0) & jnp.isfinite(mean)
    share = input_nu / jnp.where(known, mean, 1)
    known = known & (share >= jnp.finfo(nu.dtype).tiny)
    share = jnp.sqrt(jnp.where(known, share, 1))
    root = jnp.sum(jnp.square(q) * share, axis=units.inputs, keepdims=True)
    return share, nu * jnp.square(root)


class _Array(NamedTuple):
    """The update, momentum and statistics of one array."""

    update: jax.Array | None
    mu: jax.Array | None
    nu: jax.Array
    input_nu: jax.Array
    mean_nu: jax.Array
    direction: jax.Array


def _start(units, p):
    """Initial statistics of one array p, whose ``units`` are None if Adam updates it.

    They are made from sums over zeros like p, so that they are sharded as p is.
    """
    zeros = _tree.zeros_like(p, _tree.statistic_dtype)
    unused = _units.placeholder(zeros)
    if units is None:
        return _Array(None, None, zeros, unused, jnp.copy(unused), jnp.copy(unused))
    zeros = units.split(zeros)
    nu, mean_nu = units.mean_squares(zeros), units.mean_squares(zeros)
    input_nu = units.input_mean_squares(zeros)
    return _Array(None, None, nu, input_nu, mean_nu, units.constant(zeros))
