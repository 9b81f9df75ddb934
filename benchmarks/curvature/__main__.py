"""Newton-BMA on problems without locality, against the solvers one would use there.

    python -m benchmarks.curvature
    python -m benchmarks.curvature --problems softmax --methods newton_bma_finer lbfgs

Full batches of scikit-learn's data, in float64. For each method: steps, products with
the curvature, and seconds until the loss is low enough, compilation apart. Convex
problems end at 1e-6 of the starting gap f(x0) - f*, the others at a fixed loss. The
rates and momentum of Adam and SGD are tuned on another instance (the other half of the
examples, another start); the other methods run as they come.
"""

import functools

import jax
import optax

import bma_optax as bma
from benchmarks.curvature.problems import PROBLEMS, Problem
from benchmarks.harness.peers import NO_BLOCKS, PEERS, newton_bma
from benchmarks.harness.race import Race, begin, report
from benchmarks.harness.results import Parser
from benchmarks.harness.solver import Method, from_optax


def natural_bma(problem: Problem) -> optax.GradientTransformation:
    more = {"update_interval": problem.update_interval}
    return bma.natural_bma(problem.fisher, problem.partition, **more)


RULES = {"per_leaf": bma.per_leaf, "finer": None, "diagonal": NO_BLOCKS}
METHODS = {
    f"newton_bma_{name}": Method(from_optax(functools.partial(newton_bma, rule=rule)))
    for name, rule in RULES.items()
}
METHODS["natural_bma"] = Method(
    from_optax(natural_bma), suits=lambda problem: problem.fisher is not None
)
METHODS |= {name: PEERS[name] for name in ("lbfgs", "newton_cg", "adam", "sgd")}


def main(arguments: list[str] | None = None) -> None:
    parser, every = Parser("benchmarks.curvature", __doc__), list(PROBLEMS)
    parser.add_argument("--problems", nargs="+", choices=every, default=every)
    options, results = begin(parser, arguments, METHODS, max_steps=5000)
    with jax.enable_x64(True):
        for name in options.problems:
            runs = functools.partial(Race, PROBLEMS[name], METHODS, options, {})
            found = results.cell(lambda runs=runs: runs().run(), "problems", name)
            print(report(name, found), flush=True)
    results.finish()


if __name__ == "__main__":
    main()
