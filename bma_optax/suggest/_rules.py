"""The rule of arrays whose structure is known, spelled as a person would write it.

Tiles have four elements, or the reach, along the axes that are to be coarsened, and one
along the others. Where the loss is of fourth order, or where means are slow, blocks
have slopes. Axes before and after those are fields: ``stacked`` and the axes that a
tile does not name.
"""

import math
import re

from bma_optax.partitions._combinators import by_path, stacked, within
from bma_optax.partitions._rules import Rule
from bma_optax.partitions._tile_rules import per_tile
from bma_optax.suggest._structure import Structure

_TILE = 4
# Along an axis this much weaker than the stiffest one, smoothing alone may be enough.
_WEAK = 1 / 3


def rule_of(structures: list[Structure], *, strong: bool, slopes: bool) -> Rule:
    """The rule of all arrays.

    Args:
      structures: of the arrays, at least one of which has neighbours.
      strong: whether tiles lie along the stiff axes alone.
      slopes: whether all blocks have slopes, not only those of fourth order.
    """
    local = {s.path: _array_rule(s, strong, slopes) for s in structures if s.space}
    rules = list(dict.fromkeys(local.values()))
    others = [s for s in structures if not s.space and math.prod(s.shape) > 1]
    if len(rules) == 1 and not others:
        rule = rules[0]
    else:
        rule = by_path(
            {f"^{re.escape('/'.join(path))}$": rule for path, rule in local.items()}
        )
    return within("array", rule) if _apart(structures) else rule


def has_weak_axes(structures: list[Structure]) -> bool:
    """Whether tiles along the stiff axes alone would be other tiles."""
    return any(len(_coarsened(s, strong=True)) < len(s.space) for s in structures)


def _array_rule(array: Structure, strong: bool, slopes: bool) -> Rule:
    space, axes = array.space, array.axes
    coarsened = _coarsened(array, strong)
    # Elements that do not meet along an axis are no fields: they need no products.
    named = [i for i, axis in enumerate(axes) if i in space or axis.is_batch]
    first, last = min(named), max(named)
    tile, reach = [], []
    for i in range(first, last + 1):
        k = axes[i].reach or 0
        tile.append(max(_TILE, k) if i in coarsened else 1)
        reach.append(k if i in space else 0 if axes[i].is_apart else axes[i].length - 1)
    one = len(set(reach)) == 1
    rule = per_tile(
        tuple(tile),
        reach=reach[0] if one else tuple(reach),
        slopes=slopes or array.is_fourth_order,
    )
    for _ in range(first):
        rule = stacked(rule)
    return rule


def _coarsened(array: Structure, strong: bool) -> tuple[int, ...]:
    """The axes along which tiles have more than one element."""
    if not strong or array.stiffness is None:
        return array.space
    most = max(array.stiffness, default=0)
    if most <= 0:
        return array.space
    pairs = zip(array.space, array.stiffness, strict=True)
    return tuple(i for i, stiffness in pairs if stiffness >= _WEAK * most)


def _apart(structures: list[Structure]) -> bool:
    """Whether arrays of one shape, which would be fields on one grid, do not meet."""
    shapes = [s.shape for s in structures if s.space]
    if len(set(shapes)) == len(shapes):
        return False
    local = {i for i, s in enumerate(structures) if s.space}
    return not any(local & set(structures[i].meets) for i in local)
