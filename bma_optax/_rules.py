"""Partition rules: which tile of each array is a block, from path and shape alone."""

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any

Path = tuple[str, ...]
Shape = tuple[int, ...]


class Rule:
    """A partition rule: the base class of every rule, to be subclassed or not.

    A rule gives each array a *tile* shape, from the array's path and shape alone, and
    every tile of the array is a block. Rules are frozen values, comparable, printable
    and deliberately not callable: ``optax.inject_hyperparams`` takes callables for
    schedules.

    Ready-made: ``per_leaf`` (one block an array), ``per_layer`` (the arrays of one
    module merged into one block), ``per_unit`` (one block for each index of the last
    axis; an array of one axis is one block), ``per_row`` (the same for the first axis:
    embeddings, Equinox's layers), ``per_element`` (AdaGrad-Full), and :func:`per_tile`,
    :func:`stacked`, :func:`by_path`, :func:`by_function`.

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
        """The axes whose entries are arrays of their own, as in scanned layers.

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


@dataclasses.dataclass(frozen=True)
class _PerLeaf(Rule):
    """Each array is one block; the default, and the report's.

    The weights and the bias of a layer are two blocks.

    Example:
      >>> import jax.numpy as jnp, bma_optax as bma
      >>> params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
      >>> bma.partition(params, bma.per_leaf).sizes
      (3, 6)

    Source: the report's figure 2.
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


@dataclasses.dataclass(frozen=True)
class _PerUnit(Rule):
    """One block for each index of the last axis (an output unit, a channel).

    For arrays that are (..., inputs, outputs), as those of Flax and Haiku. An array of
    one axis is one block.

    Example:
      >>> import jax.numpy as jnp, bma_optax as bma
      >>> params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
      >>> bma.partition(params, bma.per_unit).names
      ('b', 'w[:, 0]', 'w[:, 1]', 'w[:, 2]')
    """

    def tile(self, path, shape):
        return (*shape[:-1], 1) if len(shape) > 1 else shape

    def __repr__(self):
        return "per_unit"


@dataclasses.dataclass(frozen=True)
class _PerRow(Rule):
    """One block for each index of the first axis (Equinox's units, embeddings).

    An array of one axis is one block.

    Example:
      >>> import jax.numpy as jnp, bma_optax as bma
      >>> bma.partition(jnp.ones((2, 3)), bma.per_row).sizes
      (3, 3)
    """

    def tile(self, path, shape):
        return (1, *shape[1:]) if len(shape) > 1 else shape

    def __repr__(self):
        return "per_row"


@dataclasses.dataclass(frozen=True)
class _PerElement(Rule):
    """One block for each element; AdaGrad-BMA with it is AdaGrad-Full.

    Example:
      >>> import jax.numpy as jnp, bma_optax as bma
      >>> bma.partition(jnp.ones(3), bma.per_element).sizes
      (1, 1, 1)
    """

    def tile(self, path, shape):
        return (1,) * len(shape)

    def __repr__(self):
        return "per_element"


@dataclasses.dataclass(frozen=True)
class _PerTile(Rule):
    leading: Shape

    def tile(self, path, shape):
        leading = self.leading[: len(shape)]
        return (*leading, *shape[len(leading) :])

    def __repr__(self):
        return f"per_tile({self.leading})"


@dataclasses.dataclass(frozen=True)
class _ByFunction(Rule):
    function: Callable[[Path, Shape], Shape | None]

    def tile(self, path, shape):
        return self.function(path, shape)

    def __repr__(self):
        return f"by_function({getattr(self.function, '__name__', self.function)})"


per_leaf: Rule = _PerLeaf()
per_layer: Rule = _PerLayer()
per_unit: Rule = _PerUnit()
per_row: Rule = _PerRow()
per_element: Rule = _PerElement()


def per_tile(tile: int | tuple[int, ...]) -> Rule:
    """Blocks are tiles of the leading axes of each array.

    Axes beyond ``tile`` are whole; an array with fewer axes takes the first numbers of
    ``tile``. Where a tile does not divide an axis, the last blocks are smaller and
    count with their true size.

    Args:
      tile: the positive length of a tile along each leading axis; an integer where
        there is one.

    Returns:
      A :class:`Rule`.

    Raises:
      TypeError: if ``tile`` is not an integer or a tuple of them.
      ValueError: if one is not positive.

    Example:
      >>> import jax, bma_optax as bma
      >>> image = jax.ShapeDtypeStruct((6, 4, 3), "float32")
      >>> blocks = bma.partition(image, bma.per_tile((4, 4)))
      >>> blocks.names, blocks.sizes
      (('params[0:4, :, :]', 'params[4:6, :, :]'), (48, 24))
    """
    lengths: Any = (tile,) if is_integer(tile) else tile
    if not isinstance(lengths, (tuple, list)) or not all(map(is_integer, lengths)):
        raise TypeError(
            f"`tile` must hold positive integers, got {tile!r}. Pass one for each "
            "leading axis, such as bma.per_tile((4, 4))."
        )
    if not all(t > 0 for t in lengths):
        raise ValueError(f"`tile` must hold positive integers, got {tile}.")
    return _PerTile(tuple(map(int, lengths)))


def by_function(function: Callable[[Path, Shape], Shape | None]) -> Rule:
    """A rule of your own, from the path and the shape of an array to its tile.

    Args:
      function: takes the path, a tuple of strings, and the shape; returns a tile, one
        positive integer for each axis, or None for no blocks. It must depend on
        nothing else.

    Returns:
      A :class:`Rule`, equal to another one if the function is the same.

    Raises:
      TypeError: if ``function`` is not callable.

    Example:
      >>> import jax, bma_optax as bma
      >>> by_row = bma.by_function(lambda path, shape: (1,) + shape[1:])
      >>> bma.partition(jax.ShapeDtypeStruct((2, 5), "float32"), by_row).names
      ('params[0, :]', 'params[1, :]')
    """
    if not callable(function):
        raise TypeError(f"by_function takes a function, got {function!r}.")
    return _ByFunction(function)


def check_rule(rule: Any, name: str = "partition") -> Rule:
    """``rule`` itself, or a TypeError that says what a rule is."""
    if isinstance(rule, Rule):
        return rule
    advice = "a rule such as bma.per_leaf"
    if rule is per_tile:
        advice = "a tile with it, as bma.per_tile((4, 4)),"
    elif callable(rule) and not isinstance(rule, type):
        advice = "a function of your own as bma.by_function(function)"
    elif isinstance(rule, (int, float)):
        advice += ", and a rate as `learning_rate`,"
    raise TypeError(
        f"`{name}` must be a partition rule, got {rule!r}. Pass {advice} instead."
    )


def is_integer(value: Any) -> bool:
    """Whether ``value`` is an integer of Python or NumPy."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


# Rules are values, and no functions. With this name in it, Python's own error for
# bma.per_leaf() is a sentence about them.
for _rule in (per_leaf, per_layer, per_unit, per_row, per_element):
    type(_rule).__name__ = f"bma.{_rule} (a rule, written without parentheses)"
