"""What an update alone costs where arrays are large, without the gradient."""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.networks.methods import METHODS

# SOAP and Muon multiply matrices of that size: on a CPU that takes minutes.
CHEAP = (
    "adam",
    "adam_centralized",
    "adam_mini",
    "adagrad",
    "adam_bma",
    "adam_shrunk",
    "adam_shrunk_learned",
    "mini_bma",
    "mini_bma_constant",
    "mini_bma_factor",
)


def costs(methods: list[str], width: int, repeats: int, bar: Any) -> dict[str, Any]:
    """Seconds of a step on one array (width, width), all methods in turns."""
    grads = {"kernel": jax.random.normal(jax.random.key(0), (width, width))}
    carries, steps, seconds = {}, {}, {}
    for name in methods:
        bar.set_postfix_str(f"{name}, a large array")
        tx = METHODS[name].make(**METHODS[name].variants()[0])

        def step(carry, grads, tx=tx):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return jax.tree.map(lambda p, u: p - 1e-3 * u, params, updates), state

        params = {"kernel": jnp.ones((width, width))}
        carries[name] = jax.tree.map(jnp.array, (params, tx.init(params)))
        lowered = jax.jit(step, donate_argnums=0).lower(carries[name], grads)
        steps[name], seconds[name] = lowered.compile(), []
    for _ in range(1 + repeats):  # Once to warm up.
        for name in methods:
            start = time.perf_counter()
            carries[name] = jax.block_until_ready(steps[name](carries[name], grads))
            seconds[name].append(time.perf_counter() - start)
    state_sizes = {
        name: sum(x.nbytes for x in jax.tree.leaves(state)) / grads["kernel"].nbytes
        for name, (_, state) in carries.items()
    }
    return {
        "width": width,
        "methods": {
            name: {
                "seconds": statistics.median(seconds[name][1:]),
                "range": [min(seconds[name][1:]), max(seconds[name][1:])],
                "state_over_params": state_sizes[name],
            }
            for name in methods
        },
    }


def cost_table(result: dict[str, Any]) -> str:
    width, rows = result["width"], result["methods"]
    lines = [
        f"\n### A step without the gradient, one array of {width} x {width}\n",
        "| method | milliseconds | times Adam's | state / d |",
        "|--|--|--|--|",
    ]
    for name, row in rows.items():
        ratio = row["seconds"] / rows["adam"]["seconds"]
        cells = [METHODS[name].label, f"{1e3 * row['seconds']:.3g}", f"{ratio:.2f}"]
        cells.append(f"{row['state_over_params']:.4g}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
