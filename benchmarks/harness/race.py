"""Seconds until a loss is low enough: one instance, many methods, whole batches.

A run ends at 1e-6 of the starting gap f(x0) - f*, or at a fixed loss. Set-up counts,
compilation does not. Rates are tuned on another instance, and lowered where they
diverge on the reported one. The steps to the target are counted once, and timed again
by programs that do not look at the target.
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bma_optax as bma
from benchmarks.harness.peers import PEERS
from benchmarks.harness.results import Parser, Results, positive
from benchmarks.harness.solver import (
    Method,
    Problem,
    Solver,
    as_floats,
    exact_loss,
)
from benchmarks.harness.tables import middle, table
from benchmarks.harness.timing import clock, in_turns
from benchmarks.harness.tuning import descend

TOLERANCE = 1e-6
PATIENCE = 8.0  # Seconds: no method is repeated beyond.
MOST = 50  # Iterations of an expert's tool.
Starts = dict[str, tuple[float, ...] | None]  # By method.


def begin(
    parser: Parser, arguments: list[str] | None, methods: Iterable[str], max_steps: int
) -> tuple[argparse.Namespace, Results]:
    """The options of a study of races, and its results, a cell a problem."""
    add, every = parser.add_argument, list(methods)
    add("--methods", nargs="+", choices=every, default=every)
    add("--repeats", type=positive, default=5)
    add("--max-steps", type=positive, default=max_steps)
    add("--float32", action="store_true", help="the goal is still told in float64")
    options = parser.parse(arguments)
    shared = {"repeats": options.repeats, "max_steps": options.max_steps}
    shared |= {"dtype": "float32"} if options.float32 else {}
    return options, Results(options, shared, jax, optax, np, bma)


class Race:
    """Methods and experts' tools on one problem: tuned, counted, timed in turns.

    Args:
      problem: what they minimise.
      methods: by name; those that are chosen and suit the problem take part.
      options: the names of the chosen `methods`, `max_steps` and `repeats` of each.
      starts: known from a problem of the same kind, where tuning starts instead, with
        the finest stride alone. A method that starts from None takes no part.
    """

    def __init__(
        self,
        problem: Problem,
        methods: dict[str, Method],
        options: argparse.Namespace,
        starts: Starts,
    ) -> None:
        self.problem, self.options, self.starts = problem, options, starts
        self.methods = {
            name: method
            for name, method in methods.items()
            if name in options.methods and method.suits(problem)
            if starts.get(name, ()) is not None
        }
        self.experts = [name for name in problem.experts if name in options.methods]
        dtype = jnp.float32 if options.float32 else jnp.float64
        self.instance, self.other = (
            as_floats(problem.make(seed), dtype) for seed in (0, 1)
        )
        self.goal, self.other_goal = map(self.goal_of, (self.instance, self.other))
        self.solver = functools.cache(
            lambda name: Solver(problem, self.methods[name], self.instance)
        )

    def goal_of(self, instance: Any) -> dict[str, float]:
        """f* directly, or by conjugate gradients until the loss stays."""
        problem, instance = self.problem, as_floats(instance, jnp.float64)
        params, data = instance
        start, best = float(problem.loss(params, data)), problem.level
        if best is not None:
            return {"start": start, "optimum": best, "target": best}
        if "direct" in problem.experts:
            best = self.loss_of(self.expert_on("direct", data)(1), instance)
        else:
            method = PEERS["cg" if problem.quadratic else "newton_cg"]
            solver, best, gained = Solver(problem, method, instance), start, True
            while gained:
                found = solver((), (params, data), 50)
                gained = found.loss < best - 1e-12 * (start - best)
                best, params = min(best, found.loss), found.params
        target = best + TOLERANCE * (start - best)
        return {"start": start, "optimum": best, "target": target}

    def expert_on(self, name: str, data: Any) -> Callable[[int], np.ndarray]:
        return self.problem.experts[name][1](jax.tree.map(np.asarray, data))

    def loss_of(self, solution: np.ndarray, instance: Any) -> float:
        params, data = instance
        return float(exact_loss(self.problem, solution.reshape(params.shape), data))

    def run(self) -> dict[str, Any]:
        """The goal and `methods`, a row each."""
        rows, timed = {}, {}
        for name in self.methods:
            rows[name], timed[name] = self.method(name)
        for name in self.experts:
            rows[name], timed[name] = self.expert(name)
        timed = {name: measure for name, measure in timed.items() if measure}
        for name, seconds in in_turns(timed, self.options.repeats, PATIENCE).items():
            rows[name]["seconds"] = seconds
        span = self.goal["start"] - self.goal["optimum"]
        for row in rows.values():
            row["gap"] = (row.pop("loss") - self.goal["optimum"]) / span
        return self.goal | {
            "title": self.problem.title,
            "parameters": optax.tree.size(self.instance[0]),
            "partition": repr(self.problem.partition),
            "update_interval": self.problem.update_interval,
            "methods": rows,
        }

    def method(self, name: str) -> tuple[dict[str, Any], Callable | None]:
        """A row, with the steps to the target; and what is timed, if it gets there."""
        tuned, solver = self.methods[name].tuned, self.solver(name)
        settings, runs = self.tune(name) if tuned else ((), 0)
        most, target = self.options.max_steps, self.goal["target"]
        found = solver(settings, self.instance, most, target)
        while tuned and not np.isfinite(found.loss):  # Too near the edge for this one.
            settings = settings[0] / 2**0.5, *settings[1:]
            found = solver(settings, self.instance, most, target)
        row = {
            "settings": dict(zip(tuned, settings, strict=True)),
            "tuning_runs": runs,
            "steps": found.steps,
            "reached": found.reached,
            "seconds": [found.seconds],
        }
        if found.reached:  # Those steps again, without a look at the target.
            found = solver(settings, self.instance, row["steps"])
        row |= {"loss": found.loss, "products": found.products}
        row["compile_seconds"] = solver.compile_seconds
        if not row["reached"]:
            return row, None
        return row, lambda _: solver(settings, self.instance, row["steps"]).seconds

    def tune(self, name: str) -> tuple[tuple[float, ...], int]:
        start, strides = self.methods[name].start, self.methods[name].strides
        if name in self.starts:
            start, strides = self.starts[name], strides[-1:]

        def score(settings, best):
            if any(x > 1 for x in settings[1:]):
                return np.inf, np.inf, settings[0]  # A negative momentum.
            most = min(best[0] if best else np.inf, self.options.max_steps)
            target = self.other_goal["target"]
            found = self.solver(name)(settings, self.other, most, target)
            steps = found.steps if found.reached else np.inf
            loss = found.loss if np.isfinite(found.loss) else np.inf
            # If all diverge, the least rate is the way to go.
            return steps, loss, settings[0]

        return descend(score, start, strides)

    def expert(self, name: str) -> tuple[dict[str, Any], Callable]:
        """A row, with the iterations to the target; and what is timed."""
        solve, target = self.expert_on(name, self.instance[1]), self.goal["target"]
        steps, loss = 0, np.inf
        while loss > target and steps < MOST:
            steps += 1
            loss = self.loss_of(solve(steps), self.instance)
        row = {"label": self.problem.experts[name][0], "settings": {}, "loss": loss}
        row |= {"steps": steps, "reached": loss <= target, "compile_seconds": None}
        return row, lambda _: clock(solve, steps)[1]


def report(name: str, result: dict[str, Any]) -> str:
    """Every method on one problem, losing rows too."""
    rows = []
    for method, row in result["methods"].items():
        steps, cell = row["steps"], middle(row["seconds"])
        if not row["reached"]:
            gap = "diverged" if row["gap"] is None else f"gap {row['gap']:.1e}"
            steps, cell = f"not reached in {steps}: {gap}", f"({cell})"
        compile_seconds = row["compile_seconds"]
        rows.append(
            [
                row.get("label", method),
                ", ".join(f"{k} {x:.2g}" for k, x in row["settings"].items()),
                steps,
                row.get("products") or "",
                cell,
                "" if compile_seconds is None else f"{compile_seconds:.2g}",
            ]
        )
    columns = "method settings steps products seconds".split()
    head = (
        f"\n### {name}: {result['title']}, {result['parameters']} parameters, from a "
        f"loss of {result['start']:.6g} to {result['target']:.6g}\n"
    )
    return f"{head}\n{table([*columns, 'seconds to compile'], rows)}"


def summary(results: dict[str, Any]) -> str:
    """Median seconds of every method on every problem, and the steps."""

    def cell(row: dict[str, Any] | None) -> str:
        if row is None:
            return "-"
        if not row["reached"]:
            return "not reached"
        steps = f" ({row['steps']})" if row["steps"] else ""
        return f"{statistics.median(row['seconds']):.3g}{steps}"

    names = dict.fromkeys(m for result in results.values() for m in result["methods"])
    found = [result["methods"] for result in results.values()]
    rows = [[name, *(cell(methods.get(name)) for methods in found)] for name in names]
    return table(["method", *results], rows)
