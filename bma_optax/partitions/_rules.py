"""Partition rules: which parameters form a block, and which blocks see each other.

A rule knows nothing but the path and the shape of an array. It says which tile of the
array is a block (:meth:`Rule.tile`), within which bounds blocks see each other
(:meth:`Rule.scope`), and how far apart entries of a curvature may be that meet
(:meth:`Rule.reach`). Here are the rules of whole arrays.
"""

import dataclasses
from typing import Any

Path = tuple[str, ...]
Shape = tuple[int, ...]


class Rule:
    """A partition rule: the base class of every rule, to be subclassed or not.

    A rule gives each array a *tile* shape, from the array's path and shape alone, and
    every tile of the array is a block. It also says which blocks see each other, all of
    them by default. Rules are frozen values, comparable, printable and deliberately not
    callable: ``optax.inject_hyperparams`` takes callables for schedules.

    Ready-made: ``per_leaf`` (one block an array), ``per_layer`` (the arrays of one
    module merged into one block), ``per_unit`` (one block for each output unit, on the
    axis that the names of Flax, Haiku, Equinox and PyTorch tell), ``units`` (the same,
    each unit alone), ``per_column`` and ``per_row`` (one block for each index of the
    last or the first axis), ``per_element`` (AdaGrad-Full), and :func:`per_tile`,
    :func:`within`, :func:`stacked`, :func:`by_path`, :func:`by_function`.

    Example:
      >>> import bma_optax as bma
      >>> bma.per_unit, bma.per_unit == bma.per_unit, callable(bma.per_unit)
      (per_unit, True, False)
    """

    def tile(self, path: Path, shape: Shape) -> Shape | None:
        """The tile of the array at ``path``; None if it has no blocks.

        Args:
          path: the keys to the array, as strings.
          shape: its shape.

        Returns:
          A positive integer for each axis, or None.

        Example:
          >>> import bma_optax as bma
          >>> bma.per_unit.tile(("dense", "kernel"), (784, 32))
          (784, 1)
        """
        raise NotImplementedError

    def owner(self, path: Path) -> Path:
        """Arrays with one owner, each a single tile, are merged into one block.

        Args:
          path: the keys to the array, as strings.

        Returns:
          The name of the block, in the form of a path: by default the array's own.

        Example:
          >>> import bma_optax as bma
          >>> bma.per_layer.owner(("dense", "kernel"))
          ('dense',)
        """
        return path

    def stacked_axes(self, path: Path, shape: Shape) -> tuple[int, ...]:
        """The axes whose entries are arrays of their own: scanned layers, fields.

        A ``reach`` does not apply along them: all of their entries may meet.

        Args:
          path: the keys to the array, as strings.
          shape: its shape.

        Returns:
          Positions of axes, ascending: by default none.

        Example:
          >>> import bma_optax as bma
          >>> rule = bma.stacked(bma.per_unit)
          >>> rule.stacked_axes(("layers", "kernel"), (12, 784, 32))
          (0,)
        """
        return ()

    def scope(self, path: Path) -> str:
        """Within what the blocks of an array see others, see :func:`within`.

        Args:
          path: the keys to the array, as strings.

        Returns:
          "all", "layer", "array" or "block": by default "all".

        Example:
          >>> import bma_optax as bma
          >>> bma.within("layer", bma.per_leaf).scope(("dense", "kernel"))
          'layer'
        """
        return "all"

    def reach(self, path: Path, shape: Shape) -> Shape | None:
        """How far apart entries of a curvature are that meet, see :func:`per_tile`.

        Args:
          path: the keys to the array, as strings.
          shape: its shape.

        Returns:
          A number of elements >= 0 for each axis; None, the default, where all entries
          may meet.

        Example:
          >>> import bma_optax as bma
          >>> bma.per_tile((4, 4), reach=1).reach(("u",), (64, 64))
          (1, 1)
        """
        return None

    def slopes(self, path: Path, shape: Shape) -> bool:
        """Whether blocks on a grid have slopes beside means, see :func:`per_tile`.

        Args:
          path: the keys to the array, as strings.
          shape: its shape.

        Returns:
          By default False.

        Example:
          >>> import bma_optax as bma
          >>> bma.per_tile((4, 4), reach=2, slopes=True).slopes(("u",), (64, 64))
          True
        """
        return False

    def _guesses(self, path: Path, shape: Shape) -> bool:
        """Whether the tile is a guess, of which the user is told."""
        return False


@dataclasses.dataclass(frozen=True)
class _PerLeaf(Rule):
    """Each array is one block; the default, as in Lu et al. 2018.

    The weights and the bias of a layer are two blocks.

    Example:
      >>> import jax.numpy as jnp, bma_optax as bma
      >>> params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
      >>> bma.partition(params, bma.per_leaf).sizes
      (3, 6)

    Source: Lu et al. 2018, figure 2.
    """

    def tile(self, path, shape):
        return shape

    def __repr__(self):
        return "per_leaf"


@dataclasses.dataclass(frozen=True)
class _PerLayer(Rule):
    """The arrays of one module, whose paths differ in the last part, are one block.

    Example:
      >>> import jax.numpy as jnp, bma_optax as bma
      >>> params = {"dense": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}}
      >>> bma.partition(params, bma.per_layer).sizes
      (9,)
    """

    def tile(self, path, shape):
        return shape

    def owner(self, path):
        return path[:-1]

    def __repr__(self):
        return "per_layer"


per_leaf: Rule = _PerLeaf()
per_layer: Rule = _PerLayer()


def check_rule(rule: Any, name: str = "partition") -> Rule:
    """``rule`` itself, or a TypeError that says what a rule is."""
    if isinstance(rule, Rule):
        return rule
    advice = "a rule such as bma.per_leaf"
    if getattr(rule, "__name__", "") == "per_tile":
        advice = "a tile with it, as bma.per_tile((4, 4)),"
    elif isinstance(rule, tuple):
        advice = f"a tile as bma.per_tile({rule!r})"
    elif callable(rule) and not isinstance(rule, type):
        advice = "a function of your own as bma.by_function(function)"
    elif isinstance(rule, (int, float)):
        advice += ", and a rate as `learning_rate`,"
    raise TypeError(
        f"`{name}` must be a partition rule, got {rule!r}. Pass {advice} instead."
    )


def without_parentheses(*rules: Rule) -> None:
    """Makes Python's own error for a call, bma.per_leaf(), a sentence about rules.

    Rules are values, and no functions.
    """
    for rule in rules:
        type(rule).__name__ = f"bma.{rule} (a rule, written without parentheses)"


without_parentheses(per_leaf, per_layer)
