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
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from tqdm import tqdm

import bma_optax as bma
from benchmarks.curvature.problems import PROBLEMS, Problem
from benchmarks.harness.results import machine

TOLERANCE = 1e-6
FACTOR = 10**0.5  # From one point of a tuning grid to the next.
DIAGONAL = bma.by_function(lambda path, shape: None)


class NewtonCGState(NamedTuple):
    diagonal: bma.ScaleByNewtonBMAState
    products: jax.Array


def newton_cg(curvature: bma.Curvature, update_interval: int):
    """Truncated Newton-CG, with the diagonal that Newton-BMA has and Armijo's rule."""
    diagonal = bma.scale_by_newton_bma(
        DIAGONAL, curvature=curvature, update_interval=update_interval
    )

    def init(params):
        return NewtonCGState(diagonal.init(params), jnp.zeros((), jnp.int32))

    def update(grads, state, params, *, value, grad, value_fn, **extra):
        del grad
        _, scaling = diagonal.update(
            grads, state.diagonal, params, value_fn=value_fn, **extra
        )
        linear = curvature.linearize(params, jax.random.key(0), value_fn, extra)
        g, unravel = ravel_pytree(grads)
        step, products = conjugate_gradients(
            lambda v: ravel_pytree(linear(unravel(v)))[0],
            ravel_pytree(scaling.inverse_diagonal)[0],
            -g,
        )
        slope = 1e-4 * jnp.vdot(g, step)

        def too_long(t):
            trial = optax.tree.add_scale(params, t, unravel(step))
            return (value_fn(trial, **extra) > value + t * slope) & (t > 1e-9)

        t = jax.lax.while_loop(too_long, lambda t: t / 2, jnp.ones_like(value))
        return unravel(t * step), NewtonCGState(scaling, state.products + products)

    return optax.GradientTransformationExtraArgs(init, update)


def conjugate_gradients(product, inverse, b, limit=250):
    """G x = b to min(1/2, sqrt |b|), or as far as G is positive along the way."""
    # JAX's own does not count its products, nor look at the sign of the curvature.
    size = jnp.linalg.norm(b)
    tolerance = jnp.minimum(0.5, jnp.sqrt(size)) * size

    def unfinished(carry):
        _, r, _, count, positive = carry
        return (jnp.linalg.norm(r) > tolerance) & (count < limit) & positive

    def iterate(carry):
        x, r, p, count, _ = carry
        curved = product(p)
        bend, rho = p @ curved, r @ (inverse * r)
        positive = bend > 0
        a = jnp.where(positive, rho / bend, jnp.where(count == 0, 1, 0))
        residual = r - a * curved
        z = inverse * residual
        p = z + (residual @ z) / rho * p
        return x + a * carry[2], residual, p, count + 1, positive

    start = jnp.zeros_like(b), b, inverse * b, jnp.int32(0), jnp.bool_(True)
    x, _, _, count, _ = jax.lax.while_loop(unfinished, iterate, start)
    return x, count


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


class Method(NamedTuple):
    """`make`: a problem and the tuned settings -> an optimiser."""

    make: Callable[..., optax.GradientTransformation]
    tuned: tuple[str, ...] = ()
    start: tuple[float, ...] = ()  # Where tuning starts.


METHODS = {
    "newton_bma_per_leaf": Method(lambda p: newton_bma(p, bma.per_leaf)),
    "newton_bma_finer": Method(lambda p: newton_bma(p, p.finer)),
    "newton_bma_diagonal": Method(lambda p: newton_bma(p, DIAGONAL)),
    "natural_bma": Method(natural_bma),
    "lbfgs": Method(lambda p: optax.lbfgs()),
    "newton_cg": Method(lambda p: newton_cg(p.curvature, p.update_interval)),
    "adam": Method(lambda p, rate: optax.adam(rate), ("rate",), (0.1,)),
    "sgd": Method(
        lambda p, rate, rest: optax.sgd(rate, momentum=1 - rest),
        ("rate", "1 - momentum"),
        (0.1, 0.1),
    ),
}


