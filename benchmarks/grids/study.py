"""How inverse_problems.py measures: compiled runs, tuning, all methods in turns."""

import functools
import itertools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks.grids.methods import (
    METHODS,
    Method,
    algebraic_multigrid,
    methods_of,
    pyamg,
)
from benchmarks.grids.problems import Problem

TOLERANCE = 1e-6
PATIENCE = 8.0  # Seconds: no method is repeated beyond.


class Solution(NamedTuple):
    steps: int
    loss: float
    reached: bool
    seconds: float
    params: Any


class Solver:
    """A method compiled for a problem; the settings and the instance are arguments."""

    def __init__(self, problem: Problem, method: Method, instance: Any) -> None:
        def search(settings, params, data, target, budget):
            init, step = method.make(problem, data, *settings)

            # The loss where the last step started: it comes with the gradient, another
            # would cost a pass. What diverged is not above the target either.
            def unfinished(loop):
                return (loop[1] < budget) & (loop[0].value > target)

            def advance(loop):
                return step(loop[0]), loop[1] + 1

            start = init(params), jnp.int32(0)
            carry, count = jax.lax.while_loop(unfinished, advance, start)
            return carry.params, problem.loss(carry.params, data), carry.value, count

        def run(settings, params, data, steps):
            init, step = method.make(problem, data, *settings)

            def advance(_, carry):
                return step(carry)._replace(value=carry.value)

            params = jax.lax.fori_loop(0, steps, advance, init(params)).params
            return params, problem.loss(params, data)

        def compiled(function, *more):
            start = time.perf_counter()
            lowered = jax.jit(function).lower(method.start, *instance, *more)
            return lowered.compile(), time.perf_counter() - start

        self.searching, self.compile_seconds = compiled(search, 0.0, 0)
        self.compiled_run = functools.cache(lambda: compiled(run, 0))

    def search(self, settings, instance, target: float, budget: int) -> Solution:
        """Steps until the loss is at the target, or so many."""
        start = time.perf_counter()
        result = self.searching(settings, *instance, float(target), int(budget))
        params, loss, value, count = jax.block_until_ready(result)
        seconds = time.perf_counter() - start
        earlier, now = bool(value <= target), bool(loss <= target)
        steps, loss = int(count) - earlier, float(loss)
        return Solution(steps, loss, earlier or now, seconds, params)

    def run(self, settings, instance, steps: int) -> Solution:
        """So many steps; a method that needs no loss does not compute it."""
        execute, self.compile_seconds = self.compiled_run()
        start = time.perf_counter()
        result = execute(settings, *instance, int(steps))
        params, loss = jax.block_until_ready(result)
        seconds = time.perf_counter() - start
        return Solution(steps, float(loss), True, seconds, params)


def tune(solver: Solver, start, strides, instance, target: float, budget: int):
    """The best point of a grid that grows until it is inside, finer and finer."""
    scores: dict[tuple[int, ...], tuple] = {}

    def settings(point):
        return tuple(x * 2 ** (k / 2) for x, k in zip(start, point, strict=True))

    def score(point):
        if any(x > 1 for x in settings(point)[1:]):
            return np.inf, np.inf, np.inf  # A negative momentum.
        if point not in scores:
            limit = min((score[0] for score in scores.values()), default=np.inf)
            found = solver.search(settings(point), instance, target, min(limit, budget))
            steps = found.steps if found.reached else np.inf
            loss = found.loss if np.isfinite(found.loss) else np.inf
            # If all diverge, the least rate is the way to go.
            scores[point] = steps, loss, settings(point)[0]
        return scores[point]

    best = (0,) * len(start)
    for stride in strides:
        while True:
            around = [best]
            for axis, k in itertools.product(range(len(best)), (-stride, stride)):
                around.append((*best[:axis], best[axis] + k, *best[axis + 1 :]))
            nearest = min(around, key=score)
            if nearest == best:
                break
            best = nearest
    return settings(best), len(scores)


