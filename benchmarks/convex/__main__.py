"""AdaGrad-BMA on linear models, features as they come and standardised.

    python -m benchmarks.convex
    python -m benchmarks.convex --tasks wine clicks

Softmax regressions, and least squares for `diabetes`, from zeros. In mini-batches: 600
steps of 48 examples, the mean loss of the last tenth. Online: 1500 examples one by one,
the regret, that is the mean loss before each step minus the least loss of any fixed
model on the training set, which L-BFGS finds. Rates (and Adam's b2) are tuned on three
orders of the examples, and reported on four others.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jax.flatten_util import ravel_pytree
from tqdm import tqdm

import bma_optax as bma
from benchmarks.convex.data import SOURCES, split
from benchmarks.harness import tables
from benchmarks.harness.results import Parser, Results
from benchmarks.networks.methods import METHODS
from benchmarks.networks.study import RUNS, Trainer, final, tune
from benchmarks.networks.tasks import Task, cross_entropy

SHOWN = ("adam", "adagrad", "adagrad_bma", "units_constant", "units_learned")
REPORTED = (1, 2, 3, 4)  # Orders of the examples.
REGIMES = {"mini-batches": (600, 48), "online": (1500, 1)}


def loss(params: Any, examples: Any) -> jax.Array:
    features, targets = examples
    output = features @ params["kernel"] + params["bias"][None]
    if jnp.issubdtype(targets.dtype, jnp.integer):
        return cross_entropy(output, targets)
    return jnp.mean((output[:, 0] - targets) ** 2) / 2


def task_of(name: str, standardised: bool, steps: int, batch_size: int) -> Task:
    train, test = split(name, standardised)
    labels = train.targets.dtype.kind == "i"
    outputs = int(train.targets.max()) + 1 if labels else 1

    def init(_: jax.Array) -> dict[str, jax.Array]:
        shape = train.features.shape[1], outputs
        return {"kernel": jnp.zeros(shape), "bias": jnp.zeros(outputs)}

    return Task(init, loss, tuple(train), tuple(test), steps, batch_size)


def least_loss(task: Task) -> float:
    """Of all fixed models, on the training set."""
    start, unravel = ravel_pytree(task.init(jax.random.key(0)))
    train = jax.tree.map(jnp.asarray, task.train)
    f = jax.jit(jax.value_and_grad(lambda x: task.loss(unravel(x), train)))

    def evaluate(x: np.ndarray) -> tuple[float, np.ndarray]:
        loss, gradient = f(jnp.asarray(x, jnp.float32))
        return float(loss), np.asarray(gradient, float)

    options = {"maxiter": 3000, "maxfun": 6000}
    found = scipy.optimize.minimize(
        evaluate, start, method="L-BFGS-B", jac=True, options=options
    )
    return float(found.fun)


def regret(losses: np.ndarray) -> np.ndarray:
    """Mean loss before each step; infinite if it diverged."""
    means = losses.mean(axis=1)
    return np.where(np.isfinite(means), means, np.inf)


def measure(task: Task, name: str, online: bool) -> dict[str, Any]:
    """One cell: a tuned method on other orders of the examples."""
    score = regret if online else final
    trainer = Trainer(task, METHODS[name])
    tuned = tune(trainer, score)
    seeds = np.resize(REPORTED, RUNS)  # As many runs as in tuning: one program.
    losses = trainer(seeds, tuned["rate"], tuned["settings"])[0]
    return {"tuning": tuned, "loss": score(losses)[: len(REPORTED)].tolist()}


def table(regime: str, tasks: dict[str, Any]) -> str:
    rows = []
    for label, task in tasks.items():
        least = task["least_loss"] if regime == "online" else 0.0
        row = [label, tables.number(task["least_loss"])]
        for name in SHOWN:
            cell = task["methods"][name]
            numbers = [np.inf if x is None else x - least for x in cell["loss"]]
            edge = "" if cell["tuning"]["interior"] else ", edge"
            row.append(tables.mean(numbers) + edge)
        rows.append(row)
    columns = ["features", "least loss", *(METHODS[name].label for name in SHOWN)]
    return f"\n### {regime}\n\n{tables.table(columns, rows)}"


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("benchmarks.convex", __doc__)
    parser.add_argument("--tasks", nargs="+", choices=SOURCES, default=list(SOURCES))
    options = parser.parse(arguments)
    results = Results(options, {"regimes": REGIMES}, jax, optax, np, bma)
    labels = [(n, f) for n in options.tasks for f in ("as they come", "standardised")]
    total = len(REGIMES) * len(labels) * len(SHOWN)
    with tqdm(total=total, unit="cell", disable=None) as bar:
        for regime, (steps, batch_size) in REGIMES.items():
            for name, features in labels:
                standardised = features == "standardised"
                task = task_of(name, standardised, steps, batch_size)
                keys = regime, f"{name}, {features}"
                results.cell(functools.partial(least_loss, task), *keys, "least_loss")
                for method in SHOWN:
                    cell = functools.partial(measure, task, method, regime == "online")
                    results.cell(cell, *keys, "methods", method)
                    bar.update()
    for regime in REGIMES:
        print(table(regime, results.content[regime]))
    results.finish()


if __name__ == "__main__":
    main()
