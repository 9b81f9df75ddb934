"""A problem, a method to minimise its loss, and both compiled together."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bma_optax as bma
from benchmarks.harness.timing import clock, compiled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A loss of parameters and data, and what its solvers may know of it.

    Args:
      make: seed -> parameters to start from, and data. Seed 0 is reported, methods are
        tuned on seed 1.
      loss: parameters, `data` -> the loss.
      partition, curvature, update_interval: what Newton-BMA is given.
      quadratic: whether the loss is. Then one refresh of the curvature is enough.
      diagonal: parameters, `data` -> the diagonal of the curvature, for Jacobi's
        preconditioner. If it is None, its users probe for it.
      level: the loss to reach, where there are many minima.
      experts: tools for this kind of problem, by name: what to call them, and a
        function of the data that returns another one, from a number of iterations to
        the solution. The one called "direct" is exact.
    """

    name: str
    title: str
    make: Callable[[int], tuple[Any, Any]]
    loss: Callable[[Any, Any], jax.Array]
    partition: bma.Rule
    curvature: bma.Curvature = bma.Hessian()
    update_interval: int = 10
    quadratic: bool = False
    diagonal: Callable[[Any, Any], Any] | None = None
    level: float | None = None
    experts: dict[str, tuple[str, Callable]] = dataclasses.field(default_factory=dict)


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
    strides: tuple[int, ...] = (4, 2, 1)  # Of its grid, in powers of √2.
    suits: Callable[[Problem], bool] = lambda problem: True


def from_optax(make_tx: Callable[..., optax.GradientTransformation]):
    """`make` of a Method, from (problem, *settings) -> a transformation."""

    def make(problem: Problem, data: Any, *settings: Any):
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


class Solution(NamedTuple):
    steps: int
    loss: float
    reached: bool
    products: int  # With the curvature, where a method counts them.
    seconds: float
    params: Any


class Solver:
    """A method compiled for a problem; the settings and the instance are arguments."""

    def __init__(self, problem: Problem, method: Method, instance: Any) -> None:
        self.program = functools.cache(
            lambda looks: compiled(
                functools.partial(solve, problem, method, looks),
                *(method.start, *instance, 0.0, 0),
            )
        )

    def __call__(self, settings, instance, steps: int, target=None) -> Solution:
        """So many steps; with a target, until the loss is there.

        Without one, a method that needs no loss does not compute it.
        """
        looks, target = target is not None, -np.inf if target is None else target
        program, self.compile_seconds = self.program(looks)
        found, seconds = clock(program, settings, *instance, float(target), int(steps))
        params, loss, products, value, count = found
        earlier, now = bool(value <= target), bool(loss <= target)
        steps, reached = int(count) - earlier, earlier or now
        return Solution(steps, float(loss), reached, int(products), seconds, params)


def trajectory(
    problem: Problem, method: Method, settings: Any, instance: Any, steps: int
) -> tuple[list[Any], np.ndarray]:
    """The parameters and the losses before each step, and after the last one."""
    params, data = instance
    init, step = method.make(problem, data, *settings)
    carry, step = init(params), jax.jit(step)
    found, losses = [], []
    for _ in range(steps + 1):
        found.append(carry.params)
        carry = step(carry)
        losses.append(carry.value)
    return found, np.array(losses)


def as_floats(tree: Any, dtype: Any) -> Any:
    """A tree with its floats in another precision."""

    def cast(x: jax.Array) -> jax.Array:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(lambda x: cast(jnp.asarray(x)), tree)


def exact_loss(problem: Problem, params: Any, data: Any) -> jax.Array:
    """The loss in float64, whatever the precision of the method."""
    return problem.loss(*as_floats((params, data), jnp.float64))


def solve(problem, method, looks: bool, settings, params, data, target, budget):
    narrow = any(x.dtype != jnp.float64 for x in jax.tree.leaves(params))
    init, step = method.make(problem, data, *settings)

    def unfinished(loop):
        carry, count = loop
        # The loss where the last step started: it comes with the gradient, another
        # would cost a pass. What diverged is not above the target either.
        return (count < budget) & (carry.value > target if looks else True)

    def advance(loop):
        carry, count = loop
        with jax.enable_x64(not narrow):  # As its user would run it.
            new = step(carry)
        if not looks:
            new = new._replace(value=carry.value)
        elif narrow:  # Its own sum is not exact enough to tell when it is there.
            new = new._replace(value=exact_loss(problem, carry.params, data))
        return new, count + 1

    with jax.enable_x64(not narrow):
        start = init(params), jnp.int32(0)
    if looks and narrow:
        start = start[0]._replace(value=jnp.array(jnp.inf)), start[1]
    carry, count = jax.lax.while_loop(unfinished, advance, start)
    counts = optax.tree.get_all_with_path(carry.state, "products")
    products = sum((n for _, n in counts), jnp.int32(0))
    loss = exact_loss(problem, carry.params, data)
    return carry.params, loss, products, carry.value, count
