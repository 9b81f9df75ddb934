"""Seconds to trace and to compile one update, against the number of arrays.

python -m benchmarks.costs.compile_time
python -m benchmarks.costs.compile_time --arrays 10 100
"""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import bma_optax as bma
from benchmarks.harness.results import Parser, Results, positive
from benchmarks.harness.tables import table

METHODS = {
    "`optax.scale_by_rss` (AdaGrad)": optax.scale_by_rss(),
    "`optax.scale_by_adam`": optax.scale_by_adam(),
    "`scale_by_bma()`": bma.scale_by_bma(),
    '`scale_by_bma(within("layer", per_leaf))`': bma.scale_by_bma(
        bma.within("layer", bma.per_leaf)
    ),
    "`scale_by_adam_bma()`": bma.scale_by_adam_bma(),
    "`scale_by_mini_bma()`": bma.scale_by_mini_bma(),
}


def seconds(tx: Any, arrays: int, repeats: int) -> dict[str, float]:
    """Medians; on pairs of a matrix and a vector."""
    params: dict[str, dict] = {f"layer{i // 2:04}": {} for i in range(arrays)}
    for i in range(arrays):
        shape = (8,) if i % 2 else (8, 8)
        params[f"layer{i // 2:04}"]["bias" if i % 2 else "kernel"] = jnp.zeros(shape)
    state = tx.init(params)
    traced, compiled = [], []
    for _ in range(repeats):
        jax.clear_caches()
        start = time.perf_counter()
        lowered = jax.jit(tx.update).lower(params, state)
        middle = time.perf_counter()
        lowered.compile()
        compiled.append(time.perf_counter() - middle)
        traced.append(middle - start)
    return {"trace": statistics.median(traced), "compile": statistics.median(compiled)}


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("benchmarks.costs.compile_time", __doc__)
    add = parser.add_argument
    add("--arrays", nargs="+", type=positive, default=[10, 100, 1000], help="how many")
    add("--repeats", type=positive, default=3, help="of each; default: 3")
    options = parser.parse(arguments)
    results = Results(options, {"repeats": options.repeats}, jax, optax, bma)
    for arrays in tqdm(options.arrays, unit="size", disable=None):
        for name, tx in METHODS.items():
            results.cell(
                lambda tx=tx, n=arrays: seconds(tx, n, options.repeats),
                *("methods", name, arrays),
            )
    rows, last = results.content["methods"], str(options.arrays[-1])
    least = next(iter(rows.values()))[last]["compile"]
    lines = []
    for name, row in rows.items():
        cells = [f"{x['trace']:.2g} + {x['compile']:.2g}" for x in row.values()]
        lines.append([name, *cells, f"{row[last]['compile'] / least:.1f}"])
    sizes = [f"{n:,} arrays" for n in options.arrays]
    print(table(["seconds to trace + to compile", *sizes, "of AdaGrad"], lines))
    results.finish()


if __name__ == "__main__":
    main()
