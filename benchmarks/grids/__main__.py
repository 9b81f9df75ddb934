"""Newton-BMA where parameters have neighbours, against Optax and experts' tools.

    python -m benchmarks.grids
    python -m benchmarks.grids --sizes 512 1024 --max-steps 5000

Seconds until the loss is within 1e-6 of the starting gap f(x0) - f*, set-up included,
compilation apart, in float64. Newton-BMA, L-BFGS and conjugate gradients run as they
come; the rates and momentum of the others are tuned on another instance, on a grid
that grows until the best point is inside. Experts' tools are given the assembled
matrix. What does not get there on a grid is left out on finer ones. Total variation,
deblurring, tomography, splines and the conductivity of a plate are what Newton-BMA
does not suit.
"""

import argparse
import functools
import itertools
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

import bma_optax as bma
from benchmarks.grids import hard_problems, pictures, problems
from benchmarks.grids.methods import EXPERTS, METHODS, experts, find_goal, methods_of
from benchmarks.harness.race import Race, report, summary
from benchmarks.harness.results import Parser, Results, positive

REAL = {
    "terrain": problems.terrain,
    "photo": problems.photo,
    "plasma": problems.plasma,
    "total_variation": hard_problems.total_variation,
    "deblur": hard_problems.deblur,
    "tomography": hard_problems.tomography,
    "spline": hard_problems.spline,
    "heat": hard_problems.heat,
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    every = [*METHODS, *EXPERTS]
    parser = Parser("benchmarks.grids", __doc__)
    add = parser.add_argument
    add("--sizes", type=positive, nargs="*", default=[64, 256, 512])
    add("--volume-sizes", type=positive, nargs="*", default=[32, 64])
    add("--problems", nargs="*", choices=list(REAL), default=list(REAL))
    add("--methods", nargs="+", choices=every, default=every)
    add("--repeats", type=positive, default=3)
    add("--max-steps", type=positive, default=2000)
    return parser.parse(arguments)


def study(
    problem: problems.Problem, options: Any, starts: dict[str, tuple | None]
) -> dict[str, Any]:
    """All methods that suit a problem, but those without hope."""
    methods = methods_of(problem, options.methods)
    methods = {k: m for k, m in methods.items() if starts.get(k, ()) is not None}
    race = Race(problem, methods, find_goal, options.max_steps, starts)
    result = race.run(
        options.repeats, functools.partial(experts, chosen=options.methods)
    )
    if problem.name in REAL:
        pictures.add_curves(race)
    return result | {
        "title": problem.title,
        "partition": repr(problem.partition),
        "update_interval": problem.update_interval,
    }


def scaled(results: dict[str, Any], factor: float) -> dict[str, tuple | None]:
    """Where tuning starts on a grid so much finer; None for what has no hope there."""
    starts: dict[str, tuple | None] = {}
    for name, row in results["methods"].items():
        settings = tuple(row["settings"].values())
        if not row["reached"]:
            starts[name] = None
        elif settings:  # Momentum closes in on 1 as the root of the condition grows.
            starts[name] = settings[0], *(x / factor for x in settings[1:])
    return starts


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    jax.config.update("jax_enable_x64", True)
    shared = {"repeats": options.repeats, "max_steps": options.max_steps}
    results = Results(options, shared, jax, optax, np, bma)
    total = len(options.sizes) + len(options.volume_sizes) + len(options.problems)
    with tqdm(total=total, unit="problem", disable=None) as bar:

        def one(problem, starts):
            bar.set_description(problem.name)
            key = "problems", problem.name
            found = results.cell(lambda: study(problem, options, starts), *key)
            bar.write(report(problem.name, found))
            bar.update()
            return found

        for sizes, dimensions in ((options.sizes, 2), (options.volume_sizes, 3)):
            starts: dict[str, tuple | None] = {}
            for size, following in itertools.zip_longest(sizes, sizes[1:]):
                found = one(problems.paint(size, dimensions), starts)
                if following:
                    starts |= scaled(found, following / size)
        for name in options.problems:
            one(REAL[name](), {})
    found = results.content["problems"]
    for title, names in (
        ("Scaling", [name for name in found if name not in REAL]),
        ("Real data", [name for name in found if name in REAL]),
    ):
        if names:
            print(summary(title, {name: found[name] for name in names}))
    results.finish()
    shown = {name: found[name] for name in REAL if name in found}
    if shown:
        made = [REAL[name]() for name in shown]
        pictures.draw(made, shown, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
