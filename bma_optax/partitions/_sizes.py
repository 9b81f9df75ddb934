"""What a partition would hold and cost, refused or warned of before it is allocated."""

from bma_optax import _names, _warn
from bma_optax.multilevel import _coarse_systems
from bma_optax.partitions._blocks import Partition

_MANY_BLOCKS = 1000
_MANY_CELLS = 4096  # Rows of a dense matrix below nested levels.
_INDEX_LIMIT = 2**31  # LAPACK and its peers index the entries of a matrix in 32 bits.


def check_dense(blocks: Partition, has_reach: bool = False) -> None:
    """Warns of large dense matrices; raises a ValueError for impossible ones.

    With a reach only blocks that are whole arrays are in one.
    """
    if has_reach:
        buckets = [(1, len(starts)) for starts in blocks.single_tiles]
    else:
        buckets = list(blocks.buckets)
    entries = sum(count * n * n for count, n in buckets)
    largest = max((n for _, n in buckets), default=0)
    if largest <= _MANY_BLOCKS and entries < _INDEX_LIMIT:
        return
    array = max(blocks.arrays, key=lambda array: array.num_blocks)
    others = " and other arrays have" if len(blocks.arrays) > 1 else " has"
    found = (
        f"{_names.name_of(array.path)!r}{others} up to {largest:,} blocks in one group "
        f"by {blocks.rule}: "
    )
    advice = (
        "Pass coarser blocks instead (bma.per_leaf, larger tiles, None for an array in "
        'bma.by_path), or couple="layer", "array" or "block"'
    )
    if not has_reach and array.num_blocks > 1:
        advice += (
            ", or, where the curvature of a field meets near neighbours only, the "
            "`reach` of bma.newton_bma and bma.preconditioner"
        )
    if entries >= _INDEX_LIMIT:
        raise ValueError(
            f"{found}a {largest:,} × {largest:,} matrix cannot be held. {advice}."
        )
    _warn.warn(f"{found}each step factors a matrix of that size. {advice}.")


def check_nested(
    systems: tuple[_coarse_systems.System, ...], blocks: Partition
) -> None:
    """The same for arrays with a reach, whose fields all see each other."""
    for system in systems:
        if not isinstance(system, _coarse_systems.Nested):
            continue
        array, stencil = blocks.arrays[system.arrays[0]], system.tiles
        name, more = _names.name_of(array.path), len(system.arrays) - 1
        products = system.num_products
        bottom = system.levels.bottom.num_cells
        held = system.N_size + system.K_size
        found = (
            f"{name!r} of shape {array.shape}"
            + (f" and {more:,} more like it" if more else "")
            + f" with tiles of {array.tile} and a reach of {stencil.reach} tiles: "
        )
        advice = (
            "Along axes after a tile, along those of bma.stacked, and between arrays "
            "of one shape all entries may meet. Pass a tile for each axis along which "
            'a reach holds instead, or larger tiles, or couple="array".'
        )
        if bottom > _MANY_CELLS or held >= _INDEX_LIMIT:
            raise ValueError(
                f"{found}{held:,} numbers, and a dense matrix of {bottom:,} rows at "
                f"the last of its levels, cannot be held. {advice}"
            )
        if products > _MANY_BLOCKS:
            _warn.warn(f"{found}each refresh costs {products:,} products. {advice}")
