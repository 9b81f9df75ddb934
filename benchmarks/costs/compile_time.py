"""Seconds to compile one update, against the number of arrays.

python -m benchmarks.costs.compile_time
python -m benchmarks.costs.compile_time --arrays 10 100
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import bma_optax as bma
from benchmarks.harness.results import machine

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
    """To trace and to compile, medians; on pairs of a matrix and a vector."""
    params = {f"layer{i // 2:04}": {} for i in range(arrays)}
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).parent / "results" / "compile_time.json"
    add = parser.add_argument
    add("--arrays", nargs="+", type=int, default=[10, 100, 1000], help="how many")
    add("--repeats", type=int, default=3, help="of each; default: 3")
    add("--out", type=Path, default=default, help="JSON")
    options = parser.parse_args(arguments)
    if min(options.repeats, *options.arrays) < 1:
        parser.error("every number must be positive")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {name: {} for name in METHODS}
    with tqdm(total=len(METHODS) * len(options.arrays), unit="cell") as bar:
        for arrays in options.arrays:
            for name, tx in METHODS.items():
                bar.set_postfix_str(f"{name}, {arrays} arrays")
                rows[name][str(arrays)] = seconds(tx, arrays, options.repeats)
                bar.update()
    content = {
        **machine(jax, optax, bma),
        "methods": rows,
    }
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    heads = [f"{n:,} arrays" for n in options.arrays]
    print(f"| seconds to trace + to compile | {' | '.join(heads)} | of AdaGrad |")
    print("|--" * (len(heads) + 2) + "|")
    first, last = next(iter(rows)), str(options.arrays[-1])
    for name, row in rows.items():
        cells = [f"{x['trace']:.2g} + {x['compile']:.2g}" for x in row.values()]
        ratio = row[last]["compile"] / rows[first][last]["compile"]
        print(f"| {name} | {' | '.join(cells)} | {ratio:.1f} |")
    print(f"\n{content['device']}, {content['cores']} cores, JAX {jax.__version__}")
    print(f"Wrote {options.out}")


if __name__ == "__main__":
    main()
