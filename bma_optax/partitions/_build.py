"""From parameters and a rule to the partition: which tile is which block."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import numpy as np

from bma_optax import _names, _warn
from bma_optax.partitions import _rules, _sizes
from bma_optax.partitions._blocks import Partition, group_of
from bma_optax.partitions._combinators import ByPath, Stacked
from bma_optax.partitions._rules import Path, Rule, Shape
from bma_optax.partitions._tiles import Tiles

_COUPLES = ("all", "array", "layer", "block")
_FEW_NAMES = 5


def partition(
    params: Any, rule: Rule = _rules.per_leaf, couple: str = "all"
) -> Partition:
    """The blocks that ``rule`` cuts a parameter pytree into, for a look beforehand.

    Args:
      params: a pytree of arrays, or of anything with a shape, such as
        ``jax.ShapeDtypeStruct``: nothing is allocated.
      rule: a :class:`Rule`.
      couple: which blocks see each other: "all" in one matrix, those of one "array",
        those of one "layer" (arrays whose paths differ in the last part only), or none,
        every "block" alone. A solve costs Σ L_group³.

    Returns:
      A :class:`Partition`; print it to read it as a table.

    Raises:
      TypeError: if ``rule`` is not a rule.
      ValueError: if ``couple`` is unknown, if the rule returns something other than a
        tile, if a pattern of it matches nothing, or if a small matrix could not exist.

    Warns:
      UserWarning: if more than a thousand blocks are in one group, or if ``per_unit``
        has to guess the axis of units.

    Example:
      >>> import jax, bma_optax as bma
      >>> params = {"kernel": jax.ShapeDtypeStruct((784, 32), "float32"),
      ...           "bias": jax.ShapeDtypeStruct((32,), "float32")}
      >>> print(bma.partition(params, bma.per_leaf))
      Partition per_leaf, couple='all': 25,120 parameters in 2 blocks
      array   shape      tile       blocks  block size  bytes of diag H
      bias    (32,)      (32,)      1       32          128
      kernel  (784, 32)  (784, 32)  1       25,088      100,352
      small matrices: 1 of 2 × 2; float32 state 100,480 bytes of diag H and 40 of U, v and the inverse root; a solve costs O(8)
    """  # noqa: E501
    result = layout(params, rule, couple)
    _sizes.check_dense(result)
    warn_of_guesses(result)
    return result


def warn_of_guesses(result: Partition) -> None:
    """A UserWarning for arrays whose names do not tell the axis of units."""
    rule = result.rule
    guessed = [a.path for a in result.arrays if rule._guesses(a.path, a.shape)]
    if guessed:
        _warn.warn(
            f"{_listed(guessed)}: per_unit takes the last axis for that of units, as "
            "no name tells. Pass bma.per_column or bma.per_row instead, or "
            "bma.by_path with one of these for some of the arrays."
        )


def layout(params: Any, rule: Rule, couple: str) -> Partition:
    """As :func:`partition`, without the checks of its size: for use in ``update``."""
    _rules.check_rule(rule)
    check_couple(couple)
    leaves = tuple(
        (path, tuple(np.shape(leaf))) for path, leaf in _names.named_leaves(params)
    )
    return _layout(leaves, rule, couple)


def check_couple(couple: str) -> None:
    """Raises a ValueError for an unknown ``couple``."""
    if not isinstance(couple, str) or couple not in _COUPLES:
        raise ValueError(f"`couple` must be one of {_COUPLES}, got {couple!r}.")


@functools.lru_cache(maxsize=128)
def _layout(leaves, rule, couple) -> Partition:
    arrays = [
        Tiles(
            path,
            shape,
            _tile(rule, path, shape),
            rule.owner(path),
            stacked_axes=rule.stacked_axes(path, shape),
        )
        for path, shape in leaves
    ]
    _check_patterns(rule, [path for path, _ in leaves])
    groups: dict[Path, dict[Path, int]] = {}
    for array in arrays:
        if array.owner != array.path and array.num_blocks > 1:
            raise ValueError(
                f"{_names.name_of(array.path)!r}: {rule} merges it with other arrays "
                f"but cuts it into {array.num_blocks} tiles; only whole arrays can be "
                f"merged. Return the whole shape, {array.shape}, as its tile instead."
            )
        if array.num_blocks:
            key = group_of(array, couple)
            groups.setdefault(key, {})[array.owner] = array.num_blocks
    # Groups of equal size lie side by side, so that one batched eigh serves them all.
    ordered = sorted(groups.values(), key=lambda owners: sum(owners.values()))
    counts = [sum(owners.values()) for owners in ordered]
    if couple == "block":
        counts = [1] * sum(counts)
    buckets = tuple((len(list(same)), n) for n, same in itertools.groupby(counts))
    starts, position = {}, 0
    for owners in ordered:
        for owner, num_blocks in owners.items():
            starts[owner] = position
            position += num_blocks
    placed = tuple(
        dataclasses.replace(array, start=starts.get(array.owner, 0)) for array in arrays
    )
    return Partition(rule, couple, placed, buckets)


def _tile(rule: Rule, path: Path, shape: Shape) -> Shape | None:
    tile = rule.tile(path, shape)
    if tile is None or math.prod(shape) == 0:
        return None
    valid = isinstance(tile, (tuple, list)) and all(
        isinstance(t, (int, np.integer)) and t > 0 for t in tile
    )
    if not valid or len(tile) != len(shape):
        raise ValueError(
            f"{_names.name_of(path)!r} of shape {shape}: {rule} gave {tile!r} for its "
            f"tile. Return a tuple of {len(shape)} positive integers, or None, instead."
        )
    return tuple(min(int(t), n) for t, n in zip(tile, shape, strict=True))


def _check_patterns(rule: Rule | None, paths: list[Path]) -> None:
    """Raises if a pattern of ``by_path`` decides nothing.

    Optax calls ``init`` on a placeholder without leaves: nothing can match there.
    """
    while isinstance(rule, Stacked):
        rule = rule.rule
    if not isinstance(rule, ByPath) or not paths:
        return
    decided: dict[int, list[Path]] = {}
    for path in paths:
        decided.setdefault(rule.match(path), []).append(path)
    for i, (pattern, _) in enumerate(rule.rules):
        if i not in decided:
            raise ValueError(
                f"by_path: {pattern!r} matches none of the arrays that earlier "
                f"patterns leave; there are {_listed(paths)}. Pass a pattern that is "
                "found in one of these paths instead, or leave it out."
            )
    for i, theirs in decided.items():
        _check_patterns(rule.rule_of(i), theirs)


def _listed(paths: list[Path]) -> str:
    """The names of a few arrays, and how many more there are."""
    names = [repr(_names.name_of(path)) for path in paths[:_FEW_NAMES]]
    more = len(paths) - len(names)
    return ", ".join(names) + (f" and {more:,} more" if more else "")
