"""Rules of units: one block for each output of a layer.

The axis that counts units is the last in Flax and Haiku and the first in Equinox and
PyTorch; the name of an array tells which. ``per_unit`` lets all units see each other,
``units`` leaves each alone.
"""

import dataclasses
import re
from typing import ClassVar

from bma_optax.partitions._rules import Path, Rule, per_leaf, without_parentheses


@dataclasses.dataclass(frozen=True)
class _PerIndex(Rule):
    """One block for each index of one axis."""

    axis: ClassVar[int]

    def tile(self, path, shape):
        tile = list(shape)
        if len(shape) > 1:
            tile[self.axis] = 1
        return tuple(tile)

    def __repr__(self):
        return "per_row" if self.axis == 0 else "per_column"


class _PerColumn(_PerIndex):
    """One block for each index of the last axis, whatever the array's name.

    An array of one axis is one block.

    Example:
      >>> import jax.numpy as jnp, bma_optax as bma
      >>> bma.partition(jnp.ones((2, 3)), bma.per_column).sizes
      (2, 2, 2)
    """

    axis = -1


class _PerRow(_PerIndex):
    """One block for each index of the first axis, whatever the array's name.

    An array of one axis is one block.

    Example:
      >>> import jax.numpy as jnp, bma_optax as bma
      >>> bma.partition(jnp.ones((2, 3)), bma.per_row).sizes
      (3, 3)
    """

    axis = 0


# In the last part of a path. Flax: kernel, embedding, lora_a. Haiku: w, w_i,
# embeddings. Equinox and PyTorch: weight, weight_ih, in_proj_weight. By hand: w1.
_LAST_AXIS = re.compile(r"kernel|lora|^w\d*(_|$)")
_FIRST_AXIS = re.compile(r"embedding|(^|_)weight(_|$)")
_PROJECTIONS = {("query",), ("key",), ("value",)}  # Flax: (inputs, heads, units).
_TRANSPOSED = re.compile(r"transpose(_\d+)?$")  # Haiku: w is (window, units, inputs).
_NO_INPUTS = re.compile(r"bias|scale|offset|^b\d*(_|$)")


@dataclasses.dataclass(frozen=True)
class _PerUnit(Rule):
    """One block for each output unit, on the axis that the array's name tells.

    The last part of the path decides: ``kernel`` and ``w`` (Flax, Haiku) have units on
    the last axis, ``weight`` (Equinox, PyTorch) and ``embedding`` on the first; a
    ``bias``, a ``scale`` or an array of one axis is one block. The ``w`` of Haiku's
    transposed convolutions has units on the last axis but one. Where another name
    cannot tell, the last axis is taken with a UserWarning: pass ``bma.per_column``,
    ``bma.per_row`` or :func:`by_path` then. A bare array has no name, and takes the
    last axis.

    Example:
      >>> import jax.numpy as jnp, bma_optax as bma
      >>> params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3), "weight": jnp.ones((2, 3))}
      >>> bma.partition(params, bma.per_unit).names[:4]
      ('b', 'w[:, 0]', 'w[:, 1]', 'w[:, 2]')
      >>> bma.partition(params, bma.per_unit).names[4:]
      ('weight[0, :]', 'weight[1, :]')
    """

    def tile(self, path, shape):
        if len(shape) == 3 and path[-1:] == ("kernel",) and path[-2:-1] in _PROJECTIONS:
            return (shape[0], 1, 1)  # Units are counted by heads, and in each.
        module = path[-2] if path[-1:] == ("w",) and len(path) > 1 else ""
        if len(shape) > 2 and _TRANSPOSED.search(module):
            return (*shape[:-2], 1, shape[-1])
        return self._axis(path, shape).tile(path, shape)

    def _axis(self, path, shape):
        """The rule of the axis that counts units, ``per_leaf`` where none does."""
        guess = per_column if self._guesses(path, shape) else per_leaf
        return _rule_of_name(path) or guess

    def _guesses(self, path, shape):
        return _rule_of_name(path) is None and sum(n > 1 for n in shape) > 1

    def __repr__(self):
        return "per_unit"


@dataclasses.dataclass(frozen=True)
class _Units(_PerUnit):
    """Each output unit is a block that sees no other.

    The units are those of ``per_unit``. An array of one axis, or whose name tells that
    it has no inputs, such as a bias or a scale, has no blocks: the diagonal method
    updates it. A transformation stores a few numbers a unit, and no matrix.

    Example:
      >>> import jax.numpy as jnp, bma_optax as bma
      >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
      >>> blocks = bma.partition(params, bma.units)
      >>> blocks.names, blocks.groups
      (('kernel[:, 0]', 'kernel[:, 1]', 'kernel[:, 2]'), ((0,), (1,), (2,)))
    """

    def tile(self, path, shape):
        if len(shape) < 2 or self._axis(path, shape) is per_leaf:
            return None
        return super().tile(path, shape)

    def scope(self, path):
        return "block"

    def __repr__(self):
        return "units"


def _rule_of_name(path: Path) -> Rule | None:
    """Returns the rule that an array's name tells; None where it tells none."""
    if not path:
        return per_column
    name = re.split(r"[./]", path[-1])[-1]
    if _LAST_AXIS.search(name):
        return per_column
    if _FIRST_AXIS.search(name):
        return per_row
    return per_leaf if _NO_INPUTS.search(name) else None


per_unit: Rule = _PerUnit()
units: Rule = _Units()
per_column: Rule = _PerColumn()
per_row: Rule = _PerRow()

without_parentheses(per_unit, units, per_column, per_row)
