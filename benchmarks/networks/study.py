"""How this study measures: tuning on other seeds, then fresh ones."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.tuning import grow
from benchmarks.networks.methods import Method
from benchmarks.networks.tasks import Task

# With one seed, a rate at which a net diverges and then fits all it has seen may win.
TUNING_SEEDS = (0, 100, 200)
RATES = 6  # Neighbouring powers of 2 that one call tries.
RUNS = RATES * len(TUNING_SEEDS)  # At once; as many on fresh seeds: one program.
LARGE = 100_000  # Parameters; of larger nets RATES runs go on at once, on a CPU one.
POINTS = 40  # Of a curve.


class Trainer:
    """Compiled training of a net by a method; many runs at once, nothing shared."""

    def __init__(self, task: Task, method: Method) -> None:
        self.task, self.method = task, method
        shapes = jax.eval_shape(task.init, jax.random.key(0))
        large = sum(x.size for x in jax.tree.leaves(shapes)) > LARGE
        test = in_chunks(task.test, 100 if large else 500)
        self.data = jax.tree.map(jnp.asarray, task.train), test
        # One after the other where LAPACK is called: batches of matrices in a loop can
        # wait for themselves for ever on a CPU with few cores (JAX 0.10.2). Large nets
        # too: ten steps on MNIST took 1.6 times as long where six runs went on at once.
        one_by_one = jax.default_backend() == "cpu" and (method.factorizes or large)
        at_once = None if one_by_one else RATES if large else RUNS
        self.padded = at_once == RUNS  # Fresh seeds are repeated: one program.
        self.runs = jax.jit(
            lambda arguments, data: jax.lax.map(
                lambda each: self.run(each, data), arguments, batch_size=at_once
            )
        )

    def run(self, arguments, data):
        train, test = data
        seed, rate, settings, batches = arguments
        tx = self.method.make(**settings)
        params = self.task.init(jax.random.key(seed))

        def step(carry, rows):
            params, state = carry
            examples = jax.tree.map(lambda array: array[rows], train)
            loss, grads = jax.value_and_grad(self.task.loss)(params, examples)
            updates, state = tx.update(grads, state, params)
            params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
            return (params, state), loss

        (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), batches)
        test_losses = jax.lax.map(lambda part: self.task.loss(params, part), test)
        return losses, jnp.mean(test_losses)

    def __call__(self, seeds: Sequence[int], rate: Any, settings: dict):
        """Losses of every step (runs, steps), and of the test set (runs,)."""
        batches = np.stack([self.task.batches(seed) for seed in seeds])
        rates = np.broadcast_to(np.float32(rate), len(seeds))
        settings = {k: np.full(len(seeds), x, np.float32) for k, x in settings.items()}
        arguments = np.array(seeds), rates, settings, batches
        losses, test = self.runs(arguments, self.data)
        return np.asarray(losses, np.float64), np.asarray(test, np.float64)


def in_chunks(arrays: Any, most: int) -> Any:
    """Leading axes cut in two, short of a rest that is smaller than their number."""
    rows = len(arrays[0])
    count = math.ceil(rows / most)
    return jax.tree.map(
        lambda a: jnp.asarray(
            a[: rows // count * count].reshape(count, -1, *a.shape[1:])
        ),
        arrays,
    )


def window(steps: int) -> int:
    """The last tenth."""
    return math.ceil(steps / 10)


def final(losses: np.ndarray) -> np.ndarray:
    """Mean training loss over the last tenth of the steps; infinite if it diverged."""
    means = losses[:, -window(losses.shape[1]) :].mean(axis=1)
    return np.where(np.isfinite(means), means, np.inf)


def tune(trainer: Trainer, score: Callable = final) -> dict[str, Any]:
    """The best settings and rate, of grids that grow until the best rate is inside.

    ``score``: losses of every step (runs, steps) -> a number a run, less is better.
    """
    variants = trainer.method.variants()

    def evaluate(i: int, rates: list[float]) -> list[float]:
        seeds = np.repeat(TUNING_SEEDS, RATES)
        losses = trainer(seeds, np.resize(rates, RUNS), variants[i])[0]
        return score(losses).reshape(-1, RATES).mean(axis=0).tolist()

    return grow(evaluate, variants, trainer.method.start, RATES)


def study(task: Task, method: Method, seeds: list[int], adam: dict | None) -> dict:
    """One cell of the table: a tuned method on fresh seeds."""
    start = time.perf_counter()
    trainer = Trainer(task, method)
    tuned = tune(trainer)
    runs = np.resize(seeds, max(len(seeds), RUNS)) if trainer.padded else seeds
    losses, test = trainer(runs, tuned["rate"], tuned["settings"])
    losses, test = losses[: len(seeds)], test[: len(seeds)]
    targets = final(losses) if adam is None else np.array(adam["train_loss"], float)
    points = np.array_split(np.arange(task.steps), min(POINTS, task.steps))
    return {
        "tuning": tuned,
        "train_loss": final(losses),
        "test_loss": test,
        "steps_to_adam": steps_to(losses, targets),
        "curve": {
            "step": [int(part[-1]) + 1 for part in points],
            "loss": [float(losses[:, part].mean()) for part in points],
        },
        "study_seconds": time.perf_counter() - start,
    }


def steps_to(losses: np.ndarray, targets: np.ndarray) -> list[int | None]:
    """When each run's mean over a tenth of all steps first is at its target."""
    width = window(losses.shape[1])
    sums = np.cumsum(np.pad(losses, ((0, 0), (1, 0))), axis=1)
    means = (sums[:, width:] - sums[:, :-width]) / width
    # Sums lose digits: Adam reaches its own loss at the last step at the latest.
    there = means <= targets[:, None] * (1 + 1e-9)
    return [int(row.argmax()) + width if row.any() else None for row in there]
