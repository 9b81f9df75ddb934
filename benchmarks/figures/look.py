"""What figure 2 shows of the matrix while AdaGrad-BMA trains."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import bma_optax as bma
from benchmarks.figures.training import MakeOptimizer, Problem

POINTS = 60  # At which all of it is looked at.
MATRICES = (0.05, 0.3, 1.0)  # Parts of the run after which M is drawn.


def look(
    problem: Problem, methods: dict[str, MakeOptimizer], rate: float
) -> dict[str, Any]:
    """M, its spectrum, and the angles between updates from the same gradients.

    All methods gather their statistics along AdaGrad-BMA's way.
    """
    optimizers = {name: make(1.0) for name, make in methods.items()}
    params = nnx.state(problem.net(seed=0))
    states = {name: tx.init(params) for name, tx in optimizers.items()}
    blocks = bma.partition(params, bma.per_leaf)

    @jax.jit
    def step(params, states, train, batch):
        examples = (array[batch] for array in train)
        grads = jax.grad(problem.loss)(params, *examples)
        pairs = {m: tx.update(grads, states[m], params) for m, tx in optimizers.items()}
        updates, states = ({m: pair[i] for m, pair in pairs.items()} for i in (0, 1))
        change = optax.tree.scale(rate, updates["AdaGrad-BMA"])
        return optax.apply_updates(params, change), states, updates, grads

    @jax.jit
    def numbers(state, updates, grads):
        found = bma.diagnostics(state, blocks, grads)
        U, v = (optax.tree.get(state, name) for name in ("U", "v"))
        M = jnp.eye(len(v)) + jnp.where(jnp.eye(len(v)) > 0, 0, U / jnp.outer(v, v))
        angles = {
            f"{a} and {b}".replace("AdaGrad-", ""): degrees(updates[a], updates[b])
            for a, b in itertools.combinations(updates, 2)
        }
        return M, found["correction"], angles

    steps = problem.epochs * problem.steps
    chosen = set(np.unique(np.geomspace(1, steps, POINTS).astype(int)).tolist())
    drawn = {max(1, round(part * steps)) for part in MATRICES}
    result: dict[str, Any] = {
        "names": list(blocks.names),
        "step": [],
        "spectrum": [],
        "corrections": [],
        "angles": {},
        "matrices": {},
    }
    count = 0
    for epoch in range(problem.epochs):
        for batch in problem.batches(0, epoch):
            count += 1
            params, states, updates, grads = step(params, states, problem.train, batch)
            if count not in chosen | drawn:
                continue
            found = numbers(states["AdaGrad-BMA"], updates, grads)
            M, correction, angles = jax.device_get(found)
            if count in drawn:
                result["matrices"][count] = M
            if count in chosen:
                result["step"].append(count)
                result["spectrum"].append(np.linalg.eigvalsh(M))
                result["corrections"].append(float(correction))
                for pair, angle in angles.items():
                    result["angles"].setdefault(pair, []).append(float(angle))
    return result


def degrees(a: Any, b: Any) -> jax.Array:
    # From the distance of unit vectors: small angles lose no digits.
    x, y = (optax.tree.scale(1 / optax.tree.norm(t), t) for t in (a, b))
    half = optax.tree.norm(optax.tree.sub(x, y)) / 2
    return jnp.degrees(2 * jnp.arcsin(jnp.clip(half, 0, 1)))
