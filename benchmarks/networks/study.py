"""How networks.py measures: tuning on another seed, fresh seeds, timings in turns."""

import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.networks.methods import Method
from benchmarks.networks.tasks import Task

RATES = 6  # Neighbouring powers of 2 that one call tries.
CALLS = 6  # At most so many extensions of a grid.
POINTS = 40  # Of a curve.


class Trainer:
    """Compiled training of a net by a method; many runs at once, nothing shared."""

    def __init__(self, task: Task, method: Method) -> None:
        self.task, self.method = task, method
        self.data = jax.tree.map(jnp.asarray, task.train), in_chunks(task.test)
        # One after the other where LAPACK is called: batches of matrices in a loop can
        # wait for themselves for ever on a CPU with few cores (JAX 0.10.2).
        one_by_one, at_once = jax.lax.map, lambda run, each: jax.vmap(run)(each)
        every = one_by_one if method.factorizes else at_once
        self.runs = jax.jit(
            lambda arguments, data: every(lambda each: self.run(each, data), arguments)
        )

    def run(self, arguments, data):
        train, test = data
        seed, rate, settings, batches = arguments
        tx = self.method.make(**settings)
        params = self.task.init(jax.random.key(seed))
        start = params, tx.init(params)

        def step(carry, rows):
            return one_step(self.task, tx, rate, carry, train, rows)

        (params, _), losses = jax.lax.scan(step, start, batches)
        test_losses = jax.lax.map(lambda part: self.task.loss(params, part), test)
        return losses, jnp.mean(test_losses)

    def __call__(self, seeds: list[int], rates: list[float], settings: dict):
        """The losses of every step (runs, steps), and of the test set (runs,)."""
        batches = np.stack([self.task.batches(seed) for seed in seeds])
        settings = {key: np.full(len(seeds), x) for key, x in settings.items()}
        arguments = np.array(seeds), np.array(rates), settings, batches
        arguments = jax.tree.map(
            lambda x: x.astype(np.float32) if x.dtype.kind == "f" else x, arguments
        )
        losses, test = jax.device_get(self.runs(arguments, self.data))
        return np.asarray(losses, np.float64), np.asarray(test, np.float64)


def one_step(task: Task, tx, rate, carry, data, rows):
    params, state = carry
    examples = jax.tree.map(lambda array: array[rows], data)
    loss, grads = jax.value_and_grad(task.loss)(params, examples)
    updates, state = tx.update(grads, state, params)
    params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
    return (params, state), loss


def in_chunks(arrays: Any, most: int = 500) -> Any:
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


def tune(trainer: Trainer, seed: int) -> dict[str, Any]:
    """The best settings and rate: grids grow until the best rate has neighbours."""
    method = trainer.method
    variants = method.variants()
    grids: list[dict[int, float]] = [{} for _ in variants]

    def evaluate(i: int, least: int) -> None:
        powers = range(least, least + RATES)
        rates = [2.0**k for k in powers]
        losses, _ = trainer([seed] * RATES, rates, variants[i])
        grids[i].update(zip(powers, final(losses).tolist(), strict=True))

    for i in range(len(variants)):
        evaluate(i, method.start - RATES // 2)
    for _ in range(CALLS):
        i = min(range(len(grids)), key=lambda i: min(grids[i].values()))
        best = min(grids[i], key=grids[i].get)
        low, high = min(grids[i]), max(grids[i])
        if low < best < high:
            break
        # If all diverge, `best` is the least rate, and less is the way to go.
        evaluate(i, low - RATES if best == low else high + 1)
    i = min(range(len(grids)), key=lambda i: min(grids[i].values()))
    best = min(grids[i], key=grids[i].get)
    return {
        "settings": variants[i],
        "rate": 2.0**best,
        "interior": min(grids[i]) < best < max(grids[i]),
        "grids": [
            {"settings": v, "losses": {str(2.0**k): g[k] for k in sorted(g)}}
            for v, g in zip(variants, grids, strict=True)
        ],
    }


def study(task: Task, method: Method, seeds: list[int], adam: dict | None) -> dict:
    """One cell of the table: a tuned method on fresh seeds."""
    start = time.perf_counter()
    trainer = Trainer(task, method)
    tuned = tune(trainer, seed=0)
    # As many runs at once as in tuning, whose program serves again.
    parts = [seeds[i : i + RATES] for i in range(0, len(seeds), RATES)]
    results = []
    for part in parts:
        padded = part + [part[-1]] * (RATES - len(part))
        losses, test = trainer(padded, [tuned["rate"]] * RATES, tuned["settings"])
        results.append((losses[: len(part)], test[: len(part)]))
    losses, test = (np.concatenate(x) for x in zip(*results, strict=True))
    targets = final(losses) if adam is None else np.array(adam["train_loss"])
    points = np.array_split(np.arange(task.steps), min(POINTS, task.steps))
    return {
        "tuning": tuned,
        "train_loss": final(losses).tolist(),
        "test_loss": test.tolist(),
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


class Stopwatch:
    """One run's steps, compiled alone, with the state given away as in training."""

    def __init__(self, task: Task, tx, rate: float, steps: int) -> None:
        train = jax.tree.map(jnp.asarray, task.train)
        params = task.init(jax.random.key(1))
        self.carry = params, tx.init(params)
        # Constants that are shared cannot be given away twice.
        self.carry = jax.tree.map(jnp.array, self.carry)
        self.state_bytes = sum(x.nbytes for x in jax.tree.leaves(self.carry[1]))
        self.params_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
        self.batches = jnp.asarray(task.batches(1)[:steps])

        def run(carry, data, batches):
            def step(carry, rows):
                return one_step(task, tx, rate, carry, data, rows)

            return jax.lax.scan(step, carry, batches)[0]

        start = time.perf_counter()
        lowered = jax.jit(run, donate_argnums=0).lower(self.carry, train, self.batches)
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - start
        self.train, self.seconds = train, []
        self()  # Once to warm up; it counts for nothing.
        self.seconds.clear()

    def __call__(self) -> None:
        start = time.perf_counter()
        self.carry = self.compiled(self.carry, self.train, self.batches)
        jax.block_until_ready(self.carry)
        seconds = time.perf_counter() - start
        self.seconds.append(seconds / len(self.batches))


def timings(task: Task, methods: dict[str, tuple[Any, float]], repeats: int, bar):
    """Seconds a step of each (transformation, rate), all in turns, and bytes of state.

    Beside them, as "gradient", a step of SGD: what no method can do without.
    """
    steps = min(50, task.steps)
    methods = {"gradient": (optax.identity(), 1e-3)} | methods
    watches = {}
    for name, (tx, rate) in methods.items():
        bar.set_postfix_str(f"{name}, to be timed")
        watches[name] = Stopwatch(task, tx, rate, steps)
        bar.update()
    for _ in range(repeats):
        for watch in watches.values():
            watch()
    return {
        name: {
            "seconds_per_step": statistics.median(watch.seconds),
            "range": [min(watch.seconds), max(watch.seconds)],
            "compile_seconds": watch.compile_seconds,
            "state_over_params": watch.state_bytes / watch.params_bytes,
        }
        for name, watch in watches.items()
    }