class Study:
    """All methods on one problem, their timings interleaved."""

    def __init__(self, problem: Problem, options: Any, starts: dict[str, tuple | None]):
        self.problem, self.options = problem, options
        # Settings tuned on a smaller problem of the same kind are close already.
        self.starts = starts
        self.instance, self.other = (
            jax.tree.map(jnp.asarray, problem.make(seed)) for seed in (0, 1)
        )
        self.solver = functools.cache(
            lambda name: Solver(problem, METHODS[name], self.instance)
        )
        self.goal = self.find_goal(self.instance)
        self.rows: dict[str, dict[str, Any]] = {}

    def find_goal(self, instance) -> dict[str, float]:
        """f* directly, or by conjugate gradients until the loss stays."""
        problem, (params, data) = self.problem, instance
        start = float(problem.loss(params, data))
        if problem.direct is not None:
            best = self.loss_of(problem.direct(data)(), instance)
        else:
            solver = self.solver("cg" if problem.quadratic else "newton_cg")
            best, gained = start, True
            while gained:
                found = solver.search((), (params, data), -np.inf, 50)
                gained = found.loss < best - 1e-12 * (start - best)
                best, params = min(best, found.loss), found.params
        return {
            "start": start,
            "optimum": best,
            "target": best + TOLERANCE * (start - best),
        }

    def loss_of(self, solution, instance) -> float:
        start, data = instance
        return float(
            self.problem.loss(jnp.asarray(solution).reshape(start.shape), data)
        )

    def run(self, bar: tqdm) -> dict[str, Any]:
        names = methods_of(self.problem, self.options.methods)
        names = [name for name in names if self.starts.get(name, ()) is not None]
        for name in names:
            bar.set_postfix_str(name)
            self.rows[name] = self.first(name)
            bar.update()
        timed = {name: self.again(name) for name in names if not self.done(name)}
        timed |= self.experts()
        for _, (name, measure) in itertools.product(
            range(self.options.repeats), timed.items()
        ):
            row = self.rows[name]
            if sum(row["seconds"]) < PATIENCE:
                bar.set_postfix_str(name)
                row["seconds"].append(measure())
        span = self.goal["start"] - self.goal["optimum"]
        for row in self.rows.values():
            gap = (row["loss"] - self.goal["optimum"]) / span
            row["gap"] = gap if np.isfinite(gap) else None
            del row["loss"]
        return self.goal | {
            "title": self.problem.title,
            "parameters": int(self.instance[0].size),
            "partition": repr(self.problem.partition),
            "update_interval": self.problem.update_interval,
            "methods": self.rows,
        }

    def first(self, name: str) -> dict[str, Any]:
        """The settings, and the steps to the target."""
        method, options, settings, runs = METHODS[name], self.options, (), 0
        solver = self.solver(name)
        if method.tuned:
            start, strides = method.start, method.strides
            if name in self.starts:
                start, strides = self.starts[name], (method.strides[-1],)
            target = self.tuning_target
            settings, runs = tune(
                solver, start, strides, self.other, target, options.max_steps
            )
        found = solver.search(
            settings, self.instance, self.goal["target"], options.max_steps
        )
        return {
            "settings": dict(zip(method.tuned, settings, strict=True)),
            "tuning_runs": runs,
            "steps": found.steps,
            "reached": found.reached,
            "seconds": [found.seconds] if self.final(method, found) else [],
            "loss": found.loss,
            "compile_seconds": solver.compile_seconds,
        }

    def final(self, method: Method, found: Solution) -> bool:
        """Whether the search itself is what is timed: in vain, or long enough."""
        long = method.needs_loss and found.seconds > PATIENCE
        return long or not found.reached

    def done(self, name: str) -> bool:
        return bool(self.rows[name]["seconds"])

    @functools.cached_property
    def tuning_target(self) -> float:
        return self.find_goal(self.other)["target"]

    def again(self, name: str):
        """Those steps again, compiled without a look at the target."""
        row = self.rows[name]
        row["loss"] = self.after(name, row["steps"]).loss
        row["compile_seconds"] = self.solver(name).compile_seconds
        return lambda: self.after(name, row["steps"]).seconds

    def after(self, name: str, steps: int) -> Solution:
        settings = tuple(self.rows[name]["settings"].values())
        return self.solver(name).run(settings, self.instance, steps)

    def experts(self) -> dict[str, Any]:
        """What each expert's tool does, as a function that returns its seconds."""
        problem, data = self.problem, jax.tree.map(np.asarray, self.instance[1])
        chosen, timed = self.options.methods, {}
        row = {"settings": {}, "reached": True, "seconds": [], "compile_seconds": None}
        if "direct" in chosen and problem.direct is not None:
            solve = problem.direct(data)
            self.rows["direct"] = row | {
                "label": problem.direct_label,
                "seconds": [],
                "steps": None,
                "loss": self.loss_of(solve(), self.instance),
            }
            timed["direct"] = lambda: seconds_of(solve)
        if "pyamg" in chosen and problem.matrix is not None:
            if pyamg is None:
                self.rows["pyamg"] = row | {
                    "label": "pyamg not installed",
                    "loss": np.nan,
                }
                self.rows["pyamg"] |= {"reached": False, "steps": 0}
                return timed
            set_up, solve_by = algebraic_multigrid(problem, data)
            levels, steps, loss = set_up(), 0, np.inf
            while loss > self.goal["target"] and steps < 50:
                steps += 1
                loss = self.loss_of(solve_by(levels, steps), self.instance)
            reached = loss <= self.goal["target"]
            self.rows["pyamg"] = row | {
                "seconds": [],
                "steps": steps,
                "loss": loss,
                "reached": reached,
            }
            timed["pyamg"] = lambda: seconds_of(lambda: solve_by(set_up(), steps))
        return timed


def seconds_of(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
