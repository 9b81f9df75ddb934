"""From parameters and a rule to the partition: which tile is which block.

The result depends on paths and shapes alone. ``init`` and ``update`` both compute it,
at trace time, since a state may hold nothing but arrays; a cache makes that cheap.
Blocks are numbered group by group, small groups first, and grids last.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import numpy as np

from bma_optax import _names, _tree, _warnings
from bma_optax._checks import is_integer
from bma_optax.partitions import _rules, _sizes
from bma_optax.partitions._blocks import Partition
from bma_optax.partitions._combinators import SCOPES, ByPath, Stacked, Within
from bma_optax.partitions._rules import Path, Rule, Shape
from bma_optax.partitions._systems import GridFields
from bma_optax.partitions._tiles import Tiles

_FEW_NAMES = 5


def partition(params: Any, rule: Rule = _rules.per_leaf) -> Partition:
    """The blocks that ``rule`` cuts a parameter pytree into, for a look beforehand.

    Args:
      params: a pytree of floating arrays, or of ``jax.ShapeDtypeStruct``: nothing is
        allocated.
      rule: a :class:`Rule`. It also says which blocks see each other: all of them, or
        those :func:`within` bounds, or on a grid those up to a ``reach`` apart.

    Returns:
      A :class:`Partition`; print it to read it as a table.

    Raises:
      TypeError: if ``rule`` is not a rule, or a leaf not a real floating array.
      ValueError: if the rule returns something other than a tile, if a pattern of it
        matches nothing, or if a small matrix could not exist.

    Warns:
      UserWarning: if more than a thousand blocks are in one group, or if ``per_unit``
        has to guess the axis of units.

    Example:
      >>> import jax, bma_optax as bma
      >>> params = {"kernel": jax.ShapeDtypeStruct((784, 32), "float32"),
      ...           "bias": jax.ShapeDtypeStruct((32,), "float32")}
      >>> print(bma.partition(params, bma.per_leaf))
      Partition per_leaf: 25,120 parameters in 2 blocks
      array   shape      tile       blocks  block size  bytes of diag H
      bias    (32,)      (32,)      1       32          128
      kernel  (784, 32)  (784, 32)  1       25,088      100,352
      small matrices: 1 of 2 × 2; float32 state 100,480 bytes of diag H and 40 of U, v and the inverse root; a solve costs O(8)
      >>> field = jax.ShapeDtypeStruct((1024, 1024), "float32")
      >>> print(bma.partition(field, bma.per_tile((4, 4), reach=1)))
      Partition per_tile((4, 4), reach=1): 1,048,576 parameters in 65,536 blocks
      array   shape         tile    blocks  block size  bytes of diag H
      params  (1024, 1024)  (4, 4)  65,536  16          4,194,304
      grid of 1 field: tiles meet up to (1, 1) apart; levels of 256 × 256, 64 × 64, 16 × 16, 4 × 4, the last one dense; float32 state 4,194,304 bytes of diag G and 3,833,856 of the levels; 10 products a refresh
    """  # noqa: E501
    result = layout(_tree.parameters(params), rule)
    _sizes.check_dense(result)
    _sizes.check_grids(result)
    warn_of_guesses(result)
    return result


def dense_partition(params: Any, rule: Rule) -> Partition:
    """Makes a partition for methods of running sums, which know no reach."""
    result = partition(params, rule)
    if result.grids:
        path = result.grids[0].arrays[0].path
        raise ValueError(
            f"{_names.name_of(path)!r}: {rule} has a reach, which is about a "
            "curvature. Running sums of gradients have none: pass the rule without "
            "`reach`, or take bma.newton_bma or bma.preconditioner instead."
        )
    return result


def warn_of_guesses(result: Partition) -> None:
    """A UserWarning for arrays whose names do not tell the axis of units."""
    rule = result.rule
    guessed = [a.path for a in result.arrays if rule._guesses(a.path, a.shape)]
    if guessed:
        _warnings.warn(
            f"{_listed(guessed)}: per_unit takes the last axis for that of units, as "
            "no name tells. Pass bma.per_column or bma.per_row instead, or "
            "bma.by_path with one of these for some of the arrays."
        )


def layout(params: Any, rule: Rule) -> Partition:
    """Makes a partition without checks of its size, for use in ``update``."""
    _rules.check_rule(rule)
    leaves = tuple(
        (path, tuple(np.shape(leaf))) for path, leaf in _names.named_leaves(params)
    )
    return _layout(leaves, rule)


@functools.lru_cache(maxsize=128)
def _layout(leaves, rule) -> Partition:
    arrays = [_tiles(rule, path, shape) for path, shape in leaves]
    _check_patterns(rule, [path for path, _ in leaves])
    dense: dict[Path, dict[Path, int]] = {}
    grids: dict[Any, list[int]] = {}
    for position, array in enumerate(arrays):
        if array.is_grid:
            kind = (array.group, array.shape, array.tile, array.reach, array.slopes)
            grids.setdefault((*kind, array.stacked_axes), []).append(position)
        elif array.num_blocks:
            dense.setdefault(array.group, {})[array.owner] = array.num_blocks
    _check_owners(rule, arrays)
    alone = {array.group for array in arrays if array.alone}
    # Groups of equal size lie side by side, so that one batched eigh serves them all.
    counts = {key: sum(owners.values()) for key, owners in dense.items()}
    ordered = sorted(dense, key=lambda key: 1 if key in alone else counts[key])
    groups: list[int] = []
    for key in ordered:
        groups += [1] * counts[key] if key in alone else [counts[key]]
    buckets = tuple((len(list(same)), n) for n, same in itertools.groupby(groups))
    starts: dict[Any, int] = {}
    position = 0
    for key in ordered:
        for owner, num_blocks in dense[key].items():
            starts[key, owner] = position
            position += num_blocks
    for fields in grids.values():
        for i in fields:
            starts[arrays[i].group, arrays[i].owner] = position
            position += arrays[i].num_blocks
    placed = tuple(
        dataclasses.replace(array, start=starts.get((array.group, array.owner), 0))
        for array in arrays
    )
    return Partition(
        rule,
        placed,
        buckets,
        tuple(
            GridFields(tuple(fields), tuple(placed[i] for i in fields))
            for fields in grids.values()
        ),
    )


def _check_owners(rule: Rule, arrays: list[Tiles]) -> None:
    """Raises a ValueError for arrays of one block that are in different groups."""
    groups: dict[Path, Path] = {}
    for array in arrays:
        if not array.num_blocks:
            continue
        group = groups.setdefault(array.owner, array.group)
        if group != array.group:
            raise ValueError(
                f"{_names.name_of(array.path)!r}: {rule} merges it into one block with "
                f"arrays that are within other bounds ({group[0]!r}, not "
                f"{array.group[0]!r}, or another layer). Pass the same for all of them."
            )


def _tiles(rule: Rule, path: Path, shape: Shape) -> Tiles:
    """One array, without the place of its blocks among others."""
    name = _names.name_of(path)
    scope, owner = rule.scope(path), rule.owner(path)
    if not isinstance(scope, str) or scope not in SCOPES:
        raise ValueError(
            f"{name!r}: {rule} gave {scope!r} for its scope. Return one of {SCOPES} "
            "instead."
        )
    stacked = rule.stacked_axes(path, shape)
    if not isinstance(stacked, tuple) or not all(
        is_integer(i) and 0 <= i < len(shape) for i in stacked
    ):
        raise ValueError(
            f"{name!r} of shape {shape}: {rule} gave {stacked!r} for its stacked axes. "
            f"Return a tuple of integers from 0 to {len(shape) - 1} instead."
        )
    array = Tiles(
        path,
        shape,
        _tile(rule, path, shape),
        owner,
        stacked_axes=stacked,
        group=(scope, *{"all": (), "layer": path[:-1]}.get(scope, owner)),
        alone=scope == "block",
    )
    if owner != path and array.num_blocks > 1:
        raise ValueError(
            f"{name!r}: {rule} merges it with other arrays but cuts it into "
            f"{array.num_blocks} tiles; only whole arrays can be merged. Return the "
            f"whole shape, {shape}, as its tile instead."
        )
    reach = rule.reach(path, shape)
    if reach is None or array.num_blocks <= 1:
        return array
    valid = isinstance(reach, tuple) and all(is_integer(k) and k >= 0 for k in reach)
    if not valid or len(reach) != len(shape):
        raise ValueError(
            f"{name!r} of shape {shape}: {rule} gave {reach!r} for its reach. Return a "
            f"tuple of {len(shape)} integers >= 0, or None, instead."
        )
    if array.alone:
        raise ValueError(
            f"{name!r}: {rule} leaves every block alone, and a reach is about blocks "
            "that see each other. Pass a tile without a reach, or "
            'bma.within("array", ...), instead.'
        )
    # Along an axis of one tile, and along one that is no grid, all elements meet.
    axes = zip(shape, array.grid, reach, strict=True)
    every = (
        n if g == 1 or i in stacked else int(k) for i, (n, g, k) in enumerate(axes)
    )
    slopes = bool(rule.slopes(path, shape))
    return dataclasses.replace(array, reach=tuple(every), slopes=slopes)


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
    while isinstance(rule, (Stacked, Within)):
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
