"""A million steps in float32 beside float64: how far the running sums drift.

    python -m benchmarks.costs.long_run
    python -m benchmarks.costs.long_run --steps 100000000

The same gradients, of one size throughout, for AdaGrad-BMA and Adam-BMA; relative
differences of diag H, U, v and the inverse root, and when a sum stops growing.
"""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import bma_optax as bma
from benchmarks.harness.results import machine

METHODS = {
    "AdaGrad-BMA": bma.scale_by_bma(bma.per_unit),
    "Adam-BMA": bma.scale_by_adam_bma(partition=bma.per_unit),
}
CHECKS = 20  # Looks on the way.


def tree(flat: jax.Array, dtype: str) -> Any:
    flat = flat.astype(dtype)
    return {"w": flat[:6].reshape(3, 2), "b": flat[6:]}


@functools.partial(jax.jit, static_argnames=("name", "count"))
def advance(states, key, name, count):
    """Both precisions through the same gradients, float32 to begin with."""
    tx = METHODS[name]

    def step(states, key):
        flat = jax.random.normal(key, (8,), "float32") + 0.5
        new = {t: tx.update(tree(flat, t), states[t])[1] for t in states}
        return new, None

    return jax.lax.scan(step, states, jax.random.split(key, count))[0]


def drift(states: dict[str, Any]) -> dict[str, float]:
    """The largest relative difference of each statistic."""
    result = {}
    for field in ("sum_of_squares", "nu", "U", "v", "inverse_root"):
        if hasattr(states["float32"], field):
            pair = (jax.tree.leaves(getattr(states[t], field)) for t in states)
            result[field] = max(
                float(np.abs(x - y).max() / np.abs(y).max())
                for x, y in zip(*(map(np.float64, x) for x in pair), strict=True)
            )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).parent / "results" / "long_run.json"
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    if options.steps < CHECKS:
        parser.error(f"--steps must be at least {CHECKS}")
    jax.config.update("jax_enable_x64", True)
    content = {**machine(jax, optax, bma), "steps": options.steps, "methods": {}}
    print("| method | steps | diag H | U | v | inverse root |\n|--|--|--|--|--|--|")
    with tqdm(total=len(METHODS) * CHECKS, unit="look", disable=None) as bar:
        for name, tx in METHODS.items():
            zeros = jnp.zeros(8)
            states = {t: tx.init(tree(zeros, t)) for t in ("float32", "float64")}
            rows = content["methods"][name] = {}
            for look in range(1, CHECKS + 1):
                count = options.steps // CHECKS
                states = advance(states, jax.random.key(look), name, count)
                rows[look * count] = drift(states)
                bar.update()
            last = drift(states)
            cells = [last.get(k, last.get("nu")) for k in ("sum_of_squares", "U")]
            cells += [last.get("v"), last["inverse_root"]]
            shown = ["" if x is None else f"{x:.1e}" for x in cells]
            bar.write(f"| {name} | {look * count:,} | {' | '.join(shown)} |")
    still = 2 ** next(n for n in range(64) if np.float32(2**n) + 1 == np.float32(2**n))
    print(f"\nAfter {still:,} gradients of one size diag H in float32 stands still.")
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"Wrote {options.out}")


if __name__ == "__main__":
    main()
