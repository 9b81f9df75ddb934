"""A partition as a table for people."""

import math
from typing import TYPE_CHECKING

from bma_optax import _trees

if TYPE_CHECKING:
    from bma_optax._partition import Partition


def table(blocks: "Partition") -> str:
    """Arrays, blocks, bytes of state and the cost of a solve, line by line."""
    rows = [("array", "shape", "tile", "blocks", "block size", "bytes of diag H")]
    for array in blocks.arrays:
        sizes = array.block_sizes
        low, high = (sizes.min(), sizes.max()) if sizes.size else (0, 0)
        rows.append(
            (
                _trees.name_of(array.path),
                str(array.shape),
                "none" if array.tile is None else str(array.tile),
                f"{array.num_blocks:,}",
                f"{low:,}" if low == high else f"{low:,} to {high:,}",
                f"{4 * math.prod(array.shape):,}",
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
    return "\n".join(
        [
            f"Partition {blocks.rule}, couple={blocks.couple!r}: {d:,} parameters in "
            f"{blocks.num_blocks:,} blocks",
            *lines,
            f"small matrices: {matrices or 'none'}; float32 state {4 * d:,} bytes "
            f"of diag H and {8 * entries + 4 * blocks.num_blocks:,} of U, v and the "
            f"inverse root; a solve costs O({cost:,})",
        ]
    )
