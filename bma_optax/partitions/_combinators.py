"""Rules made of other rules: by path, for stacked arrays, and within bounds.

A combinator passes everything on that its rule says of an array (tile, owner, stacked
axes, scope, reach and slopes), so that one tree can hold an image with one reach, a
volume with another and the arrays of a network.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping

from bma_optax import _names
from bma_optax._checks import is_integer
from bma_optax.partitions._rules import Path, Rule, check_rule, per_leaf

_FEW_PATTERNS = 8


@dataclasses.dataclass(frozen=True)
class _Wrapped(Rule):
    """A rule that says what another one does, but for what its subclass changes."""

    rule: Rule

    def tile(self, path, shape):
        return self.rule.tile(path, shape)

    def owner(self, path):
        return self.rule.owner(path)

    def stacked_axes(self, path, shape):
        return self.rule.stacked_axes(path, shape)

    def scope(self, path):
        return self.rule.scope(path)

    def reach(self, path, shape):
        return self.rule.reach(path, shape)

    def slopes(self, path, shape):
        return self.rule.slopes(path, shape)

    def _guesses(self, path, shape):
        return self.rule._guesses(path, shape)


@dataclasses.dataclass(frozen=True)
class Stacked(_Wrapped):
    """The value behind :func:`stacked`."""

    axis: int

    def _axis(self, path, shape):
        if not -len(shape) <= self.axis < len(shape):
            raise ValueError(
                f"{_names.name_of(path)!r} of shape {shape} has no axis {self.axis}: "
                f"{self}. Pass bma.by_path with this rule for the stacked arrays alone."
            )
        return self.axis % len(shape)

    def _entry(self, path, shape):
        axis = self._axis(path, shape)
        return (*shape[:axis], *shape[axis + 1 :])

    def tile(self, path, shape):
        axis = self._axis(path, shape)
        tile = self.rule.tile(path, self._entry(path, shape))
        return None if tile is None else (*tile[:axis], 1, *tile[axis:])

    def stacked_axes(self, path, shape):
        axis = self._axis(path, shape)
        inner = self.rule.stacked_axes(path, self._entry(path, shape))
        return tuple(sorted((axis, *(i + (i >= axis) for i in inner))))

    def reach(self, path, shape):
        axis = self._axis(path, shape)
        reach = self.rule.reach(path, self._entry(path, shape))
        return None if reach is None else (*reach[:axis], shape[axis], *reach[axis:])

    def slopes(self, path, shape):
        return self.rule.slopes(path, self._entry(path, shape))

    def _guesses(self, path, shape):
        return self.rule._guesses(path, self._entry(path, shape))

    def __repr__(self):
        return f"stacked({self.rule}, axis={self.axis})"


SCOPES = ("all", "layer", "array", "block")  # Each is a part of the one before.


@dataclasses.dataclass(frozen=True)
class Within(_Wrapped):
    """The value behind :func:`within`."""

    bounds: str

    def scope(self, path):
        scope = self.rule.scope(path)
        if scope not in SCOPES:  # Refused with the path where it is used.
            return scope
        return max(self.bounds, scope, key=SCOPES.index)

    def __repr__(self):
        return f"within({self.bounds!r}, {self.rule})"


@dataclasses.dataclass(frozen=True)
class ByPath(Rule):
    """The value behind :func:`by_path`."""

    rules: tuple[tuple[str, Rule | None], ...]
    default: Rule | None

    @functools.cached_property
    def _searches(self):
        return [re.compile(pattern).search for pattern, _ in self.rules]

    @functools.cached_property
    def _matches(self) -> dict[Path, int]:
        """The positions that ``match`` has found, by path."""
        return {}

    def match(self, path: Path) -> int:
        """The position of the first pattern that matches, or len(rules)."""
        if path not in self._matches:
            name = "/".join(path)
            found = (i for i, search in enumerate(self._searches) if search(name))
            self._matches[path] = next(found, len(self.rules))
        return self._matches[path]

    def rule_of(self, position: int) -> Rule | None:
        """The rule at a position that ``match`` gives."""
        return self.rules[position][1] if position < len(self.rules) else self.default

    def _rule(self, path):
        return self.rule_of(self.match(path))

    def tile(self, path, shape):
        rule = self._rule(path)
        return None if rule is None else rule.tile(path, shape)

    def owner(self, path):
        rule = self._rule(path)
        return path if rule is None else rule.owner(path)

    def stacked_axes(self, path, shape):
        rule = self._rule(path)
        return () if rule is None else rule.stacked_axes(path, shape)

    def scope(self, path):
        rule = self._rule(path)
        return "all" if rule is None else rule.scope(path)

    def reach(self, path, shape):
        rule = self._rule(path)
        return None if rule is None else rule.reach(path, shape)

    def slopes(self, path, shape):
        rule = self._rule(path)
        return rule is not None and rule.slopes(path, shape)

    def _guesses(self, path, shape):
        rule = self._rule(path)
        return rule is not None and rule._guesses(path, shape)

    def __repr__(self):
        few = [f"{pattern!r}: {rule}" for pattern, rule in self.rules[:_FEW_PATTERNS]]
        more = len(self.rules) - len(few)
        few += [f"... and {more} more"] if more else []
        return f"by_path({{{', '.join(few)}}}, default={self.default})"


def stacked(rule: Rule, axis: int = 0) -> Rule:
    """Another rule for every entry along an axis, as if each were an array.

    It is for layers that are scanned or stacked (``nnx.scan``, ``jax.vmap`` over
    modules), whose arrays have a leading axis more. It is also for attention: a kernel
    of shape (inputs, heads, units) with ``axis=1`` is cut head by head.

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
    check_rule(rule, "rule")
    if not is_integer(axis):
        raise TypeError(f"`axis` must be an integer, got {axis!r}.")
    return Stacked(rule, int(axis))


