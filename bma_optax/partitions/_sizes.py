"""What a partition would hold and cost, refused or warned of before it is allocated.

A dense group of L blocks holds L² numbers and costs O(L³) a solve. A grid holds a few
numbers a block and costs some products for each of its fields, see ``_systems``.
"""

from typing import Any

import jax

from bma_optax import _names, _sharding, _warnings
from bma_optax.partitions._blocks import Partition

_MANY_BLOCKS = 1000
_MANY_CELLS = 4096  # Rows of a dense matrix below nested levels.
_INDEX_LIMIT = 2**31  # LAPACK and its peers index the entries of a matrix in 32 bits.


def check_dense(blocks: Partition) -> None:
    """Warns of large dense matrices; raises a ValueError for impossible ones."""
    entries = sum(count * n * n for count, n in blocks.buckets)
    largest = max((n for _, n in blocks.buckets), default=0)
    if largest <= _MANY_BLOCKS and entries < _INDEX_LIMIT:
        return
    arrays = [array for array in blocks.arrays if not array.is_grid]
    array = max(arrays, key=lambda array: array.num_blocks)
    others = " and other arrays have" if len(arrays) > 1 else " has"
    found = (
        f"{_names.name_of(array.path)!r}{others} up to {largest:,} blocks in one group "
        f"by {blocks.rule}: "
    )
    advice = (
        "Pass coarser blocks instead (bma.per_leaf, larger tiles, None for an array in "
        'bma.by_path), or bma.within("layer", ...), "array" or "block"'
    )
    if array.num_blocks > 1:
        advice += (
            ", or, where the curvature of a field meets near neighbours only, the "
            "`reach` of bma.per_tile"
        )
    if entries >= _INDEX_LIMIT:
        raise ValueError(
            f"{found}a {largest:,} × {largest:,} matrix cannot be held. {advice}."
        )
    _warnings.warn(f"{found}each step factors a matrix of that size. {advice}.")


def check_grids(blocks: Partition) -> None:
    """Checks grids as :func:`check_dense` does; their fields all see each other."""
    for grid in blocks.grids:
        array, more = grid.arrays[0], len(grid.arrays) - 1
        bottom, held = grid.levels[1].num_rows, grid.num_statistics
        found = (
            f"{_names.name_of(array.path)!r} of shape {array.shape}"
            + (f" and {more:,} more like it" if more else "")
            + f" with tiles of {array.tile} and a reach of {grid.tiles.reach} tiles: "
        )
        advice = (
            "Along axes after a tile, along those of bma.stacked, and between arrays "
            "of one shape all entries may meet. Pass a tile for each axis along which "
            'a reach holds instead, or larger tiles, or bma.within("array", ...).'
        )
        if bottom > _MANY_CELLS or held >= _INDEX_LIMIT:
            raise ValueError(
                f"{found}{held:,} numbers, and a dense matrix of {bottom:,} rows at "
                f"the last of its levels, cannot be held. {advice}"
            )
        if grid.num_products > _MANY_BLOCKS:
            _warnings.warn(
                f"{found}each refresh costs {grid.num_products:,} products. {advice}"
            )


def warn_of_shards(blocks: Partition, params: Any) -> None:
    """A UserWarning for an array on a grid whose shards do not end where tiles do.

    Args:
      blocks: the partition.
      params: its parameters, whose shards ``jax.jit`` hides on automatic axes.
    """
    for array, leaf in zip(blocks.arrays, jax.tree.leaves(params), strict=True):
        if not array.is_grid:
            continue
        parts = _sharding.shard_shape(leaf)
        lengths = zip(array.shape, parts, array.tile or (), strict=True)
        for axis, (n, part, t) in enumerate(lengths):
            if part < n and part % t:
                _warnings.warn(
                    f"{_names.name_of(array.path)!r} of shape {array.shape}: a device "
                    f"has {part:,} of its {n:,} elements along axis {axis}, and tiles "
                    f"of {t} do not divide these. Devices then exchange more than what "
                    f"is next to their borders. Pass a tile of a length that divides "
                    f"{part:,} instead, or shard another axis."
                )
                return
