"""A million steps in float32 beside float64: how far the running sums drift.

    python -m benchmarks.costs.long_run
    python -m benchmarks.costs.long_run --steps 100000000

The same gradients, of one size throughout, for AdaGrad-BMA and Adam-BMA; relative
differences of diag H, U, v and the inverse root, and when a sum stops growing.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bma_optax as bma
from benchmarks.harness.results import Parser, Results, positive
from benchmarks.harness.tables import table

METHODS = {
    "AdaGrad-BMA": bma.scale_by_bma(bma.per_unit),
    "Adam-BMA": bma.scale_by_adam_bma(partition=bma.per_unit),
}
TYPES = "float32", "float64"
FIELDS = {"sum_of_squares": "diag H", "nu": "diag H", "U": "U", "v": "v"}
FIELDS |= {"inverse_root": "inverse root"}
MOST = 1_000_000  # Steps of one call.


def tree(flat: jax.Array, dtype: str) -> Any:
    flat = flat.astype(dtype)
    return {"w": flat[:6].reshape(3, 2), "b": flat[6:]}


def drift(name: str, steps: int) -> dict[str, float]:
    """The largest relative difference of each statistic, after the same gradients."""
    tx = METHODS[name]

    def step(states, key):
        flat = jax.random.normal(key, (8,), "float32") + 0.5
        return {t: tx.update(tree(flat, t), states[t])[1] for t in TYPES}, None

    advance = jax.jit(lambda states, keys: jax.lax.scan(step, states, keys)[0])
    states = {t: tx.init(tree(jnp.zeros(8), t)) for t in TYPES}
    for i in range(0, steps, MOST):
        keys = jax.random.split(jax.random.key(i), min(MOST, steps - i))
        states = advance(states, keys)
    result = {}
    for field in set(FIELDS) & set(states["float32"]._fields):
        pair = (jax.tree.leaves(getattr(states[t], field)) for t in TYPES)
        result[FIELDS[field]] = max(
            float(np.abs(x - y).max() / np.abs(y).max())
            for x, y in zip(*(map(np.float64, x) for x in pair), strict=True)
        )
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("benchmarks.costs.long_run", __doc__)
    parser.add_argument("--steps", type=positive, default=1_000_000)
    options = parser.parse(arguments)
    columns, rows = list(dict.fromkeys(FIELDS.values())), []
    with jax.enable_x64(True):
        results = Results(options, {"steps": options.steps}, jax, optax, bma)
        for name in METHODS:
            measure = functools.partial(drift, name, options.steps)
            found = results.cell(measure, "methods", name)
            cells = (f"{found[x]:.1e}" if x in found else "" for x in columns)
            rows.append([name, *cells])
    print(table([f"after {options.steps:,} steps", *columns], rows))
    still = 2 ** next(n for n in range(64) if np.float32(2**n) + 1 == np.float32(2**n))
    print(f"\nAfter {still:,} gradients of one size diag H in float32 stands still.")
    results.finish()


if __name__ == "__main__":
    main()
