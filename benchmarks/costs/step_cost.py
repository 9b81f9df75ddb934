"""What one update costs beside Optax's, from 50 thousand to 100 million parameters.

    python -m benchmarks.costs.step_cost
    python -m benchmarks.costs.step_cost --trees 50k 1M --steps 50

All methods take turns in one process on the same tree, in a new order and with a new
gradient at each step. States and gradients are donated, as inside a training step:
updates take the place of the gradients. Blocks are arrays unless a row says otherwise.
A method that makes its root every k steps is timed over windows of k.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from tqdm import tqdm

import bma_optax as bma
from benchmarks.harness.results import machine

NEVER = 10**6  # A root at few steps only: what the sums cost without it.
Shapes = tuple[tuple[int, ...], ...]


class Method(NamedTuple):
    label: str
    tx: Any
    window: int = 1  # Steps from one root to the next.
    slow: bool = False  # Left out where it takes minutes.


def tiles_of_8(path, shape):
    """8 x 8 of the last two axes."""
    return (*(1 for _ in shape[:-2]), *(8 for _ in shape[-2:]))


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
    "per_unit": Method(
        '`within("block", per_unit)`',
        bma.scale_by_bma(bma.within("block", bma.per_unit)),
    ),
    "tiles": Method(
        "tiles of 8 x 8, each alone",
        bma.scale_by_bma(bma.within("block", bma.by_function(tiles_of_8))),
    ),
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


def measure(name: str, steps: int, bar: tqdm) -> dict[str, Any]:
    """Seconds of a step of each method on one tree, and bytes."""
    shapes = TREES[name]
    like = {
        f"array{i:03}.{'kernel' if len(shape) > 1 else 'bias'}": jnp.zeros(shape)
        for i, shape in enumerate(shapes)
    }
    d = optax.tree.size(like)
    methods = methods_of(name)
    compiled, states, compile_seconds, memory = {}, {}, {}, {}
    for key, method in methods.items():
        bar.set_postfix_str(f"{name}: compiling {method.label}")
        states[key] = mature(method.tx, like)
        start = time.perf_counter()
        update = jax.jit(method.tx.update, donate_argnums=(0, 1))
        compiled[key] = update.lower(like, states[key], like).compile()
        compile_seconds[key] = time.perf_counter() - start
        memory[key] = {
            "state": sum(x.nbytes for x in jax.tree.leaves(states[key])),
            "temporary": compiled[key].memory_analysis().temp_size_in_bytes,
        }

    @jax.jit
    def gradient(key):
        keys = jax.random.split(key, len(like))
        # Signs cancel inside a block, but not all of them.
        return {
            name: 0.1 + jax.random.normal(k, x.shape)
            for (name, x), k in zip(like.items(), keys, strict=True)
        }

    order = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {key: [] for key in methods}
    windows = [method.window for method in methods.values() if method.window < NEVER]
    total = max(steps, *(2 * window for window in windows)) + 1
    for i in range(total):
        grads = jax.block_until_ready(gradient(jax.random.key(i)))
        bar.set_postfix_str(f"{name}: step {i + 1} of {total}")
        for key in order.permutation(list(methods)):
            mine = jax.block_until_ready(jax.tree.map(jnp.copy, grads))
            start = time.perf_counter()
            updates, states[key] = compiled[key](mine, states[key], like)
            jax.block_until_ready((updates, states[key]))
            seconds[key].append(time.perf_counter() - start)
            del updates
    rows = {}
    for key, method in methods.items():
        window = 1 if method.window == NEVER else method.window
        times = seconds[key][1:]  # The first warms up.
        means = [
            statistics.fmean(times[i : i + window])
            for i in range(0, len(times) - window + 1, window)
        ]
        rows[key] = {
            "seconds": statistics.median(means),
            "range": [min(means), max(means)],
            "compile_seconds": compile_seconds[key],
            **memory[key],
        }
    bar.update()
    return {
        "parameters": d,
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
        start = time.perf_counter()
        x = jax.block_until_ready(negate(x))
        times.append(time.perf_counter() - start)
    return 2 * x.nbytes / statistics.median(times[2:])


def table(result: dict[str, Any], bandwidth: float) -> str:
    rows, d = result["methods"], result["parameters"]
    lines = [
        f"\n### {d:,} parameters in {result['arrays']} arrays, "
        f"{result['steps']} steps\n",
        "| method | milliseconds (range) | of AdaGrad | of Adam | state, temporary "
        "(bytes / d) | s to compile |",
        "|--|--|--|--|--|--|",
    ]
    for key, row in rows.items():
        low, high = (1e3 * x for x in row["range"])
        cells = [
            methods_of_label(key),
            f"{1e3 * row['seconds']:.3g} ({low:.3g} to {high:.3g})",
            f"{row['seconds'] / rows['adagrad']['seconds']:.2f}",
            f"{row['seconds'] / rows['adam']['seconds']:.2f}",
            f"{row['state'] / d:.2f}, {row['temporary'] / d:.2f}",
            f"{row['compile_seconds']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    least = 24 * d / rows["bma"]["seconds"]
    lines.append(
        f"\n`scale_by_bma()`: 24 bytes a parameter, the least for two passes, at "
        f"{least / 1e9:.3g} GB/s; a pass in place runs at {bandwidth / 1e9:.3g} GB/s."
    )
    if "partition" in result:
        lines.append(f"\n`bma.partition`: {result['partition']}.")
    return "\n".join(lines)


def methods_of_label(key: str) -> str:
    return (METHODS | COUPLED)[key].label


def draw(trees: dict[str, Any], path: Path) -> None:
    """Cost against d."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    chosen = [result for name, result in trees.items() if name != "tiny"]
    chosen.sort(key=lambda result: result["parameters"])
    for key in ("adam", "bma", "symmetric", "per_unit", "adam_bma", "mini_bma"):
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
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).parent / "results" / "step_cost.json"
    add = parser.add_argument
    add("--trees", nargs="+", choices=TREES, default=list(TREES))
    add("--steps", type=int, default=40, help="at least so many of each; default: 40")
    add("--out", type=Path, default=default, help="JSON; the figure lies beside it")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps must be positive")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    largest = max(sum(map(math.prod, TREES[name])) for name in options.trees)
    content = {
        **machine(jax, optax, bma),
        "copy_bandwidth": copy_bandwidth(largest),
        "trees": {},
    }
    with tqdm(total=len(options.trees), unit="tree") as bar:
        for name in options.trees:
            content["trees"][name] = measure(name, options.steps, bar)
            options.out.write_text(json.dumps(content, indent=1) + "\n")
            bar.write(table(content["trees"][name], content["copy_bandwidth"]))
    print(f"\n{content['device']}, {content['cores']} cores, JAX {jax.__version__}")
    draw(content["trees"], options.out.with_suffix(".png"))
    print(f"Wrote {options.out} and its figure")


if __name__ == "__main__":
    main()
