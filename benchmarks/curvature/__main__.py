"""Newton-BMA on problems without locality, against the solvers one would use there.

    python -m benchmarks.curvature
    python -m benchmarks.curvature --problems poisson --methods newton_bma_finer lbfgs

Full batches of scikit-learn's data, in float64. For each method: steps, products with
the curvature, and seconds until the loss is low enough, compilation apart. Convex
problems end at 1e-6 of the starting gap f(x0) - f*, the others at a fixed loss. The
rates of Adam and SGD are tuned on another instance (the other half of the examples,
another start); the other methods run as they come.
"""

import argparse
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import bma_optax as bma
from benchmarks.curvature.problems import PROBLEMS, Problem
from benchmarks.harness.race import TOLERANCE, Race, report
from benchmarks.harness.results import Parser, Results, positive
from benchmarks.harness.solver import Method, Solver, from_optax, truncated_newton

DIAGONAL = bma.by_function(lambda path, shape: None)


class NewtonCGState(NamedTuple):
    diagonal: bma.ScaleByNewtonBMAState
    products: jax.Array


def newton_cg(problem: Problem):
    """Truncated Newton-CG, with the diagonal that Newton-BMA has."""
    curvature = problem.curvature
    diagonal = bma.scale_by_newton_bma(
        DIAGONAL, curvature=curvature, update_interval=problem.update_interval
    )

    def init(params):
        return NewtonCGState(diagonal.init(params), jnp.zeros((), jnp.int32))

    def update(grads, state, params, *, value, grad, value_fn, **extra):
        more = {"value_fn": value_fn, **extra}
        _, scaling = diagonal.update(grads, state.diagonal, params, **more)
        new, products = truncated_newton(
            lambda params: value_fn(params, **extra),
            params,
            value,
            grads,
            curvature.linearize(params, jax.random.key(0), value_fn, extra),
            scaling.inverse_diagonal,
            limit=250,
        )
        change = optax.tree.sub(new, params)
        return change, NewtonCGState(scaling, state.products + products)

    return optax.GradientTransformationExtraArgs(init, update)


def newton_bma(problem: Problem, rule: bma.Rule):
    return bma.newton_bma(
        partition=rule,
        curvature=problem.curvature,
        update_interval=problem.update_interval,
    )


def natural_bma(problem: Problem):
    return bma.natural_bma(
        problem.fisher,
        partition=problem.finer,
        update_interval=problem.update_interval,
    )


def tuned(make, names: tuple[str, ...], start: tuple[float, ...]) -> Method:
    return Method(from_optax(make), names, start, strides=(1,), factor=10**0.5)


METHODS = {
    "newton_bma_per_leaf": Method(from_optax(lambda p: newton_bma(p, bma.per_leaf))),
    "newton_bma_finer": Method(from_optax(lambda p: newton_bma(p, p.finer))),
    "newton_bma_diagonal": Method(from_optax(lambda p: newton_bma(p, DIAGONAL))),
    "natural_bma": Method(from_optax(natural_bma)),
    "lbfgs": Method(from_optax(lambda p: optax.lbfgs()), needs_loss=True),
    "newton_cg": Method(from_optax(newton_cg), needs_loss=True),
    "adam": tuned(lambda p, rate: optax.adam(rate), ("rate",), (0.1,)),
    "sgd": tuned(
        lambda p, rate, rest: optax.sgd(rate, momentum=1 - rest),
        ("rate", "1 - momentum"),
        (0.1, 0.1),
    ),
}


def find_goal(race: Race, instance: Any) -> dict[str, Any]:
    """f* by a long run of L-BFGS, and a bound on its error by strong convexity."""
    problem, bound = race.problem, None
    start = float(problem.loss(*instance))
    if problem.level is not None:
        return {
            "start": start,
            "optimum": problem.level,
            "error_bound": None,
            "target": problem.level,
        }
    found = Solver(problem, METHODS["lbfgs"], instance).search(
        (), instance, -np.inf, 1000
    )
    if problem.convexity is not None:
        gradient = jax.grad(problem.loss)(found.params, instance[1])
        bound = float(optax.tree.norm(gradient, squared=True)) / 2 / problem.convexity
    return {
        "start": start,
        "optimum": found.loss,
        "error_bound": bound,
        "target": found.loss + TOLERANCE * (start - found.loss),
    }


def study(name: str, options: argparse.Namespace) -> dict[str, Any]:
    problem = PROBLEMS[name]
    methods = {
        method: METHODS[method]
        for method in options.methods
        if method != "natural_bma" or problem.fisher
    }
    result = Race(problem, methods, find_goal, options.max_steps).run(options.repeats)
    return result | {
        "title": name,
        "finer": repr(problem.finer),
        "update_interval": problem.update_interval,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("benchmarks.curvature", __doc__)
    add = parser.add_argument
    add("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    add("--repeats", type=positive, default=5)
    add("--max-steps", type=positive, default=5000)
    options = parser.parse(arguments)
    shared = {"repeats": options.repeats, "max_steps": options.max_steps}
    results = Results(options, shared, jax, optax, np, bma)
    with jax.enable_x64(True):
        for name in tqdm(options.problems, unit="problem", disable=None):
            found = results.cell(
                lambda name=name: study(name, options), "problems", name
            )
            tqdm.write(report(name, found))
    results.finish()


if __name__ == "__main__":
    main()