class Solution(NamedTuple):
    steps: int
    loss: float
    reached: bool
    products: int
    seconds: float


class Solver:
    """A method compiled for a problem; the settings and the instance are arguments."""

    def __init__(self, problem: Problem, method: Method, instance: Any) -> None:
        def solve(settings, params, data, target, budget):
            tx = optax.with_extra_args_support(method.make(problem, *settings))
            state = tx.init(params)
            stored = optax.tree.get(state, "grad") is not None
            evaluate = jax.value_and_grad(problem.loss)
            if stored:
                evaluate = optax.value_and_grad_from_state(problem.loss)

            def step(carry):
                params, state, _, count = carry
                kept = {"state": state} if stored else {}
                value, grads = evaluate(params, data, **kept)
                more = {"value": value, "grad": grads, "data": data}
                updates, state = tx.update(
                    grads, state, params, value_fn=problem.loss, **more
                )
                params = optax.apply_updates(params, updates)
                return params, state, value, count + 1

            # The loss where the last step started: it comes with the gradient, another
            # would cost a pass. What diverged is not above the target either.
            def unfinished(carry):
                return (carry[3] < budget) & (carry[2] > target)

            start = params, state, jnp.array(jnp.inf), jnp.int32(0)
            params, state, value, count = jax.lax.while_loop(unfinished, step, start)
            counts = optax.tree.get_all_with_path(state, "products")
            spent = sum((n for _, n in counts), jnp.int32(0))
            return params, problem.loss(params, data), value, count, spent

        start = time.perf_counter()
        lowered = jax.jit(solve).lower(method.start, *instance, 0.0, 0)
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - start

    def __call__(self, settings, instance, target: float, budget: int) -> Solution:
        start = time.perf_counter()
        result = self.compiled(settings, *instance, float(target), int(budget))
        self.params, loss, value, count, products = jax.block_until_ready(result)
        seconds = time.perf_counter() - start
        earlier, now = bool(value <= target), bool(loss <= target)
        steps = int(count) - earlier
        return Solution(steps, float(loss), earlier or now, int(products), seconds)


def tune(solver: Solver, start: tuple, instance: Any, target: float, budget: int):
    """The best point of a grid that grows until no neighbour of it is better."""
    scores: dict[tuple[int, ...], tuple] = {}

    def score(point):
        if point not in scores:
            settings = tuple(x * FACTOR**k for x, k in zip(start, point, strict=True))
            if any(x > 1 for x in settings[1:]):
                return (np.inf, np.inf)  # A negative momentum.
            best = min(scores.values(), default=(np.inf,))[0]
            limit = budget if best == np.inf else best
            found = solver(settings, instance, target, limit)
            loss = found.loss if np.isfinite(found.loss) else np.inf
            # If all diverge, the least rate is the way to go.
            steps = found.steps if found.reached else np.inf
            scores[point] = (steps, loss, settings)
        return scores[point]

    best = (0,) * len(start)
    while True:
        around = itertools.product(*[(k, k - 1, k + 1) for k in best])
        nearest = min(around, key=score)
        if nearest == best:
            return scores[best][2], len(scores)
        best = nearest


def optimum(problem: Problem, solver: Solver, instance: Any) -> dict[str, Any]:
    """f* by a long run of L-BFGS, and a bound on its error by strong convexity."""
    value, bound = problem.level, None
    if value is None:
        value = solver((), instance, -np.inf, 1000).loss
    if problem.convexity is not None:
        gradient = jax.grad(problem.loss)(solver.params, instance[1])
        bound = float(optax.tree.norm(gradient, squared=True)) / 2 / problem.convexity
    start = float(problem.loss(*instance))
    gap = 0 if problem.level else TOLERANCE * (start - value)
    return {
        "start": start,
        "optimum": value,
        "error_bound": bound,
        "target": value + gap,
    }


