"""The methods of this study: Newton-BMA, Optax's, and experts' tools."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse

import bma_optax as bma
from benchmarks.grids.problems import Problem
from benchmarks.harness.race import TOLERANCE, Race
from benchmarks.harness.solver import (
    CG,
    Carry,
    Method,
    Solver,
    from_optax,
    truncated_newton,
)
from benchmarks.harness.timing import clock

try:
    import pyamg
except ImportError:  # It has no part in what is measured here but its own row.
    pyamg = None


def settings_of(problem: Problem) -> dict[str, Any]:
    return {
        "partition": problem.partition,
        "update_interval": problem.update_interval,
    }


def heavy_ball(problem: Problem) -> optax.GradientTransformation:
    return optax.chain(
        bma.scale_by_newton_bma(**settings_of(problem)),
        optax.trace(0.45),
        optax.scale(-1.3),
    )


def product_at(problem: Problem, params, data):
    gradient = jax.grad(lambda params: problem.loss(params, data))
    return jax.linearize(gradient, params)[1]


def conjugate_gradients(problem: Problem, data):
    def init(params):
        value, g = jax.value_and_grad(problem.loss)(params, data)
        inverse = 1 / problem.diagonal(params, data)
        state = CG.start(-g, inverse)._replace(x=params), value, inverse
        return Carry(params, state, jnp.array(jnp.inf))

    def step(carry):
        cg, value, inverse = carry.state
        product = product_at(problem, jnp.zeros_like(carry.params), data)
        cg, decrease, _ = cg.step(product, inverse)
        return Carry(cg.x, (cg, value - decrease, inverse), value)

    return init, step


class Count(NamedTuple):
    products: jax.Array


def newton_cg(problem: Problem, data):
    def step(carry):
        params = carry.params
        value, g = jax.value_and_grad(problem.loss)(params, data)
        product = product_at(problem, params, data)
        inverse = 1 / jnp.abs(problem.diagonal(params, data))
        params, count = truncated_newton(
            lambda u: problem.loss(u, data), params, value, g, product, inverse, 1000
        )
        return Carry(params, Count(carry.state.products + count), value)

    return lambda params: Carry(params, Count(jnp.int32(0)), jnp.array(jnp.inf)), step


METHODS = {
    "newton_bma": Method(from_optax(lambda p: bma.newton_bma(**settings_of(p)))),
    "bma_heavy_ball": Method(from_optax(heavy_ball), quadratic=True),
    "sgd": Method(
        from_optax(lambda p, rate, rest: optax.sgd(rate, momentum=1 - rest)),
        ("rate", "1 - momentum"),
        (0.2, 0.02),
    ),
    "adam": Method(
        from_optax(lambda p, rate, rest: optax.adam(rate, b1=1 - rest)),
        ("rate", "1 - b1"),
        (0.05, 0.05),
        (4, 2),
    ),
    "adagrad": Method(
        from_optax(lambda p, rate: optax.adagrad(rate)), ("rate",), (1.0,)
    ),
    "lbfgs": Method(from_optax(lambda p: optax.lbfgs()), needs_loss=True),
    "cg": Method(conjugate_gradients, quadratic=True),
    "newton_cg": Method(newton_cg, quadratic=False),
}
EXPERTS = ("pyamg", "direct")


def methods_of(problem: Problem, chosen: list[str]) -> dict[str, Method]:
    """Those of the chosen methods that have something to do with a problem."""
    return {
        name: method
        for name, method in METHODS.items()
        if name in chosen and method.quadratic in (None, problem.quadratic)
    }


def find_goal(race: Race, instance) -> dict[str, float]:
    """f* directly, or by conjugate gradients until the loss stays."""
    problem, (params, data) = race.problem, instance
    start = float(problem.loss(params, data))
    if problem.direct is not None:
        best = loss_of(problem, problem.direct(data)(), instance)
    else:
        name = "cg" if problem.quadratic else "newton_cg"
        solver = Solver(problem, METHODS[name], instance)
        best, gained = start, True
        while gained:
            found = solver.search((), (params, data), -np.inf, 50)
            gained = found.loss < best - 1e-12 * (start - best)
            best, params = min(best, found.loss), found.params
    target = best + TOLERANCE * (start - best)
    return {"start": start, "optimum": best, "target": target}


def loss_of(problem: Problem, solution, instance) -> float:
    start, data = instance
    return float(problem.loss(jnp.asarray(solution).reshape(start.shape), data))


def experts(race: Race, chosen: list[str]) -> dict[str, tuple[dict, Any]]:
    """What each expert's tool does: a row, and a function that returns its seconds."""
    problem, instance = race.problem, race.instance
    data, found = jax.tree.map(np.asarray, instance[1]), {}

    def row(steps, loss, label, reached=True):
        made = {"settings": {}, "steps": steps, "loss": loss, "reached": reached}
        return made | {"seconds": [], "compile_seconds": None, "label": label}

    if "direct" in chosen and problem.direct is not None:
        solve = problem.direct(data)
        made = row(None, loss_of(problem, solve(), instance), problem.direct_label)
        found["direct"] = made, lambda _: clock(solve)[1]
    if "pyamg" in chosen and problem.matrix is not None:
        if pyamg is None:
            missing = row(0, np.nan, "pyamg not installed", reached=False)
            return found | {"pyamg": (missing, None)}
        set_up, solve_by = algebraic_multigrid(problem, data)
        levels, steps, loss = set_up(), 0, np.inf
        while loss > race.goal["target"] and steps < 50:
            steps += 1
            loss = loss_of(problem, solve_by(levels, steps), instance)
        made = row(steps, loss, "pyamg", loss <= race.goal["target"])
        found["pyamg"] = made, lambda _: clock(lambda: solve_by(set_up(), steps))[1]
    return found


def algebraic_multigrid(problem: Problem, data):
    """PyAMG: its set-up, and its solution after so many iterations of CG around it."""
    matrix, rhs = problem.matrix(data)
    matrix = scipy.sparse.csr_matrix(matrix)  # PyAMG wants this one, with 32 bits.
    matrix.indices = matrix.indices.astype(np.int32)
    matrix.indptr = matrix.indptr.astype(np.int32)

    def solve(levels, iterations: int) -> np.ndarray:
        options = {"tol": 1e-30, "maxiter": iterations, "accel": "cg"}
        return np.stack([levels.solve(b, **options) for b in rhs.T], axis=1)

    return lambda: pyamg.ruge_stuben_solver(matrix), solve
