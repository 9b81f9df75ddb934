"""What mini-BMA's learned directions are: angles to the inputs of their layers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.networks.study import one_step
from benchmarks.networks.tasks import Task

EXAMPLES = 500


def angles(task: Task, tx, rate: float, seed: int, looks: int = 6) -> dict[str, Any]:
    """For each layer, while mini-BMA trains on one seed, at several steps:

    `mean`, the cosine between q and the mean of the layer's inputs; `top`, between q
    and the first eigenvector of their uncentred second moment; `share`, the part of
    the gradient's decayed square that lies along q. `chance` is the root mean square
    of a random direction's cosine. Signs do not matter and are left out.
    """
    train = jax.tree.map(jnp.asarray, task.train)
    some = jax.tree.map(lambda array: array[:EXAMPLES], train)
    params = task.init(jax.random.key(seed))
    carry, batches = (params, tx.init(params)), task.batches(seed)

    @jax.jit
    def advance(carry, batches, train):
        def step(carry, rows):
            return one_step(task, tx, rate, carry, train, rows)

        return jax.lax.scan(step, carry, batches)[0]

    @jax.jit
    def moments(params, some):
        def of(inputs):
            rows = inputs.reshape(-1, inputs.shape[-1])
            return rows.mean(axis=0), rows.T @ rows / len(rows)

        return jax.tree.map(of, task.forward(params, some)[1])

    length = max(1, task.steps // looks)
    result: dict[str, Any] = {}
    for look in range(task.steps // length):
        carry = advance(carry, batches[look * length : (look + 1) * length], train)
        params, state = carry
        for name, (mean, second) in jax.device_get(moments(params, some)).items():
            direction = np.ravel(state.direction[name]["kernel"])
            top = np.linalg.eigh(second.astype(np.float64))[1][:, -1]
            square = float(jnp.sum(state.nu[name]["kernel"]))
            along = float(jnp.sum(state.mean_nu[name]["kernel"]))
            row = result.setdefault(
                name, {"step": [], "mean": [], "top": [], "share": []}
            )
            row["step"].append((look + 1) * length)
            row["mean"].append(cosine(direction, mean))
            row["top"].append(cosine(direction, top))
            row["share"].append(along / square if square else None)
            row["chance"] = len(mean) ** -0.5
    return result


def cosine(x: np.ndarray, y: np.ndarray) -> float | None:
    size = float(np.linalg.norm(x) * np.linalg.norm(y))
    return abs(float(np.vdot(x, y))) / size if size else None
