"""Partition rules: which tile of each array is a block, from path and shape alone."""

import dataclasses
import re
from collections.abc import Callable, Mapping
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
    def tile(self, path, shape):
        return shape

    def __repr__(self):
        return "per_leaf"


@dataclasses.dataclass(frozen=True)
class _PerLayer(Rule):
    def tile(self, path, shape):
        return shape

    def owner(self, path):
        return path[:-1]

    def __repr__(self):
        return "per_layer"


@dataclasses.dataclass(frozen=True)
class _PerUnit(Rule):
    def tile(self, path, shape):
        return (*shape[:-1], 1) if len(shape) > 1 else shape

    def __repr__(self):
        return "per_unit"


@dataclasses.dataclass(frozen=True)
class _PerRow(Rule):
    def tile(self, path, shape):
        return (1, *shape[1:]) if len(shape) > 1 else shape

    def __repr__(self):
        return "per_row"


@dataclasses.dataclass(frozen=True)
class _PerElement(Rule):
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
class _Stacked(Rule):
    rule: Rule
    axis: int

    def _axis(self, path, shape):
        if not -len(shape) <= self.axis < len(shape):
            raise ValueError(
                f"{self}: {'/'.join(path) or 'params'!r} of shape {shape} has no axis "
                f"{self.axis}. Name the stacked arrays by bma.by_path."
            )
        return self.axis % len(shape)

    def tile(self, path, shape):
        axis = self._axis(path, shape)
        tile = self.rule.tile(path, (*shape[:axis], *shape[axis + 1 :]))
        return None if tile is None else (*tile[:axis], 1, *tile[axis:])

    def owner(self, path):
        return self.rule.owner(path)

    def stacked_axes(self, path, shape):
        axis = self._axis(path, shape)
        inner = self.rule.stacked_axes(path, (*shape[:axis], *shape[axis + 1 :]))
        return tuple(sorted((axis, *(i + (i >= axis) for i in inner))))

    def __repr__(self):
        return f"stacked({self.rule}, axis={self.axis})"


@dataclasses.dataclass(frozen=True)
class _ByFunction(Rule):
    function: Callable[[Path, Shape], Shape | None]

    def tile(self, path, shape):
        return self.function(path, shape)

    def __repr__(self):
        return f"by_function({getattr(self.function, '__name__', self.function)})"


@dataclasses.dataclass(frozen=True)
class _ByPath(Rule):
    rules: tuple[tuple[str, Rule | None], ...]
    default: Rule | None

    def match(self, path: Path) -> int:
        """The position of the first pattern that matches, or len(rules)."""
        name = "/".join(path)
        found = (i for i, (p, _) in enumerate(self.rules) if re.search(p, name))
        return next(found, len(self.rules))

    def _rule(self, path):
        return (*(rule for _, rule in self.rules), self.default)[self.match(path)]

    def tile(self, path, shape):
        rule = self._rule(path)
        return None if rule is None else rule.tile(path, shape)

    def owner(self, path):
        rule = self._rule(path)
        return path if rule is None else rule.owner(path)

    def stacked_axes(self, path, shape):
        rule = self._rule(path)
        return () if rule is None else rule.stacked_axes(path, shape)

    def __repr__(self):
        return f"by_path({dict(self.rules)}, default={self.default})"


per_leaf: Rule = _PerLeaf()
per_layer: Rule = _PerLayer()
per_unit: Rule = _PerUnit()
per_row: Rule = _PerRow()
per_element: Rule = _PerElement()