def study(problem: Problem, methods: list[str], options: Any, bar: tqdm):
    """All methods on one problem, their timings interleaved."""
    reported, other = (jax.tree.map(jnp.asarray, problem.make(seed)) for seed in (0, 1))
    solver = functools.cache(lambda name: Solver(problem, METHODS[name], reported))
    goal, tuning_goal = (
        optimum(problem, solver("lbfgs"), instance) for instance in (reported, other)
    )
    rows = {}
    for name in methods:
        settings, runs = (), 0
        if METHODS[name].tuned:
            settings, runs = tune(
                solver(name),
                METHODS[name].start,
                other,
                tuning_goal["target"],
                options.max_steps,
            )
        found = solver(name)(settings, reported, goal["target"], options.max_steps)
        rows[name] = found._asdict() | {
            "seconds": [] if found.reached else [found.seconds],
            "compile_seconds": solver(name).compile_seconds,
            "settings": dict(zip(METHODS[name].tuned, settings, strict=True)),
            "tuning_runs": runs,
        }
        bar.update()
    for _, (name, row) in itertools.product(range(options.repeats), rows.items()):
        if row["reached"]:
            # So many steps and no look at the target: the last one counts in full.
            settings = tuple(row["settings"].values())
            again = solver(name)(settings, reported, -np.inf, row["steps"])
            row |= {"products": again.products, "loss": again.loss}
            row["seconds"].append(again.seconds)
        bar.update()
    for row in rows.values():
        gap = (row["loss"] - goal["optimum"]) / (goal["start"] - goal["optimum"])
        row["gap"] = gap if np.isfinite(gap) else None
        row["loss"] = row["loss"] if np.isfinite(gap) else None
    return goal | {
        "parameters": optax.tree.size(reported[0]),
        "finer": repr(problem.finer),
        "update_interval": problem.update_interval,
        "methods": rows,
    }


def table(name: str, result: dict[str, Any]) -> str:
    lines = [
        f"\n### {name}: {result['parameters']} parameters, from a loss of "
        f"{result['start']:.6g} to {result['target']:.6g}\n",
        "| method | settings | steps | products | seconds | seconds to compile |",
        "|---|---|---|---|---|---|",
    ]
    for method, row in result["methods"].items():
        label = method.replace("finer", result["finer"])
        settings = ", ".join(f"{k} {x:.2g}" for k, x in row["settings"].items())
        seconds = row["seconds"]
        steps, cell = row["steps"], f"{statistics.median(seconds):.3g}"
        if row["reached"]:
            cell += f" ({min(seconds):.3g} to {max(seconds):.3g})"
        else:
            gap = "diverged" if row["gap"] is None else f"gap {row['gap']:.1e}"
            steps, cell = f"not reached in {steps}: {gap}", f"({cell})"
        compile_seconds = f"{row['compile_seconds']:.2g}"
        cells = [label, settings, steps, row["products"], cell, compile_seconds]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    add("--repeats", type=int, default=5)
    add("--max-steps", type=int, default=5000)
    add("--output-dir", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    if min(options.repeats, options.max_steps) < 1:
        parser.error("every number must be positive")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    results = {}
    with jax.enable_x64(True):
        for name in options.problems:
            problem = PROBLEMS[name]
            methods = [
                m for m in options.methods if m != "natural_bma" or problem.fisher
            ]
            runs = len(methods) * (1 + options.repeats)
            with tqdm(total=runs, desc=name, unit="run", leave=False) as bar:
                results[name] = study(problem, methods, options, bar)
            print(table(name, results[name]), flush=True)
    content = {
        "options": {"repeats": options.repeats, "max_steps": options.max_steps},
        **machine(jax, optax, np, bma),
        "problems": results,
    }
    path = options.output_dir / "curvature.json"
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    print(f"\nWrote {path}")


if __name__ == "__main__":
    main()
