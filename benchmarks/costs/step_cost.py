"""What one update costs beside Optax's, from 50 thousand to 100 million parameters.

    python -m benchmarks.costs.step_cost
    python -m benchmarks.costs.step_cost --trees 50k 1M --steps 50

All methods take turns in one process on the same tree, in a new order and with a new
gradient at each step. States and gradients are donated, as inside a training step:
updates take the place of the gradients. Blocks are arrays unless a row says otherwise.
A method that makes its root every k steps is timed over windows of k.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import bma_optax as bma
from benchmarks.harness import tables
from benchmarks.harness.results import Parser, Results, positive
from benchmarks.harness.timing import clock, compiled, in_turns, summary

NEVER = 10**6  # A root at few steps only: what the sums cost without it.


class Method(NamedTuple):
    label: str
    tx: Any
    window: int = 1  # Steps from one root to the next.
    trees: tuple[str, ...] = ()  # If not all.


def with_biases(kernels: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [shape for kernel in kernels for shape in (kernel, kernel[-1:])]


CONVOLUTIONS = [(3, 3, 3, 16), (3, 3, 16, 32), (3, 3, 32, 64), (3, 3, 64, 128)]
TREES = {
    "50k": with_biases([(128, 128)] * 3),
    "1M": with_biases([*CONVOLUTIONS, (3200, 250), (250, 10)]),  # 1000 units.
    "30M": with_biases([(632, 632)] * 75),
    "100M": with_biases([(1000, 1000)] * 100),
    "tiny": with_biases([(8, 8)] * 500),
}
SMALL = ("50k", "1M")  # Elsewhere Muon takes minutes.
METHODS = {
    "adagrad": Method("`optax.scale_by_rss` (AdaGrad)", optax.scale_by_rss()),
    "adam": Method("`optax.scale_by_adam`", optax.scale_by_adam()),
    "muon": Method("`optax.contrib.muon`", optax.contrib.muon(1.0), 1, SMALL),
    "bma": Method("`scale_by_bma()`", bma.scale_by_bma()),
    "bma_sums": Method(
        "... without v and the root", bma.scale_by_bma(update_interval=NEVER)
    ),
    "bma_10": Method(
        "... `update_interval=10`", bma.scale_by_bma(update_interval=10), 10
    ),
    "symmetric": Method('... `form="symmetric"`', bma.scale_by_bma(form="symmetric")),
    "adam_bma": Method("`scale_by_adam_bma()`", bma.scale_by_adam_bma()),
    "alone": Method("`scale_by_bma(bma.units)`", bma.scale_by_bma(bma.units)),
    "alone_learned": Method(
        '... `weights="learned"`', bma.scale_by_bma(bma.units, weights="learned")
    ),
    "mini_bma": Method("`scale_by_mini_bma()`", bma.scale_by_mini_bma()),
}
for k in (1, 10, 100):  # All units see each other: one matrix of 1000 x 1000.
    METHODS[f"units_{k}"] = Method(
        f"`per_unit`, L = 1000, `update_interval={k}`",
        bma.scale_by_bma(bma.per_unit, update_interval=k),
        *(k, ("1M",)),
    )


def mature(tx: Any, like: Any) -> Any:
    """A state, with a U of full rank as after many steps: `eigh` has its work."""
    state = jax.tree.map(jnp.array, tx.init(like))
    if getattr(state, "U", jnp.zeros(0)).ndim < 2:
        return state
    L = len(state.U)
    sums = jax.random.normal(jax.random.key(0), (L, 2 * L))
    return state._replace(U=sums @ sums.T)


def measure(name: str, chosen: list[str], steps: int) -> dict[str, Any]:
    """Seconds of a step of each method on one tree, and bytes."""
    methods = {k: METHODS[k] for k in chosen if name in (METHODS[k].trees or TREES)}
    like = {
        f"array{i:03}.{'kernel' if len(shape) > 1 else 'bias'}": jnp.zeros(shape)
        for i, shape in enumerate(TREES[name])
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
        # Signs cancel inside a block, but not all of them.
        noise = optax.tree.random_like(key, like)
        return jax.tree.map(lambda x: 0.1 + x, noise)

    gradient = functools.lru_cache(1)(lambda i: drawn(jax.random.key(i)))

    def step(key: str, i: int) -> float:
        mine = jax.block_until_ready(jax.tree.map(jnp.copy, gradient(i)))
        (_, states[key]), seconds = clock(programs[key], mine, states[key], like)
        return seconds

    total = max(steps, *(2 * method.window for method in methods.values()))
    measures = {key: functools.partial(step, key) for key in methods}
    for key, seconds in in_turns(measures, 1 + total).items():
        window = methods[key].window
        times = np.array(seconds[1:])[: total // window * window]  # One warms up.
        rows[key] |= summary(times.reshape(-1, window).mean(axis=1).tolist())
    return {
        "parameters": optax.tree.size(like),
        "arrays": len(like),
        "steps": total,
        "methods": rows,
    }


def table(result: dict[str, Any]) -> str:
    rows, d = result["methods"], result["parameters"]
    lines = []

    def of(row, peer):
        return f"{row['seconds'] / rows[peer]['seconds']:.2f}" if peer in rows else ""

    for key, row in rows.items():
        low, high = (1e3 * x for x in row["range"])
        lines.append(
            [
                METHODS[key].label,
                f"{1e3 * row['seconds']:.3g} ({low:.3g} to {high:.3g})",
                *(of(row, peer) for peer in ("adagrad", "adam")),
                f"{row['state'] / d:.2f}, {row['temporary'] / d:.2f}",
                f"{row['compile_seconds']:.2f}",
            ]
        )
    columns = ["method", "milliseconds (range)", "of AdaGrad", "of Adam"]
    columns += ["state, temporary (bytes / d)", "s to compile"]
    head = f"\n### {d:,} parameters in {result['arrays']} arrays\n\n"
    return head + tables.table(columns, lines)


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("benchmarks.costs.step_cost", __doc__)
    add = parser.add_argument
    add("--trees", nargs="+", choices=TREES, default=list(TREES))
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--steps", type=positive, default=40, help="at least so many; default: 40")
    options = parser.parse(arguments)
    results = Results(options, {"steps": options.steps}, jax, optax, bma)
    for name in tqdm(options.trees, unit="tree", disable=None):
        found = results.cell(
            lambda n=name: measure(n, options.methods, options.steps), "trees", name
        )
        tqdm.write(table(found))
    results.finish()


if __name__ == "__main__":
    main()
