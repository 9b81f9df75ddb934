"""What one update costs beside Optax's, from 50 thousand to 100 million parameters.

    python -m benchmarks.costs.step_cost
    python -m benchmarks.costs.step_cost --trees 50k 1M --steps 50

All methods take turns in one process on the same tree, in a new order and with a new
gradient at each step. States and gradients are donated, as inside a training step:
updates take the place of the gradients. Blocks are arrays unless a row says otherwise.
A method that makes its root every k steps is timed over windows of k.
"""

import functools
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

import bma_optax as bma
from benchmarks.harness import tables
from benchmarks.harness.results import Parser, Results, positive
from benchmarks.harness.timing import clock, compiled, in_turns, summary

NEVER = 10**6  # A root at few steps only: what the sums cost without it.
Shapes = tuple[tuple[int, ...], ...]


class Method(NamedTuple):
    label: str
    tx: Any
    window: int = 1  # Steps from one root to the next.
    slow: bool = False  # Left out where it takes minutes.


def with_biases(kernels: list[tuple[int, ...]]) -> Shapes:
    return tuple(shape for kernel in kernels for shape in (kernel, kernel[-1:]))


CONVOLUTIONS = [(3, 3, 3, 16), (3, 3, 16, 32), (3, 3, 32, 64), (3, 3, 64, 128)]
TREES: dict[str, Shapes] = {
    "50k": with_biases([(128, 128)] * 3),
    "1M": with_biases([*CONVOLUTIONS, (3200, 250), (250, 10)]),  # 1000 units.
    "30M": with_biases([(632, 632)] * 75),
    "100M": with_biases([(1000, 1000)] * 100),
    "tiny": with_biases([(8, 8)] * 500),
}
METHODS = {
    "adagrad": Method("`optax.scale_by_rss` (AdaGrad)", optax.scale_by_rss()),
    "adam": Method("`optax.scale_by_adam`", optax.scale_by_adam()),
    "muon": Method("`optax.contrib.muon`", optax.contrib.muon(1.0), slow=True),
    "bma": Method("`scale_by_bma()`", bma.scale_by_bma()),
    "bma_sums": Method(
        "... without v and the root", bma.scale_by_bma(update_interval=NEVER), NEVER
    ),
    "bma_10": Method(
        "... `update_interval=10`", bma.scale_by_bma(update_interval=10), 10
    ),
    "symmetric": Method('... `form="symmetric"`', bma.scale_by_bma(form="symmetric")),
    "adam_bma": Method("`scale_by_adam_bma()`", bma.scale_by_adam_bma()),
    "mini_bma": Method("`scale_by_mini_bma()`", bma.scale_by_mini_bma()),
}
# All units of a net see each other: one matrix of 1000 x 1000.
COUPLED = {
    "units": Method("`per_unit`, L = 1000", bma.scale_by_bma(bma.per_unit)),
    "units_10": Method(
        "... `update_interval=10`",
        bma.scale_by_bma(bma.per_unit, update_interval=10),
        10,
    ),
    "units_100": Method(
        "... `update_interval=100`",
        bma.scale_by_bma(bma.per_unit, update_interval=100),
        100,
    ),
}


def methods_of(name: str) -> dict[str, Method]:
    every = METHODS | (COUPLED if name == "1M" else {})
    small = name in ("50k", "1M")
    return {key: method for key, method in every.items() if small or not method.slow}


def mature(tx: Any, like: Any) -> Any:
    """A state, with a U of full rank as after many steps: `eigh` has its work."""
    state = jax.tree.map(jnp.array, tx.init(like))
    if getattr(state, "U", jnp.zeros(0)).ndim < 2:
        return state
    L = len(state.U)
    sums = jax.random.normal(jax.random.key(0), (L, 2 * L))
    return state._replace(U=sums @ sums.T)


