"""Quadratic losses of a given matrix, Newton-BMA on them, and its dense inverse."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from reference import RULES, newton_inverse

import bma_optax as bma

PARAMS = {
    "a": {"bias": np.zeros(4), "kernel": np.zeros((3, 4))},
    "b": {"kernel": np.zeros((4, 2))},
}
D = 24


def tree_of(vector):
    return ravel_pytree(jax.tree.map(jnp.asarray, PARAMS))[1](jnp.asarray(vector))


def positive_definite(seed, d=D):
    """A correlated matrix whose diagonal entries have very different sizes."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((d, d)) + 1
    scale = 10 ** rng.uniform(-1, 1, d)
    return (A @ A.T / d + np.eye(d)) * np.outer(scale, scale)


def indefinite(seed, d=D):
    A = np.random.default_rng(seed).standard_normal((d, d))
    return A + A.T


def quadratic(G, b=None):
    b = np.zeros(len(G)) if b is None else b

    def f(params):
        x = ravel_pytree(params)[0]
        return x @ jnp.asarray(G) @ x / 2 - jnp.asarray(b) @ x

    return f


def elements():
    for keys, leaf in jax.tree_util.tree_leaves_with_path(PARAMS):
        path = tuple(key.key for key in keys)
        for index in itertools.product(*map(range, leaf.shape)):
            yield path, index


def dense_inverse(G, rule, *, damping=0.0, couple="all"):
    names = [RULES[rule](path, index) for path, index in elements()]
    blocks = sorted({n for n in names if n is not None}, key=str)
    labels = [-1 if n is None else blocks.index(n) for n in names]
    groups = None
    if couple == "layer":
        layers = {
            label: str(path[:-1])
            for label, (path, _) in zip(labels, elements(), strict=True)
        }
        groups = [layers[label] for label in range(len(blocks))]
    return newton_inverse(G, labels, groups, damping)


@functools.cache
def operator_of(rule):
    """C(G, damping) of one step, by columns; an array whose gradient is 0 stays."""
    params = tree_of(np.zeros(D))

    @jax.jit
    def matrix(G, damping):
        tx = bma.scale_by_newton_bma(rule, damping=damping, update_interval=1)
        update = functools.partial(tx.update, value_fn=quadratic(G))
        state = tx.init(params)

        def apply(vector):
            updates, new = update(tree_of(vector), state, params)
            return ravel_pytree(updates)[0], new.floored

        images, floored = jax.vmap(apply)(1 + jnp.eye(D + 1, D))
        return (images[:D] - images[D:]).T, floored[0]

    return lambda G, damping=0.0: jax.device_get(matrix(G, damping))


def one_update(tx, params, f, grads=None):
    """The updates and the state after one jitted step from ``params``."""

    @jax.jit
    def step(params):
        g = jax.grad(f)(params) if grads is None else grads
        return tx.update(g, tx.init(params), params, value_fn=f)

    return step(params)


def trained(tx, f, params, steps):
    """The parameters after so many steps, in one program."""

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(f)(params), state, params, value_fn=f)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0]

    return run(params)