def within(bounds: str, rule: Rule) -> Rule:
    """Bounds a rule: blocks see each other only within a layer, an array or a block.

    By default all blocks of a tree see each other, in one small matrix. A solve costs
    Σ L_group³ for groups of L_group blocks.

    Args:
      bounds: "layer" if blocks see each other where the paths of their arrays differ in
        nothing but the last part; "array" if the blocks of one array do; "block" if
        every block is alone.
      rule: the rule that cuts the arrays. One that is within narrower bounds already
        stays so.

    Returns:
      A :class:`Rule`.

    Raises:
      TypeError: if ``rule`` is no rule.
      ValueError: if ``bounds`` is something else.

    Example:
      >>> import jax, bma_optax as bma
      >>> params = {"kernel": jax.ShapeDtypeStruct((2, 3), "float32"),
      ...           "bias": jax.ShapeDtypeStruct((3,), "float32")}
      >>> bma.partition(params, bma.within("array", bma.per_unit)).groups
      ((0,), (1, 2, 3))
    """
    check_rule(rule, "rule")
    if not isinstance(bounds, str) or bounds not in SCOPES[1:]:
        raise ValueError(
            f"`bounds` must be one of {SCOPES[1:]}, got {bounds!r}. Pass the rule "
            "alone where all blocks see each other."
        )
    return Within(rule, bounds)


def by_path(
    rules: Mapping[str, Rule | None], *, default: Rule | None = per_leaf
) -> Rule:
    """Another rule where a path matches a pattern.

    Args:
      rules: a mapping from regular expressions to rules. An expression is searched for
        in the path, joined by "/". The first one that is found decides. The rule None
        gives no blocks: plain AdaGrad or Adam.
      default: the rule of arrays that no pattern matches.

    Returns:
      A :class:`Rule`. Partitioning raises a ValueError if a pattern decides nothing.

    Raises:
      ValueError: if a pattern is not a regular expression.
      TypeError: if a value is neither a rule nor None.

    Example:
      >>> import jax, bma_optax as bma
      >>> params = {"embed": jax.ShapeDtypeStruct((9, 2), "float32"),
      ...           "kernel": jax.ShapeDtypeStruct((2, 3), "float32")}
      >>> rule = bma.by_path({"embed": None, "kernel": bma.per_unit})
      >>> bma.partition(params, rule).names
      ('kernel[:, 0]', 'kernel[:, 1]', 'kernel[:, 2]')
    """
    if not isinstance(rules, Mapping) or not all(isinstance(p, str) for p in rules):
        raise TypeError(
            f"by_path: `rules` must map patterns to rules, got {rules!r}. Pass a "
            'dictionary with strings as keys, such as {"embed": bma.per_row}.'
        )
    for pattern in rules:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"by_path: {pattern!r} is no pattern: {error}.") from None
    for name, rule in [*(("rules", r) for r in rules.values()), ("default", default)]:
        if rule is not None:
            check_rule(rule, name)
    return ByPath(tuple(rules.items()), default)
