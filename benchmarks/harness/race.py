"""Seconds until a loss is low enough: one instance, many methods, whole batches.

A run ends at 1e-6 of the starting gap f(x0) - f*, or at a fixed loss. Set-up counts,
compilation does not. Rates are tuned on another instance; the steps to the target are
then counted once, and timed again by programs that do not look at the target.
"""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.harness.solver import Method, Solution, Solver
from benchmarks.harness.tables import middle, table
from benchmarks.harness.timing import in_turns
from benchmarks.harness.tuning import descend

TOLERANCE = 1e-6
PATIENCE = 8.0  # Seconds: no method is repeated beyond.


class Race:
    """Methods on one problem: tuned, counted, then timed in turns.

    Args:
      problem: with `loss(params, data)` and `make(seed) -> (params, data)`; seed 0 is
        reported, seed 1 is what methods are tuned on.
      methods: by name.
      find_goal: this object and an instance -> `start`, `optimum` and `target`.
      max_steps: of every method.
      starts: where tuning starts instead, known from a problem of the same kind, with
        the finest stride alone.
    """

    def __init__(
        self,
        problem: Any,
        methods: dict[str, Method],
        find_goal: Callable[..., dict[str, Any]],
        max_steps: int,
        starts: dict[str, tuple] | None = None,
    ) -> None:
        self.problem, self.methods, self.max_steps = problem, methods, max_steps
        self.find_goal, self.starts = find_goal, starts or {}
        self.instance, self.other = (
            jax.tree.map(jnp.asarray, problem.make(seed)) for seed in (0, 1)
        )
        self.solver = functools.cache(
            lambda name: Solver(problem, methods[name], self.instance)
        )
        self.rows: dict[str, dict[str, Any]] = {}

    @functools.cached_property
    def goal(self) -> dict[str, Any]:
        return self.find_goal(self, self.instance)

    @functools.cached_property
    def tuning_target(self) -> float:
        return self.find_goal(self, self.other)["target"]

    def run(self, repeats: int, experts: Callable[..., dict] | None = None):
        """The goal and `methods`, a row each.

        `experts`: this object -> by name a row and a function that returns seconds.
        """
        for name in self.methods:
            self.rows[name] = self.first(name)
        names = [name for name, row in self.rows.items() if not row["seconds"]]
        timed = {name: self.again(name) for name in names}
        for name, (row, measure) in (experts(self) if experts else {}).items():
            self.rows[name] = row
            if row["reached"]:
                timed[name] = measure
        for name, seconds in in_turns(timed, repeats, PATIENCE).items():
            self.rows[name]["seconds"] = seconds
        span = self.goal["start"] - self.goal["optimum"]
        for row in self.rows.values():
            row["gap"] = (row.pop("loss") - self.goal["optimum"]) / span
        return self.goal | {
            "parameters": optax.tree.size(self.instance[0]),
            "methods": self.rows,
        }

    def first(self, name: str) -> dict[str, Any]:
        """The settings, and the steps to the target."""
        method, solver, settings, runs = self.methods[name], self.solver(name), (), 0
        if method.tuned:
            settings, runs = self.tune(name)
        target = self.goal["target"]
        found = solver.search(settings, self.instance, target, self.max_steps)
        # In vain, or long enough: the search itself is what is timed.
        final = not found.reached or method.needs_loss and found.seconds > PATIENCE
        return {
            "settings": dict(zip(method.tuned, settings, strict=True)),
            "tuning_runs": runs,
            "steps": found.steps,
            "reached": found.reached,
            "products": found.products,
            "seconds": [found.seconds] if final else [],
            "loss": found.loss,
            "compile_seconds": solver.compile_seconds,
        }

    def tune(self, name: str) -> tuple[tuple, int]:
        method, start, strides = (m := self.methods[name]), m.start, m.strides
        if name in self.starts:
            start, strides = self.starts[name], strides[-1:]

        def score(settings, best):
            if any(x > 1 for x in settings[1:]):
                return None  # A negative momentum.
            limit = min(best[0] if best else np.inf, self.max_steps)
            found = self.solver(name).search(
                settings, self.other, self.tuning_target, limit
            )
            steps = found.steps if found.reached else np.inf
            loss = found.loss if np.isfinite(found.loss) else np.inf
            # If all diverge, the least rate is the way to go.
            return steps, loss, settings[0]

        return descend(score, start, strides, method.factor)

    def again(self, name: str) -> Callable[[int], float]:
        """Those steps again, compiled without a look at the target."""
        row = self.rows[name]
        found = self.after(name, row["steps"])
        row |= {"loss": found.loss, "products": found.products}
        row["compile_seconds"] = self.solver(name).compile_seconds
        return lambda _: self.after(name, row["steps"]).seconds

    def after(self, name: str, steps: int) -> Solution:
        settings = tuple(self.rows[name]["settings"].values())
        return self.solver(name).run(settings, self.instance, steps)


def report(name: str, result: dict[str, Any]) -> str:
    """Every method on one problem, losing rows too."""
    rows = []
    for method, row in result["methods"].items():
        steps, seconds = row["steps"], row["seconds"]
        cell = middle(seconds) if seconds else ""
        if not row["reached"]:
            gap = "diverged" if row["gap"] is None else f"gap {row['gap']:.1e}"
            steps, cell = f"not reached in {steps}: {gap}", f"({cell})" if cell else ""
        compile_seconds = row["compile_seconds"]
        rows.append(
            [
                row.get("label", method),
                ", ".join(f"{k} {x:.2g}" for k, x in row["settings"].items()),
                "" if steps is None else steps,
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


def summary(title: str, results: dict[str, Any]) -> str:
    """Median seconds of every method on every problem, and the steps."""
    names = dict.fromkeys(m for result in results.values() for m in result["methods"])
    rows = []
    for method in names:
        cells = []
        for result in results.values():
            row = result["methods"].get(method)
            if row is None:
                cells.append("-")
            elif not row["reached"]:
                cells.append("not reached")
            else:
                steps = f" ({row['steps']})" if row["steps"] else ""
                cells.append(f"{statistics.median(row['seconds']):.3g}{steps}")
        rows.append([method, *cells])
    head = f"\n## {title}: seconds (steps) to 1e-6 of the starting gap\n"
    return f"{head}\n{table(['method', *results], rows)}"