def measure(name: str, steps: int) -> dict[str, Any]:
    """Seconds of a step of each method on one tree, and bytes."""
    shapes, methods = TREES[name], methods_of(name)
    like = {
        f"array{i:03}.{'kernel' if len(shape) > 1 else 'bias'}": jnp.zeros(shape)
        for i, shape in enumerate(shapes)
    }
    programs, states, rows = {}, {}, {}
    for key, method in methods.items():
        state = states[key] = mature(method.tx, like)
        programs[key], compile_seconds = compiled(
            method.tx.update, like, state, like, donate_argnums=(0, 1)
        )
        rows[key] = {
            "compile_seconds": compile_seconds,
            "state": sum(x.nbytes for x in jax.tree.leaves(state)),
            "temporary": programs[key].memory_analysis().temp_size_in_bytes,
        }

    @jax.jit
    def drawn(key):
        keys = jax.random.split(key, len(like))
        # Signs cancel inside a block, but not all of them.
        return {
            name: 0.1 + jax.random.normal(k, x.shape)
            for (name, x), k in zip(like.items(), keys, strict=True)
        }

    gradient = functools.lru_cache(1)(lambda i: drawn(jax.random.key(i)))

    def step(key: str, i: int) -> float:
        mine = jax.block_until_ready(jax.tree.map(jnp.copy, gradient(i)))
        (_, states[key]), seconds = clock(programs[key], mine, states[key], like)
        return seconds

    windows = {k: m.window if m.window < NEVER else 1 for k, m in methods.items()}
    total = max(steps, *(2 * window for window in windows.values())) + 1
    measures = {key: functools.partial(step, key) for key in methods}
    for key, seconds in in_turns(measures, total).items():
        times, window = seconds[1:], windows[key]  # The first warms up.
        starts = range(0, len(times) - window + 1, window)
        rows[key] |= summary([statistics.fmean(times[i : i + window]) for i in starts])
    return {
        "parameters": optax.tree.size(like),
        "arrays": len(shapes),
        "steps": total - 1,
        # What it foretells of `scale_by_bma()`, beside the bytes measured.
        "partition": str(bma.partition(like)).splitlines()[-1],
        "methods": rows,
    }


def copy_bandwidth(size: int) -> float:
    """Bytes a second of a pass that reads and writes float32 in place."""
    negate = jax.jit(lambda x: -x, donate_argnums=0)
    x, times = jnp.ones(size), []
    for _ in range(12):
        x, seconds = clock(negate, x)
        times.append(seconds)
    return 2 * x.nbytes / statistics.median(times[2:])


def table(result: dict[str, Any], bandwidth: float) -> str:
    rows, d = result["methods"], result["parameters"]
    lines = []
    for key, row in rows.items():
        low, high = (1e3 * x for x in row["range"])
        lines.append(
            [
                (METHODS | COUPLED)[key].label,
                f"{1e3 * row['seconds']:.3g} ({low:.3g} to {high:.3g})",
                f"{row['seconds'] / rows['adagrad']['seconds']:.2f}",
                f"{row['seconds'] / rows['adam']['seconds']:.2f}",
                f"{row['state'] / d:.2f}, {row['temporary'] / d:.2f}",
                f"{row['compile_seconds']:.2f}",
            ]
        )
    columns = ["method", "milliseconds (range)", "of AdaGrad", "of Adam"]
    columns += ["state, temporary (bytes / d)", "s to compile"]
    least = 24 * d / rows["bma"]["seconds"]
    return (
        f"\n### {d:,} parameters in {result['arrays']} arrays, "
        f"{result['steps']} steps\n\n{tables.table(columns, lines)}\n"
        f"\n`scale_by_bma()`: 24 bytes a parameter, the least for two passes, at "
        f"{least / 1e9:.3g} GB/s; a pass in place runs at {bandwidth / 1e9:.3g} GB/s.\n"
        f"\n`bma.partition`: {result['partition']}."
    )


def draw(trees: dict[str, Any], path: Path) -> None:
    """Cost against d."""
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    chosen = [result for name, result in trees.items() if name != "tiny"]
    chosen.sort(key=lambda result: result["parameters"])
    for key in ("adam", "bma", "symmetric", "adam_bma", "mini_bma"):
        ratios = [
            r["methods"][key]["seconds"] / r["methods"]["adagrad"]["seconds"]
            for r in chosen
        ]
        sizes = [r["parameters"] for r in chosen]
        axes.plot(sizes, ratios, "o-", label=METHODS[key].label.replace("`", ""))
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="parameters", ylabel="time of a step / AdaGrad's")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)
    print(f"Wrote {path}")


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("benchmarks.costs.step_cost", __doc__)
    add = parser.add_argument
    add("--trees", nargs="+", choices=TREES, default=list(TREES))
    add("--steps", type=positive, default=40, help="at least so many; default: 40")
    options = parser.parse(arguments)
    largest = max(sum(map(math.prod, TREES[name])) for name in options.trees)
    results = Results(options, {"steps": options.steps}, jax, optax, bma)
    bandwidth = results.cell(lambda: copy_bandwidth(largest), "copy_bandwidth")
    for name in tqdm(options.trees, unit="tree", disable=None):
        found = results.cell(lambda n=name: measure(n, options.steps), "trees", name)
        tqdm.write(table(found, bandwidth))
    results.finish()
    draw(results.content["trees"], options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
