"""A partition as a table for people: what :func:`bma_optax.partition` prints.

A row for each array, then a line for the dense matrices or for each grid, with the
bytes of state in float32 and what a solve or a refresh costs.
"""

import math
from typing import Any

from bma_optax import _names
from bma_optax.partitions import _units

_LARGE = 64  # Rows of a matrix from which on its root takes longer than an update.


def table(blocks: Any) -> str:
    """Arrays, blocks, bytes of state and the cost of a solve, line by line."""
    alone = bool(blocks.arrays) and all(
        array.alone and _units.same_shapes(array) for array in blocks.arrays
    )
    last = "bytes of mini-BMA" if alone else "bytes of diag H"
    rows = [("array", "shape", "tile", "blocks", "block size", last)]
    numbers = 0
    for array in blocks.arrays:
        sizes = array.block_sizes
        low, high = (sizes.min(), sizes.max()) if sizes.size else (0, 0)
        number = _units.num_statistics(array) if alone else math.prod(array.shape)
        numbers += number
        rows.append(
            (
                _names.name_of(array.path),
                str(array.shape),
                "none" if array.tile is None else str(array.tile),
                f"{array.num_blocks:,}",
                f"{low:,}" if low == high else f"{low:,} to {high:,}",
                f"{4 * number:,}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    d = sum(math.prod(array.shape) for array in blocks.arrays)
    if alone:
        lines.append(
            f"mini-BMA: float32 state {4 * numbers:,} bytes beside the momentum, "
            f"{(d + numbers) / max(d, 1):.3f} numbers a parameter with it"
        )
        sums = d + 3 * blocks.num_dense
        learned = sums + sum(_units.num_weights(array) for array in blocks.arrays)
        lines.append(
            f"AdaGrad-BMA: float32 state {4 * sums:,} bytes, {sums / max(d, 1):.3f} "
            f"numbers a parameter; {learned / max(d, 1):.3f} with learned weights"
        )
    else:
        lines += [_grid(fields) for fields in blocks.grids]
        if blocks.buckets or not blocks.grids:
            lines.append(_dense(blocks))
    head = f"Partition {blocks.rule}: {d:,} parameters in {blocks.num_blocks:,} blocks"
    return "\n".join([head, *lines])


def _dense(blocks) -> str:
    """The small matrices of all dense groups."""
    matrices = ", ".join(f"{count} of {n} × {n}" for count, n in blocks.buckets)
    entries = sum(count * n * n for count, n in blocks.buckets)
    cost = sum(count * n**3 for count, n in blocks.buckets)
    d = sum(math.prod(array.shape) for array in blocks.arrays if not array.is_grid)
    return (
        f"small matrices: {matrices or 'none'}; float32 state {4 * d:,} bytes of diag "
        f"H and {8 * entries + 4 * blocks.num_dense:,} of U, v and the inverse root; a "
        f"solve costs O({cost:,})"
        + _advice(max((n for _, n in blocks.buckets), default=0))
    )


def _advice(n) -> str:
    """Tells how long `eigh` takes where the launches count: these are measured."""
    if n < _LARGE:
        return ""
    return (
        f", and on an H100 `eigh` about {0.5 + n / 100:.1f} ms, where an update of ten "
        "million parameters takes .6: an update_interval divides it"
    )


def _grid(fields) -> str:
    """The levels of one grid; a solve costs a few passes over them."""
    levels, bottom = fields.levels
    names = [" × ".join(map(str, grid.grid)) for grid, _ in levels]
    names.append(" × ".join(map(str, bottom.grid)))
    count, d = len(fields.arrays), fields.elements.num_cells
    state = 4 * (fields.num_statistics + fields.tiles.num_cells)
    slopes = len(fields.tiles.slopes)
    linear = f" with {slopes} slope{'s' * (slopes > 1)} a block" if slopes else ""
    return (
        f"grid of {count:,} field{'s' * (count > 1)}{linear}: tiles meet up to "
        f"{fields.tiles.reach} apart; levels of {', '.join(names)}, the last one "
        "dense; "
        f"float32 state {4 * d:,} bytes of diag G and {state:,} of the levels; "
        f"{fields.num_products:,} products a refresh"
    )
