"""Methods that minimise a loss: one step on a Carry, compiled for one problem.

What Optax has no step of its own for is here: conjugate gradients, and Newton's method
truncated by them, which the studies take as peers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from benchmarks.harness.timing import clock, compiled


class Carry(NamedTuple):
    params: Any
    state: Any
    value: jax.Array  # The loss before the last step: it comes with its gradient.


@dataclasses.dataclass(frozen=True)
class Method:
    """`make`: a problem, data and the tuned settings -> (init, step) on a Carry."""

    make: Callable[..., tuple[Callable, Callable]]
    tuned: tuple[str, ...] = ()
    start: tuple[float, ...] = ()  # Where tuning starts.
    strides: tuple[int, ...] = (4, 2, 1)  # Of its grid, in powers of `factor`.
    factor: float = 2**0.5
    quadratic: bool | None = None  # Only for such problems; None: for all.
    needs_loss: bool = False  # At every step, with or without a look at the target.


def from_optax(make_tx: Callable[..., optax.GradientTransformation]):
    """`make` of a Method, from (problem, *settings) -> a transformation."""

    def make(problem: Any, data: Any, *settings: Any):
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


class CG(NamedTuple):
    """Conjugate gradients for G x = b, preconditioned by a diagonal."""

    x: jax.Array
    r: jax.Array
    p: jax.Array
    rho: jax.Array

    @classmethod
    def start(cls, b: jax.Array, inverse: jax.Array) -> "CG":
        z = inverse * b
        return cls(jnp.zeros_like(b), b, z, jnp.vdot(b, z))

    def step(self, product: Callable, inverse: jax.Array):
        """The next step, the decrease of the quadratic, and whether G bent up."""
        curved = product(self.p)
        bend = jnp.vdot(self.p, curved)
        a = self.rho / bend
        r = self.r - a * curved
        z = inverse * r
        rho = jnp.vdot(r, z)
        new = CG(self.x + a * self.p, r, z + rho / self.rho * self.p, rho)
        return new, a * self.rho / 2, bend > 0


def truncated_newton(loss, params, value, grads, product, inverse, limit: int):
    """Newton-CG's next parameters, by Armijo's rule, and the products it took.

    Conjugate gradients stop at min(1/2, sqrt |g|), or where G bends down. `inverse`, of
    the diagonal of G, and `grads` are trees like `params`.
    """
    g, unravel = ravel_pytree(grads)
    inverse = ravel_pytree(inverse)[0]
    size = jnp.linalg.norm(g)
    tolerance = jnp.minimum(0.5, jnp.sqrt(size)) * size

    def flat_product(v):
        return ravel_pytree(product(unravel(v)))[0]

    def unfinished(loop):
        cg, count, positive = loop
        return (jnp.linalg.norm(cg.r) > tolerance) & (count < limit) & positive

    def iterate(loop):
        cg, count, _ = loop
        new, _, positive = cg.step(flat_product, inverse)
        kept = jax.tree.map(lambda x, y: jnp.where(positive, x, y), new, cg)
        return kept, count + 1, positive

    loop = CG.start(-g, inverse), jnp.int32(0), jnp.array(True)
    cg, count, _ = jax.lax.while_loop(unfinished, iterate, loop)
    direction = jnp.where(jnp.any(cg.x != 0), cg.x, -inverse * g)
    slope = 1e-4 * jnp.vdot(g, direction)

    def after(t):
        return optax.tree.add_scale(params, t, unravel(direction))

    def too_long(t):
        return ~(loss(after(t)) <= value + t * slope) & (t > 1e-9)

    t = jax.lax.while_loop(too_long, lambda t: t / 2, jnp.ones_like(value))
    return after(t), count


class Solution(NamedTuple):
    steps: int
    loss: float
    reached: bool
    products: int  # With the curvature, where a method counts them.
    seconds: float
    params: Any


class Solver:
    """A method compiled for a problem; the settings and the instance are arguments."""

    def __init__(self, problem: Any, method: Method, instance: Any) -> None:
        def result(carry, data):
            counts = optax.tree.get_all_with_path(carry.state, "products")
            spent = sum((n for _, n in counts), jnp.int32(0))
            return carry.params, problem.loss(carry.params, data), spent

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
            return *result(carry, data), carry.value, count

        def run(settings, params, data, steps):
            init, step = method.make(problem, data, *settings)

            def advance(_, carry):
                return step(carry)._replace(value=carry.value)

            return result(jax.lax.fori_loop(0, steps, advance, init(params)), data)

        program = (method.start, *instance)
        self.searching, self.compile_seconds = compiled(search, *program, 0.0, 0)
        self.running = functools.cache(lambda: compiled(run, *program, 0))

    def search(self, settings, instance, target: float, budget: int) -> Solution:
        """Steps until the loss is at the target, or so many."""
        arguments = settings, *instance, float(target), int(budget)
        result, seconds = clock(self.searching, *arguments)
        params, loss, products, value, count = result
        earlier, now = bool(value <= target), bool(loss <= target)
        steps, reached = int(count) - earlier, earlier or now
        return Solution(steps, float(loss), reached, int(products), seconds, params)

    def run(self, settings, instance, steps: int) -> Solution:
        """So many steps; a method that needs no loss does not compute it."""
        program, self.compile_seconds = self.running()
        result, seconds = clock(program, settings, *instance, int(steps))
        params, loss, products = result
        return Solution(steps, float(loss), True, int(products), seconds, params)
