"""The methods of inverse_problems.py: Newton-BMA, Optax's, and experts' tools."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse

import bma_optax as bma
from benchmarks.grids.problems import Problem

try:
    import pyamg
except ImportError:  # It has no part in what is measured here but its own row.
    pyamg = None


class Carry(NamedTuple):
    params: jax.Array
    state: Any
    value: jax.Array  # The loss before the last step: it comes with its gradient.


@dataclasses.dataclass(frozen=True)
class Method:
    """`make`: a problem, data and the tuned settings -> (init, step) on a Carry."""

    make: Callable[..., tuple[Callable, Callable]]
    tuned: tuple[str, ...] = ()
    start: tuple[float, ...] = ()  # Where tuning starts.
    strides: tuple[int, ...] = (4, 2, 1)  # Of its grid, in powers of the root of 2.
    quadratic: bool | None = None  # Only for such problems; None: for all.
    needs_loss: bool = False  # At every step, with or without a look at the target.


def from_optax(make_tx: Callable[..., optax.GradientTransformation]):
    def make(problem: Problem, data, *settings):
        tx = optax.with_extra_args_support(make_tx(problem, *settings))

        def init(params):
            return Carry(params, tx.init(params), jnp.array(jnp.inf))

        def step(carry):
            params, state, _ = carry
            evaluate, kept = jax.value_and_grad(problem.loss), {}
            if optax.tree.get(state, "grad") is not None:
                evaluate = optax.value_and_grad_from_state(problem.loss)
                kept = {"state": state}
            value, grads = evaluate(params, data, **kept)
            more = {"value": value, "grad": grads, "data": data}
            updates, state = tx.update(
                grads, state, params, value_fn=problem.loss, **more
            )
            return Carry(optax.apply_updates(params, updates), state, value)

        return init, step

    return make


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


def cg_start(x, inverse, r):
    z = inverse * r
    return x, r, z, jnp.vdot(r, z)


def cg_step(product, inverse, carry):
    """One step for G x = b, the decrease of the quadratic, and whether G bent up."""
    x, r, p, rho = carry
    curved = product(p)
    bend = jnp.vdot(p, curved)
    a = rho / bend
    r = r - a * curved
    z = inverse * r
    new = jnp.vdot(r, z)
    return (x + a * p, r, z + new / rho * p, new), a * rho / 2, bend > 0


def conjugate_gradients(problem: Problem, data):
    def init(params):
        value, g = jax.value_and_grad(problem.loss)(params, data)
        inverse = 1 / problem.diagonal(params, data)
        state = cg_start(params, inverse, -g)[1:], value, inverse
        return Carry(params, state, jnp.array(jnp.inf))

    def step(carry):
        inner, value, inverse = carry.state
        product = product_at(problem, jnp.zeros_like(carry.params), data)
        moved, decrease, _ = cg_step(product, inverse, (carry.params, *inner))
        return Carry(moved[0], (moved[1:], value - decrease, inverse), value)

    return init, step


def newton_cg(problem: Problem, data, limit: int = 1000):
    """Truncated, preconditioned by the diagonal, with Armijo's rule."""

    def step(carry):
        params = carry.params
        value, g = jax.value_and_grad(problem.loss)(params, data)
        product = product_at(problem, params, data)
        inverse = 1 / jnp.abs(problem.diagonal(params, data))
        size = jnp.linalg.norm(g)
        tolerance = jnp.minimum(0.5, jnp.sqrt(size)) * size

        def unfinished(loop):
            inner, count, positive = loop
            small = jnp.linalg.norm(inner[1]) <= tolerance
            return ~small & (count < limit) & positive

        def iterate(loop):
            inner, count, _ = loop
            new, _, positive = cg_step(product, inverse, inner)
            kept = jax.tree.map(lambda x, y: jnp.where(positive, x, y), new, inner)
            return kept, count + 1, positive

        loop = cg_start(jnp.zeros_like(g), inverse, -g), 0, jnp.array(True)
        (direction, *_), count, _ = jax.lax.while_loop(unfinished, iterate, loop)
        direction = jnp.where(jnp.any(direction != 0), direction, -inverse * g)
        slope = 1e-4 * jnp.vdot(g, direction)

        def too_long(t):
            new = problem.loss(params + t * direction, data)
            return ~(new <= value + t * slope) & (t > 1e-9)

        t = jax.lax.while_loop(too_long, lambda t: t / 2, jnp.ones_like(value))
        return Carry(params + t * direction, carry.state + count, value)

    return lambda params: Carry(params, 0, jnp.array(jnp.inf)), step


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


def methods_of(problem: Problem, chosen: list[str]) -> list[str]:
    """Those of the chosen methods that have something to do with a problem."""
    return [
        name
        for name, method in METHODS.items()
        if name in chosen and method.quadratic in (None, problem.quadratic)
    ]


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
