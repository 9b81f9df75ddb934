"""Block means of updates scaled by a constant: the control for other methods.

    x + (c - 1) E Eᵀ x

for updates x shaped like the parameters and a constant c. Column i of E is 1/√s_i on
block i, of s_i elements, and 0 elsewhere; or, with learned weights, each column of an
array is the same unit vector q over the inputs of a unit. No statistics are gathered,
except the direction of q, which ``_direction`` learns.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bma_optax import _checks, _tree, _xla
from bma_optax.adaptive import _direction
from bma_optax.partitions import _build, _rules, _units
from bma_optax.partitions._combinators import within

_WEIGHTS = ("learned", "constant")


class ScaleBlockMeanState(NamedTuple):
    """State of :func:`scale_block_mean`.

    Example:
      >>> import jax.numpy as jnp, bma_optax as bma
      >>> tx = bma.scale_block_mean(0.0, weights="learned")
      >>> tx.init(jnp.ones((9, 5))).direction.shape
      (9, 1)
    """

    direction: optax.Updates | None  # as in ScaleByMiniBMAState; None: constant.


def scale_block_mean(
    factor: jax.typing.ArrayLike,
    partition: _rules.Rule = _rules.per_unit,
    *,
    weights: str = "constant",
    b3: jax.typing.ArrayLike = 0.95,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the block means of updates by a constant.

    Array names of Flax, Haiku, Equinox and PyTorch tell which axis counts the units.

    .. math:: x + (c - 1) \, E E^T x

    This is the control that a method with block means must beat. It gathers no
    statistics, and after ``optax.scale_by_adam`` it did as well on networks as
    AdaGrad-BMA and Adam-BMA, or better. With c = 0 before an optimiser it centralises
    gradients.

    Args:
      factor: c, a finite number. 0 removes block means; 1 changes nothing.
      partition: the rule that cuts the parameters into blocks. The default
        ``bma.per_unit`` takes the last axis for ``kernel`` and ``w`` and the first axis
        for ``weight`` and ``embedding``. It warns at ``init`` where a name does not
        tell the axis: pass ``bma.per_column`` (last axis) or ``bma.per_row`` (first
        axis) then.
      weights: "constant" for plain means. "learned" scales, in each array that is a
        matrix of units x inputs, the component along one direction of the inputs. The
        direction follows the leading direction of the updates that pass, as
        :func:`scale_by_mini_bma` does for gradients. Other arrays stay as they are.
      b3: the decay of the learned direction, a number in [0, 1).

    Returns:
      A ``GradientTransformationExtraArgs`` with the state :class:`ScaleBlockMeanState`,
      which is empty for constant weights. A block with an update that is not finite
      stays as it is.

    Raises:
      TypeError: if ``partition`` is not a rule, or if a number is not one or has 16
        bits; at ``init`` and ``update``, if a leaf is not a real floating array.
      ValueError: if ``weights`` is unknown or a number is out of its range; at
        ``init``, if the rule does not fit the parameters; at ``update`` with learned
        weights, if the updates or the parameters are not of the structure and shapes
        that ``init`` saw.

    Example:
      >>> import jax.numpy as jnp, bma_optax as bma
      >>> tx = bma.scale_block_mean(0.0)
      >>> updates = jnp.array([[1.0, 5.0], [3.0, 5.0]])
      >>> print(tx.update(updates, tx.init(updates))[0])
      [[-1.  0.]
       [ 1.  0.]]

    Source: for c = 0, Yong et al., `Gradient Centralization
    <https://arxiv.org/abs/2004.01461>`_, 2020.
    """
    _rules.check_rule(partition)
    if weights not in _WEIGHTS:
        raise ValueError(f"`weights` must be one of {_WEIGHTS}, got {weights!r}.")
    _checks.below_one(b3=b3)
    _checks.finite(factor=factor)

    def start(params, arrays):
        """The directions at plain means, as a state."""

        def constant(units, p):
            zeros = jnp.zeros_like(p, dtype=_tree.statistic_dtype(p))
            if units is None:
                return _Array(None, _units.placeholder(zeros))
            return _Array(None, units.constant(units.split(zeros)))

        found = _units.map_arrays(_Array, constant, arrays, params)
        return ScaleBlockMeanState(found.direction)

    def init_fn(params):
        params = _tree.parameters(params)
        arrays = _build.partition(params, within("block", partition)).arrays
        if weights == "constant":
            return ScaleBlockMeanState(None)
        return start(params, arrays)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        _tree.check_vectors(updates, "The update of")
        if weights == "learned":
            _tree.check_statistics(params, state.direction)
            arrays = _build.layout(updates, within("block", partition)).arrays
            shapes = jax.eval_shape(lambda u: start(u, arrays), updates)
            _check_directions(shapes, state)
            updates = _tree.same_order(updates, state.direction)
        updates, state = _tree.arrays((updates, state))
        x = jax.tree.map(lambda x: x.astype(_tree.statistic_dtype(x)), updates)

        def step(units, x, direction):
            """Scales one array x along q, and moves its direction towards xᵀ x q."""
            if units is None:
                return _Array(x, direction)
            matrix = units.split(x)
            q = units.direction(direction)
            a = units.times(matrix, q)
            a = jnp.where(jnp.isfinite(a), a, 0)
            direction = _direction.turn(units, direction, matrix, a, b3)
            # Scale after the direction has read x: the result can then take x's memory.
            along = (jnp.asarray(factor, x.dtype) - 1) * _xla.after(a, direction)
            scaled = matrix + along * q
            return _Array(units.join(scaled, x), direction)

        blocks = _build.layout(x, within("block", partition))
        if weights == "constant":
            sums = blocks.block_sums(x)
            means = sums / jnp.asarray(blocks.sizes, sums.dtype)
            change = jnp.asarray(factor, sums.dtype) - 1
            shift = change * jnp.where(jnp.isfinite(means), means, 0)
            x = jax.tree.map(jnp.add, x, blocks.expand(shift, x))
        else:
            x = _tree.astype(updates, state.direction)
            found = _units.map_arrays(_Array, step, blocks.arrays, x, state.direction)
            x, state = found.update, ScaleBlockMeanState(found.direction)
        return _tree.astype(x, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_directions(expected, state) -> None:
    """Raises a ValueError for updates unlike the parameters that ``init`` saw."""
    difference = _tree.unlike(expected.direction, state.direction)
    if difference is not None:
        name, new, old = difference
        shapes = [None if x is None else x.shape for x in (new, old)]
        raise ValueError(
            f"The update of {name!r} has a direction of shape {shapes[0]}, the state "
            f"{shapes[1]}. Pass updates of the structure and shapes that init saw."
        )


class _Array(NamedTuple):
    """The update and the direction of one array."""

    update: jax.Array | None
    direction: jax.Array