def per_tile(tile: tuple[int, ...]) -> Rule:
    """Blocks are tiles of the leading axes of each array.

    Axes beyond ``tile`` are whole; an array with fewer axes takes the first numbers of
    ``tile``. Where a tile does not divide an axis, the last blocks are smaller and
    count with their true size.

    Args:
      tile: the positive length of a tile along each leading axis.

    Returns:
      A :class:`Rule`.

    Raises:
      ValueError: if ``tile`` is not a tuple of positive integers.

    Example:
      >>> import jax, bma_optax as bma
      >>> image = jax.ShapeDtypeStruct((6, 4, 3), "float32")
      >>> blocks = bma.partition(image, bma.per_tile((4, 4)))
      >>> blocks.names, blocks.sizes
      (('params[0:4, :, :]', 'params[4:6, :, :]'), (48, 24))
    """
    tile = tuple(tile)
    if not all(isinstance(t, int) and t > 0 for t in tile):
        raise ValueError(f"`tile` must hold positive integers, got {tile}.")
    return _PerTile(tile)


def stacked(rule: Rule, axis: int = 0) -> Rule:
    """Another rule for every entry along an axis, as if each were an array.

    For layers that are scanned or stacked (``nnx.scan``, ``jax.vmap`` over modules),
    whose arrays have a leading axis more, and for attention: a kernel of shape
    (inputs, heads, units) with ``axis=1`` is cut head by head.

    Args:
      rule: the rule of one entry, without that axis.
      axis: the position of the axis, from the end if negative.

    Returns:
      A :class:`Rule`. Partitioning raises a ValueError for an array without that axis.

    Raises:
      TypeError: if ``rule`` is no rule or ``axis`` no integer.

    Example:
      >>> import jax, bma_optax as bma
      >>> layers = jax.ShapeDtypeStruct((2, 5, 3), "float32")
      >>> blocks = bma.partition(layers, bma.stacked(bma.per_leaf))
      >>> blocks.names, blocks.sizes
      (('params[0, :, :]', 'params[1, :, :]'), (15, 15))
    """
    check_rule(rule)
    if not isinstance(axis, int):
        raise TypeError(f"`axis` must be an integer, got {axis!r}.")
    return _Stacked(rule, axis)


def by_path(
    rules: Mapping[str, Rule | None], *, default: Rule | None = per_leaf
) -> Rule:
    """Another rule where a path matches a pattern.

    Args:
      rules: from regular expressions, searched for in the path joined by "/", to the
        rule of the arrays they match, the first match deciding. The rule None gives
        plain AdaGrad: no blocks.
      default: the rule of arrays that no pattern matches.

    Returns:
      A :class:`Rule`. Partitioning raises a ValueError if a pattern decides nothing.

    Raises:
      ValueError: if a pattern is not a regular expression.
      TypeError: if a value is neither a rule nor None.

    Example:
      >>> import jax, bma_optax as bma
      >>> params = {"embed": jax.ShapeDtypeStruct((9, 2), "float32"),
      ...           "dense": jax.ShapeDtypeStruct((2, 3), "float32")}
      >>> rule = bma.by_path({"embed": None, "dense": bma.per_unit})
      >>> bma.partition(params, rule).names
      ('dense[:, 0]', 'dense[:, 1]', 'dense[:, 2]')
    """
    for pattern in rules:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"by_path: {pattern!r} is no pattern: {error}.") from None
    for rule in (*rules.values(), default):
        if rule is not None:
            check_rule(rule)
    return _ByPath(tuple(rules.items()), default)


def by_function(function: Callable[[Path, Shape], Shape | None]) -> Rule:
    """A rule of your own, from the path and the shape of an array to its tile.

    Args:
      function: takes the path, a tuple of strings, and the shape; returns a tile, one
        positive integer for each axis, or None for plain AdaGrad. It must depend on
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


def check_rule(rule: Any) -> Rule:
    """``rule`` itself, or a TypeError that says what a rule is."""
    if not isinstance(rule, Rule):
        raise TypeError(
            f"A partition rule is needed, such as bma.per_leaf, got {rule!r}. Wrap a "
            "function of your own as bma.by_function(function); bma.per_tile needs a "
            "tile: bma.per_tile((4, 4))."
        )
    return rule
