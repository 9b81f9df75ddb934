"""Newton-BMA where parameters have neighbours, against Optax and experts' tools.

    python -m benchmarks.grids
    python -m benchmarks.grids --sizes 512 1024 --max-steps 5000

Seconds until the loss is within 1e-6 of the starting gap f(x0) - f*, set-up included,
compilation apart, in float64. Newton-BMA, L-BFGS and conjugate gradients run as they
come; the rates and momentum of the others are tuned on another instance, on a grid
that grows until the best point is inside. Experts' tools are given the assembled
matrix; PyAMG takes part if it is installed. What does not get there on a grid is left
out on finer ones. A photograph of which much is seen, deblurring, a spline and the
conductivity of a plate are what Newton-BMA does not suit. The energies of
`benchmarks.grids.energies` are others that people minimise.
"""

import functools
import itertools
from typing import Any

import jax

from benchmarks.grids import pictures, problems, unsuited
from benchmarks.grids.energies import ENERGIES
from benchmarks.harness.peers import PEERS, heavy_ball, newton_bma
from benchmarks.harness.race import Race, Starts, begin, report, summary
from benchmarks.harness.results import Parser, positive
from benchmarks.harness.solver import Method, Problem, from_optax

OTHERS = {
    "photo": problems.photo,
    "plasma": problems.plasma,
    "gridding_1310": problems.gridding,
    "gridding_327": functools.partial(problems.gridding, percent=0.5),
    "gridding_81": functools.partial(problems.gridding, percent=0.125),
    "deblur": unsuited.deblur,
    "spline": unsuited.spline,
    "heat": unsuited.heat,
} | ENERGIES


METHODS = {
    "newton_bma": Method(from_optax(newton_bma)),
    "bma_heavy_ball": Method(
        from_optax(lambda p: heavy_ball(p.partition, p.update_interval)),
        suits=lambda problem: problem.quadratic,
    ),
} | PEERS


def scaled(results: dict[str, Any], factor: float) -> Starts:
    """Where tuning starts on a grid so much finer; None for what has no hope there."""
    starts: Starts = {}
    for name, row in results["methods"].items():
        settings = tuple(row["settings"].values())
        if not row["reached"]:
            starts[name] = None
        elif settings:  # Momentum closes in on 1 as the root of the condition grows.
            starts[name] = settings[0], *(x / factor for x in settings[1:])
    return starts


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("benchmarks.grids", __doc__)
    add = parser.add_argument
    add("--sizes", type=positive, nargs="*", default=[64, 256, 512])
    add("--volume-sizes", type=positive, nargs="*", default=[32, 64])
    add("--problems", nargs="*", choices=list(OTHERS), default=list(OTHERS))
    methods = [*METHODS, "direct", "pyamg"]
    options, results = begin(parser, arguments, methods, max_steps=2000)
    jax.config.update("jax_enable_x64", True)

    def race(problem: Problem, starts: Starts) -> dict[str, Any]:
        def measure():
            return Race(problem, METHODS, options, starts).run()

        found = results.cell(measure, "problems", problem.name)
        print(report(problem.name, found), flush=True)
        return found

    for sizes, dimensions in ((options.sizes, 2), (options.volume_sizes, 3)):
        starts: Starts = {}
        for size, following in itertools.zip_longest(sizes, sizes[1:]):
            found = race(problems.paint(size, dimensions), starts)
            if following:
                starts |= scaled(found, following / size)
    for name in options.problems:
        race(OTHERS[name](), {})
    every = results.content["problems"]
    others = {name: every[name] for name in OTHERS if name in every}
    scaling = {name: x for name, x in every.items() if name not in OTHERS}
    print("\n## Seconds (steps) to 1e-6 of the starting gap")
    for found in filter(None, (scaling, others)):
        print(f"\n{summary(found)}")
    results.finish()
    pictures.draw(scaling, others, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
