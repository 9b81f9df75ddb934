"""What an application of C costs, in products with the operator.

    taskset -c 0 python -m benchmarks.grids.prices

For operators of the gallery, in float64: the seconds of a product and of C with each
rule, in turns, on one core. A step of conjugate gradients takes one of each. Products
are written as a user might, by shifts of the whole field.
"""

import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bma_optax as bma
from benchmarks.grids.operators import OPERATORS
from benchmarks.harness.results import Parser, Results, positive
from benchmarks.harness.tables import table
from benchmarks.harness.timing import clock, in_turns, summary

# What tells the kinds apart: fields, the reach, and the points of the stencil.
KINDS = {
    "at pi/4, 0.01": "diffusion at an angle, 9 points",
    "thin plate": "thin plate, 25 points",
    "elasticity, ν = 0.3": "elasticity, 2 fields",
}
RULES = {
    "tiles of 4 × 4": ((4, 4), False),
    "with slopes": ((4, 4), True),
    "tiles of 4 × 1": ((4, 1), False),
}


def measure(name: str, n: int, rounds: int) -> dict[str, Any]:
    """The seconds of a product, and of C with each rule."""
    operator = OPERATORS[name](n)
    arrays = jax.tree.map(jnp.asarray, operator.arrays)
    A = functools.partial(operator.product, arrays)
    x = jnp.asarray(np.random.default_rng(0).standard_normal(operator.shape))
    applied = {"product": functools.partial(jax.jit(operator.product), arrays)}
    for label, (tile, slopes) in RULES.items():
        rule = bma.per_tile(tile, reach=operator.reach, slopes=slopes)
        C = jax.jit(functools.partial(bma.preconditioner, A, partition=rule))(x)
        applied[label] = functools.partial(jax.jit(lambda C, x: C(x)), C)
    for function in applied.values():
        jax.block_until_ready(function(x))
    seconds = in_turns(
        {k: lambda _, f=f: clock(f, x)[1] for k, f in applied.items()}, rounds
    )
    ratios = {
        k: statistics.median(np.divide(seconds[k], seconds["product"])) for k in RULES
    }
    return {k: summary(v) for k, v in seconds.items()} | {"ratios": ratios}


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("benchmarks.grids.prices", __doc__)
    parser.add_argument("--size", type=positive, default=256)
    parser.add_argument("--rounds", type=positive, default=200)
    parser.add_argument("--operators", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse(arguments)
    shared = {"size": options.size, "rounds": options.rounds}
    results = Results(options, shared, jax, optax, bma)
    with jax.enable_x64(True):
        for name in options.operators:
            cell = functools.partial(measure, name, options.size, options.rounds)
            print(name, results.cell(cell, "operators", name), flush=True)
    print(report(results.content))
    results.finish()


def report(content: dict[str, Any]) -> str:
    """A row an operator: milliseconds of a product, and what C costs in products."""
    rows = [
        [
            KINDS[name],
            f"{1e3 * found['product']['seconds']:.2g} ms",
            *(f"{found['ratios'][k]:.2g}" for k in RULES),
        ]
        for name, found in content["operators"].items()
    ]
    return table(["operator", "a product", *RULES], rows)


if __name__ == "__main__":
    main()
