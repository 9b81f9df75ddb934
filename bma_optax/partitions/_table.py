"""A partition as a table for people."""

import math
from typing import TYPE_CHECKING

from bma_optax import _names
from bma_optax.partitions import _units

if TYPE_CHECKING:
    from bma_optax.partitions._blocks import Partition


def table(blocks: "Partition") -> str:
    """Arrays, blocks, bytes of state and the cost of a solve, line by line."""
    alone = blocks.couple == "block"
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
    matrices = ", ".join(f"{count} of {n} × {n}" for count, n in blocks.buckets)
    entries = sum(count * n * n for count, n in blocks.buckets)
    cost = sum(count * n**3 for count, n in blocks.buckets)
    d = sum(math.prod(array.shape) for array in blocks.arrays)
    if alone:
        state = (
            f"mini-BMA: float32 state {4 * numbers:,} bytes beside the momentum, "
            f"{(d + numbers) / max(d, 1):.3f} numbers a parameter with it"
        )
    else:
        state = (
            f"small matrices: {matrices or 'none'}; float32 state {4 * d:,} bytes "
            f"of diag H and {8 * entries + 4 * blocks.num_blocks:,} of U, v and the "
            f"inverse root; a solve costs O({cost:,})"
        )
    return "\n".join(
        [
            f"Partition {blocks.rule}, couple={blocks.couple!r}: {d:,} parameters in "
            f"{blocks.num_blocks:,} blocks",
            *lines,
            state,
        ]
    )
