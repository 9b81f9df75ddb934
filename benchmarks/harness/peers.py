"""Newton-BMA, and what it is raced against: Optax's methods, CG and Newton-CG."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

import bma_optax as bma
from benchmarks.harness.solver import Carry, Method, Problem, from_optax

NO_BLOCKS = bma.by_function(lambda path, shape: None)


class CG(NamedTuple):
    """Conjugate gradients for G x = b, preconditioned by a function of the residual."""

    x: jax.Array
    r: jax.Array
    p: jax.Array
    rho: jax.Array

    @classmethod
    def start(cls, b: jax.Array, precondition: Callable) -> "CG":
        z = precondition(b)
        return cls(jnp.zeros_like(b), b, z, jnp.vdot(b, z))

    def step(self, product: Callable, precondition: Callable):
        """The next step, the decrease of the quadratic, and whether G bent up."""
        curved = product(self.p)
        bend = jnp.vdot(self.p, curved)
        a = self.rho / bend
        r = self.r - a * curved
        z = precondition(r)
        rho = jnp.vdot(r, z)
        new = CG(self.x + a * self.p, r, z + rho / self.rho * self.p, rho)
        return new, a * self.rho / 2, bend > 0


def newton_bma(problem: Problem, rule: bma.Rule | None = None):
    return bma.newton_bma(
        rule or problem.partition,
        curvature=problem.curvature,
    )


def heavy_ball(rule: bma.Rule, update_interval: int | None = None):
    """A fixed rate and momentum, for quadratic losses."""
    direction = bma.scale_by_newton_bma(rule, update_interval=update_interval)
    return optax.chain(direction, optax.trace(0.45), optax.scale(-1.3))


def product_at(problem: Problem, params: Any, data: Any) -> Callable[[Any], Any]:
    key = jax.random.key(0)
    return problem.curvature.linearize(params, key, problem.loss, {"data": data})


def conjugate_gradients(problem: Problem, data: Any):
    """For quadratic losses of one array; a step is one product."""

    def init(params):
        value, g = jax.value_and_grad(problem.loss)(params, data)
        inverse = (1 / problem.diagonal(params, data)).astype(g.dtype)
        state = (
            CG.start(-g, partial(jnp.multiply, inverse))._replace(x=params),
            value,
            inverse,
        )
        return Carry(params, state, jnp.array(jnp.inf))

    def step(carry):
        cg, value, inverse = carry.state
        product = product_at(problem, jnp.zeros_like(carry.params), data)
        cg, decrease, _ = cg.step(product, partial(jnp.multiply, inverse))
        return Carry(cg.x, (cg, value - decrease, inverse), value)

    return init, step


class NewtonCG(NamedTuple):
    diagonal: bma.ScaleByNewtonBMAState
    products: jax.Array


def newton_cg(problem: Problem, data: Any, limit: int = 1000):
    """Newton's method, truncated: CG with Jacobi, then a step by Armijo's rule.

    Conjugate gradients stop at min(1/2, √|g|), where G bends down, or at the limit. A
    diagonal that is not known is probed, as Newton-BMA does.
    """
    curvature, interval = problem.curvature, problem.update_interval
    if problem.diagonal is not None:
        curvature = dataclasses.replace(curvature, diagonal_fn=problem.diagonal)
        interval = 1
    scaling = bma.scale_by_newton_bma(
        NO_BLOCKS, curvature=curvature, update_interval=interval
    )

    def init(params):
        state = NewtonCG(scaling.init(params), jnp.int32(0))
        return Carry(params, state, jnp.array(jnp.inf))

    def step(carry):
        params, state, _ = carry
        value, grads = jax.value_and_grad(problem.loss)(params, data)
        more = {"value_fn": problem.loss, "data": data}
        _, diagonal = scaling.update(grads, state.diagonal, params, **more)
        product = product_at(problem, params, data)
        inverse, _ = ravel_pytree(diagonal.inverse_diagonal)
        g, unravel = ravel_pytree(grads)
        direction, count = newton_direction(
            lambda v: ravel_pytree(product(unravel(v)))[0], g, inverse, limit
        )
        slope = 1e-4 * jnp.vdot(g, direction)

        def after(t):
            return optax.tree.add_scale(params, t, unravel(direction))

        def too_long(t):
            return ~(problem.loss(after(t), data) <= value + t * slope) & (t > 1e-9)

        t = jax.lax.while_loop(too_long, lambda t: t / 2, jnp.ones_like(value))
        return Carry(after(t), NewtonCG(diagonal, state.products + count), value)

    return init, step


def newton_direction(product, g, inverse, limit: int):
    """-G^-1 g about, or -g scaled where G bends down at once; and the products."""
    size = jnp.linalg.norm(g)
    tolerance = jnp.minimum(0.5, jnp.sqrt(size)) * size

    def unfinished(loop):
        cg, count, positive = loop
        return (jnp.linalg.norm(cg.r) > tolerance) & (count < limit) & positive

    def iterate(loop):
        cg, count, _ = loop
        new, _, positive = cg.step(product, partial(jnp.multiply, inverse))
        kept = jax.tree.map(lambda x, y: jnp.where(positive, x, y), new, cg)
        return kept, count + 1, positive

    loop = CG.start(-g, partial(jnp.multiply, inverse)), jnp.int32(0), jnp.array(True)
    cg, count, _ = jax.lax.while_loop(unfinished, iterate, loop)
    return jnp.where(jnp.any(cg.x != 0), cg.x, -inverse * g), count


PEERS = {
    "sgd": Method(
        from_optax(lambda p, rate, rest: optax.sgd(rate, momentum=1 - rest)),
        ("rate", "1 - momentum"),
        (0.2, 0.02),
    ),
    "adam": Method(
        from_optax(lambda p, rate, rest: optax.adam(rate, b1=1 - rest)),
        ("rate", "1 - b1"),
        (0.05, 0.05),
    ),
    "adagrad": Method(
        from_optax(lambda p, rate: optax.adagrad(rate)), ("rate",), (1.0,)
    ),
    "lbfgs": Method(from_optax(lambda p: optax.lbfgs())),
    "cg": Method(conjugate_gradients, suits=lambda problem: problem.quadratic),
    "newton_cg": Method(newton_cg, suits=lambda problem: not problem.quadratic),
}
