"""A million steps in float32 beside float64: how far the running sums drift.

    python -m benchmarks.costs.long_run
    python -m benchmarks.costs.long_run --steps 100000000

The same gradients, of one size throughout, for AdaGrad-BMA and Adam-BMA; relative
differences of diag H, U, v and the inverse root, and when a sum stops growing.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import bma_optax as bma
from benchmarks.harness.results import Parser, Results, positive
from benchmarks.harness.tables import table

METHODS = {
    "AdaGrad-BMA": bma.scale_by_bma(bma.per_unit),
    "Adam-BMA": bma.scale_by_adam_bma(partition=bma.per_unit),
}
TYPES = "float32", "float64"
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
        new = {t: tx.update(tree(flat, t), states[t])[1] for t in TYPES}
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


def drifts(name: str, steps: int) -> dict[int, dict[str, float]]:
    """By the number of steps."""
    states = {t: METHODS[name].init(tree(jnp.zeros(8), t)) for t in TYPES}
    rows, count = {}, steps // CHECKS
    for look in range(1, CHECKS + 1):
        states = advance(states, jax.random.key(look), name, count)
        rows[look * count] = drift(states)
    return rows


def main(arguments: list[str] | None = None) -> None:
    out = Path(__file__).parent / "results" / "long_run.json"
    parser = Parser("benchmarks.costs.long_run", __doc__, out)
    parser.add_argument("--steps", type=positive, default=1_000_000)
    options = parser.parse(arguments)
    if options.steps < CHECKS:
        parser.error(f"--steps must be at least {CHECKS}")
    lines = []
    with jax.enable_x64(True):
        results = Results(options, {"steps": options.steps}, jax, optax, bma)
        for name in tqdm(METHODS, unit="method", disable=None):
            found = results.cell(
                lambda n=name: drifts(n, options.steps), "methods", name
            )
            steps, last = list(found.items())[-1]
            h = last.get("sum_of_squares", last.get("nu"))
            cells = [h, last.get("U"), last.get("v"), last["inverse_root"]]
            shown = ["" if x is None else f"{x:.1e}" for x in cells]
            lines.append([name, f"{int(steps):,}", *shown])
    print(table(["method", "steps", "diag H", "U", "v", "inverse root"], lines))
    still = 2 ** next(n for n in range(64) if np.float32(2**n) + 1 == np.float32(2**n))
    print(f"\nAfter {still:,} gradients of one size diag H in float32 stands still.")
    results.finish()


if __name__ == "__main__":
    main()
