"""Mini-BMA: two numbers a block in the place of Adam's second moment."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bma_optax import _checks, _rates, _tree, _xla
from bma_optax.adaptive import _direction, _moments
from bma_optax.partitions import _build, _rules, _units
from bma_optax.partitions._combinators import Within


class ScaleByMiniBMAState(NamedTuple):
    """State of :func:`scale_by_mini_bma`.

    An array of n units with s inputs has n numbers in ``nu`` and in ``mean_nu`` and s
    in ``direction``, with axes of length 1 where there are fewer numbers than
    elements. An array that Adam takes has its second moment in ``nu`` and one unused
    number in the others.

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
    nu: optax.Updates  # a number a unit: its decayed sum of squares.
    mean_nu: optax.Updates  # a number a unit: the part of it along q.
    direction: optax.Updates  # a number an input: q times a number.


def scale_by_mini_bma(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    partition: _rules.Rule = _rules.per_unit,
    b3: jax.typing.ArrayLike = 0.95,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales momentum by a block mean approximation with two numbers a block.

    Units lie on the axis that the names of Flax, Haiku, Equinox and PyTorch tell.

    The blocks of an array are its units: the rows of G, its gradient as units x inputs.
    They share one unit vector q over the inputs. With decayed averages
    :math:`h_i` of :math:`\sum_j G_{ij}^2` and :math:`M_i` of :math:`(G q)_i^2`, eq. (2)
    of a unit's :math:`\sum g g^T`, with q in the place of plain means, is
    :math:`\Lambda_i (I - q q^T) + M_i q q^T`, and the update is its inverse root times
    the momentum m, by eq. (4):

    .. math::
        r_i = \frac{m_i}{\sqrt{\Lambda_i} + \epsilon}, \qquad
        \Lambda_i = \frac{h_i - M_i}{s - 1}, \qquad
        r_i + \big(\max(M_i / \Lambda_i, 1)^{-1/2} - 1\big) (r_i^T q) \, q

    for s inputs; the component along q can shrink but not grow, and Λ is at least 1e-3
    of :math:`h_i / s`. The direction q starts at plain means and follows the largest
    one of the gradients by a step of power iteration, :math:`y \leftarrow b_3 y +
    (1 - b_3) G^T G q / \|G^T G q\|`, q = y / ‖y‖. Averages have Adam's correction of
    their start.

    M is measured, as no constant in its place did as well on all of fourteen tasks: 0
    does not move along q, and .1 was behind on autoencoders by all seeds.

    What is stored beside the momentum is 2 numbers a unit and one an input, half of
    Adam's state in all; a step costs two products with G and one with m. An array with
    fewer than two units, or units of fewer than two inputs (biases, scales), has Adam.

    Args:
      b1: the decay of the momentum, in [0, 1).
      b2: the decay of h and M, in [0, 1).
      eps: added to the root, >= 0.
      partition: the rule whose blocks are the units. ``bma.per_unit``, the default,
        knows their axis from the array's name: the last one for ``kernel`` and ``w``
        (Flax and Haiku; convolutions too), the first one for ``weight`` (Equinox,
        PyTorch) and ``embedding``. Where a name does not tell, ``init`` takes the last
        axis and warns: pass ``bma.per_column`` (last axis) or ``bma.per_row`` (first
        axis) then, and ``bma.stacked(rule)`` where a leading axis counts layers.
        ``print(bma.partition(params, bma.within("block", rule)))`` shows what is a
        unit, and the bytes of state. Adam for arrays whose rule is None in
        ``bma.by_path``.
      b3: the decay of the direction, in [0, 1).
      mu_dtype: the dtype of the momentum; that of the parameters if None.

    Returns:
      A ``GradientTransformationExtraArgs`` with the state
      :class:`ScaleByMiniBMAState`. Updates keep the dtype of the gradients; statistics
      are float32, or float64 for float64 parameters. A gradient that is not finite
      gives its unit an update that is not finite; the unit is left out of the
      statistics of that step, and the direction of its array stays.

    Raises:
      TypeError: if ``partition`` is no rule or a number is none, or of 16 bits; at
        ``init`` and ``update``, if a leaf is no real floating array.
      ValueError: if a number is out of its range; at ``init``, if the rule does not fit
        the parameters or its tiles do not divide an array; at ``update``, if gradients
        are not of the structure and shapes that ``init`` saw, or the state is of
        parameters of another dtype.

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

    Source: derived from the report's eq. (2) and (4), see
    :meth:`BlockMeanMatrix.project` with ``weights``; one number a block is Zhang et
    al., `Adam-mini <https://arxiv.org/abs/2406.16793>`_, 2024.
    """
    _rules.check_rule(partition)
    _checks.below_one(b1=b1, b2=b2, b3=b3)
    _checks.not_negative(eps=eps)
    _checks.mu_dtype(mu_dtype)

    def init_fn(params):
        params = _tree.parameters(params)
        arrays = _build.partition(params, Within("block", partition)).arrays
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
        arrays = _build.layout(updates, Within("block", partition)).arrays
        _units.check_state(arrays, state.nu, partition)
        count = optax.safe_increment(state.count)

        def step(units, gradient, old_mu, nu, mean_nu, direction):
            """One array."""
            g, mu = gradient.astype(nu.dtype), old_mu.astype(nu.dtype)
            if units is None:
                r, mu, nu = _moments.adam(g, mu, nu, count, b1, b2, eps)
                r, mu = r.astype(gradient.dtype), mu.astype(old_mu.dtype)
                return _Array(r, mu, nu, mean_nu, direction)

            # Gather: h and M of the units that are finite, and a turn of q.
            g, mu = units.split(g), units.split(mu)
            q = units.direction(direction)
            squares = units.over_inputs(jnp.square(g))
            finite = jnp.isfinite(squares)
            product = units.times(g, q)
            a = jnp.where(finite, product, 0)
            mu = jnp.where(finite, _moments.decay(g, mu, b1), mu)
            nu = jnp.where(finite, _moments.decay(squares, nu, b2), nu)
            mean = _moments.decay(jnp.square(a), mean_nu, b2)
            mean_nu = jnp.where(finite, mean, mean_nu)
            direction = _direction.turn(units, direction, g, a, b3)

            # Apply: the momentum with another part along q, over the root of Λ. Numbers
            # of units end in a division, or XLA computes them again for each element.
            Lambda = _direction.rest(nu, mean_nu, units.num_inputs)
            along = (_direction.shrink(mean_nu, Lambda) - 1) * units.times(mu, q)
            started = _moments.bias_correction(count, b1, g.dtype)
            Lambda = Lambda / _moments.bias_correction(count, b2, g.dtype)
            known = jnp.where(jnp.isfinite(product), 1 / started, jnp.nan)
            # The update takes the memory of the gradient, which the direction is from.
            known = _xla.after(known, direction)
            r = mu * _moments.over_root(known, Lambda, eps)
            r = r + _moments.over_root(known * along, Lambda, eps) * q
            r = units.join(r, gradient).astype(gradient.dtype)
            mu = units.join(mu, gradient).astype(old_mu.dtype)
            return _Array(r, mu, nu, mean_nu, direction)

        new = _units.map_arrays(_Array, step, arrays, updates, *state[1:])
        return new.update, ScaleByMiniBMAState(count, *new[1:])

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def mini_bma(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-8,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    partition: _rules.Rule = _rules.per_unit,
    b3: jax.typing.ArrayLike = 0.95,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam at half of its state, with a learned block mean in each array.

    Units lie on the axis that the names of Flax, Haiku, Equinox and PyTorch tell.

    .. math:: \theta \leftarrow \theta - \eta \, \big(r + (\max(M / \Lambda, 1)^{-1/2}
        - 1) (r^T q) \, q + \lambda \theta\big), \qquad r = \Lambda^{-1/2} m

    Args:
      learning_rate: a number or a schedule.
      b1: see :func:`scale_by_mini_bma`, as for the arguments that are not said here.
      b2: the decay of the two numbers of a unit.
      eps: added to the root.
      mu_dtype: the dtype of the momentum.
      weight_decay: λ, a number or a schedule; multiplied by the rate, as in adamw.
      weight_decay_mask: a tree of booleans like the parameters, or a function of them
        that gives one: where weights decay. Everywhere if None.
      partition: the rule whose blocks are the units, ``bma.per_unit`` by default.
      b3: the decay of the direction.

    Returns:
      A chain of :func:`scale_by_mini_bma`, the decay and the rate. ``update`` needs
      ``params`` where weights decay.

    Raises:
      TypeError, ValueError: as :func:`scale_by_mini_bma`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import bma_optax as bma
      >>> x = jnp.array([[3.0, 1.0], [2.0, 2.0], [3.0, 0.0]])
      >>> def f(w): return jnp.mean((x @ w - jnp.array([[1.0, -1.0]])) ** 2)
      >>> solver = bma.mini_bma(learning_rate=0.1)
      >>> params = jnp.zeros((2, 2))
      >>> state = solver.init(params)
      >>> for _ in range(3):
      ...     updates, state = solver.update(jax.grad(f)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"Objective function: {f(params):.3f}")
      Objective function: 0.392
      Objective function: 0.087
      Objective function: 0.035

    Source: see :func:`scale_by_mini_bma`; Loshchilov and Hutter, `Decoupled Weight
    Decay Regularization <https://arxiv.org/abs/1711.05101>`_, 2019.
    """
    return optax.chain(
        scale_by_mini_bma(
            b1,
            b2,
            eps,
            partition=partition,
            b3=b3,
            mu_dtype=mu_dtype,
        ),
        _rates.decay(weight_decay, weight_decay_mask),
        _rates.scale(learning_rate),
    )


class _Array(NamedTuple):
    """What there is of one array."""

    update: jax.Array | None
    mu: jax.Array | None
    nu: jax.Array
    mean_nu: jax.Array
    direction: jax.Array


def _start(units, p):
    """The statistics of one array: made by sums over it, they lie on its mesh."""
    zeros = jnp.zeros_like(p, dtype=_tree.statistic_dtype(p))
    unused = _units.placeholder(zeros)
    if units is None:
        return _Array(None, None, zeros, unused, jnp.copy(unused))
    zeros = units.split(zeros)
    nu, mean_nu = units.over_inputs(zeros), units.over_inputs(zeros)
    return _Array(None, None, nu, mean_nu, units.constant(zeros))
