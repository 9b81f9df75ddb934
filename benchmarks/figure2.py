"""Figure 2 of the report: AdaGrad and its approximations train conv nets.

    python benchmarks/figure2.py
    python benchmarks/figure2.py --dataset mnist --data-dir DIR
    python benchmarks/figure2.py --dataset cifar10 --data-dir DIR

Every method sees the same initial weights and the same batches at every learning rate;
the rate with the lowest final training loss is shown. AdaGrad-Full holds a d x d
matrix, so it takes part on a tiny net only, on digits.
"""

import argparse
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import _data
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _machine import machine
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

import bma_optax as bma

MakeOptimizer = Callable[[Any], optax.GradientTransformation]

METHODS: dict[str, MakeOptimizer] = {
    # Optax starts its sum of squares from 0.1, the report and bma_optax from 0: with 0
    # for all, the off-diagonal of the matrix is the only difference between methods.
    "AdaGrad-Diag": functools.partial(optax.adagrad, initial_accumulator_value=0.0),
    "AdaGrad-BMA": functools.partial(bma.adagrad_bma, partition=bma.per_leaf),
    "AdaGrad-Full": functools.partial(
        bma.adagrad_bma, partition=bma.per_element, min_eigenvalue=0.0
    ),
}
STYLES = {"AdaGrad-Diag": "C0-", "AdaGrad-BMA": "C1--", "AdaGrad-Full": "C2-."}
TINY, SMALL = (4, 4), (16, 32)  # Channels of the two convolutions.
DEFAULTS = {"digits": (20, 3), "mnist": (2, 1), "cifar10": (5, 1)}  # Epochs, seeds.


class ConvNet(nnx.Module):
    """Two convolutions that halve the image, then a linear layer."""

    def __init__(self, shape: tuple[int, ...], channels: tuple[int, int], seed: int):
        height, width, depth = shape
        first, second = channels
        features = math.ceil(height / 4) * math.ceil(width / 4) * second
        rngs = nnx.Rngs(seed)
        self.conv1 = nnx.Conv(depth, first, (3, 3), strides=2, rngs=rngs)
        self.conv2 = nnx.Conv(first, second, (3, 3), strides=2, rngs=rngs)
        self.linear = nnx.Linear(features, _data.CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        hidden = nnx.relu(self.conv2(nnx.relu(self.conv1(images))))
        return self.linear(hidden.reshape(len(images), -1))


class Run(NamedTuple):
    """One training: a method, a learning rate, a seed."""

    losses: np.ndarray  # Of each step's batch.
    changes: np.ndarray  # `change_from_diagonal` of each step; 0 if not measured.
    train_loss: float  # Of the whole training set, at the end. Not finite: diverged.
    test_accuracy: float
    seconds: list[float]  # Per step, one entry an epoch.


class Problem:
    """A net, its data and its batches: what all methods and learning rates share."""

    def __init__(
        self, data: _data.Dataset, channels: tuple[int, int], options: Any
    ) -> None:
        self.train = jnp.asarray(data.train_images), jnp.asarray(data.train_labels)
        self.test = jnp.asarray(data.test_images), jnp.asarray(data.test_labels)
        self.net = functools.partial(ConvNet, data.train_images.shape[1:], channels)
        self.graphdef, self.params = nnx.split(self.net(seed=0))
        self.epochs, self.batch_size = options.epochs, options.batch_size
        self.steps = len(data.train_labels) // self.batch_size  # Per epoch.

    @functools.partial(jax.jit, static_argnums=0)
    def logits(self, params: Any, images: jax.Array) -> jax.Array:
        return nnx.merge(self.graphdef, params)(images)

    def evaluate(
        self, params: Any, images: jax.Array, labels: jax.Array
    ) -> tuple[float, float]:
        """Mean loss and accuracy over a whole data set, some images at a time."""
        starts = range(0, len(images), 1000)
        parts = [self.logits(params, images[start : start + 1000]) for start in starts]
        logits = jnp.concatenate(parts)
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == labels)
        return float(cross_entropy(logits, labels)), float(accuracy)

    def compile(
        self, make: MakeOptimizer, compare: bool = False
    ) -> tuple[Callable, float]:
        """One step for all learning rates, and the seconds its compilation took."""

        # Not a scan over the batches: on a CPU, XLA's convolutions are some ten times
        # slower inside a loop than outside.
        def step(params, state, rate, train, batch):
            images, labels = (array[batch] for array in train)
            loss, grads = jax.value_and_grad(
                lambda params: cross_entropy(self.logits(params, images), labels)
            )(params)
            updates, next_state = make(rate).update(grads, state, params)
            change = jnp.zeros(())
            if compare:
                change = change_from_diagonal(updates, grads, state, rate)
            return optax.apply_updates(params, updates), next_state, (loss, change)

        state = make(1.0).init(self.params)
        batch = np.zeros(self.batch_size, np.int32)
        start = time.perf_counter()
        lowered = jax.jit(step).lower(self.params, state, 1.0, self.train, batch)
        return lowered.compile(), time.perf_counter() - start

    def run(
        self, make: MakeOptimizer, step: Callable, rate: float, seed: int, bar: tqdm
    ) -> Run:
        params = nnx.state(self.net(seed))
        state = make(1.0).init(params)
        rng = np.random.default_rng(seed)
        logs, seconds = [], []
        for _ in range(self.epochs):
            order = rng.permutation(len(self.train[1])).astype(np.int32)
            start = time.perf_counter()
            for batch in order[: self.steps * self.batch_size].reshape(self.steps, -1):
                params, state, log = step(params, state, rate, self.train, batch)
                logs.append(log)
            jax.block_until_ready(params)
            seconds.append((time.perf_counter() - start) / self.steps)
            bar.update()
        train_loss, _ = self.evaluate(params, *self.train)
        _, accuracy = self.evaluate(params, *self.test)
        losses, changes = np.asarray(jax.device_get(logs)).T
        return Run(losses, changes, train_loss, accuracy, seconds)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def change_from_diagonal(updates: Any, grads: Any, state: Any, rate: Any) -> jax.Array:
    """|update - AdaGrad-Diag's| / |AdaGrad-Diag's|, both from the same state."""
    diagonal = optax.ScaleByRssState(optax.tree.get(state, "sum_of_squares"))
    scaled, _ = optax.scale_by_rss().update(grads, diagonal)
    difference = optax.tree.add_scale(updates, rate, scaled)
    return optax.tree.norm(difference) / (rate * optax.tree.norm(scaled))


def study(problem: Problem, methods: list[str], options: Any) -> dict[str, Any]:
    """All methods, learning rates and seeds on one net."""
    seeds = range(options.seeds)
    results, change = {}, None
    total = (len(methods) * len(options.learning_rates) + 1) * len(seeds)
    with tqdm(total=total * problem.epochs, unit="epoch") as bar:
        for method in methods:
            bar.set_description(method)
            make = METHODS[method]
            step, compile_seconds = problem.compile(make)
            runs = {
                rate: [problem.run(make, step, rate, seed, bar) for seed in seeds]
                for rate in options.learning_rates
            }
            results[method] = summary(runs, compile_seconds)
        rate = results["AdaGrad-BMA"]["best_learning_rate"]
        if rate is not None:
            bar.set_description("BMA against Diag")
            make = METHODS["AdaGrad-BMA"]
            step, _ = problem.compile(make, compare=True)
            runs = [problem.run(make, step, rate, seed, bar) for seed in seeds]
            changes = np.concatenate([run.changes for run in runs])
            least, median, most = np.quantile(changes, (0, 0.5, 1))
            change = {"min": least, "median": median, "max": most}
    return {
        "parameters": optax.tree.size(problem.params),
        "methods": results,
        "relative_change": change,
    }


def summary(runs: dict[float, list[Run]], compile_seconds: float) -> dict[str, Any]:
    """The numbers of one method; the best rate is None if every rate diverged."""
    losses = {rate: np.mean([run.train_loss for run in runs[rate]]) for rate in runs}
    finite = {rate: loss for rate, loss in losses.items() if np.isfinite(loss)}
    best = min(finite, key=finite.get, default=None)
    return {
        "best_learning_rate": best,
        "best_on_edge_of_grid": best in (min(runs), max(runs)),
        "train_loss": {r: [run.train_loss for run in runs[r]] for r in runs},
        "test_accuracy": {r: [run.test_accuracy for run in runs[r]] for r in runs},
        "seconds_per_step": np.median([run.seconds for r in runs for run in runs[r]]),
        "compile_seconds": compile_seconds,
        "curve": None if best is None else curve([run.losses for run in runs[best]]),
    }


def curve(losses: list[np.ndarray], points: int = 100) -> dict[str, np.ndarray]:
    """Batch losses of each seed, thinned to means over consecutive steps."""
    parts = np.array_split(np.stack(losses), min(points, losses[0].size), axis=1)
    steps = np.cumsum([part.shape[1] for part in parts])
    return {"step": steps, "loss": np.stack([part.mean(axis=1) for part in parts], 1)}


def table(net: str, result: dict[str, Any]) -> str:
    """The methods on one net in Markdown, and what to know beside them."""
    columns = ["method", "best learning rate", "training loss", "test accuracy"]
    columns += ["seconds per step", "seconds to compile"]
    lines = [f"\n### {net} net, {result['parameters']} parameters\n"]
    lines += [f"| {' | '.join(columns)} |", "|--" * len(columns) + "|"]
    for method, row in result["methods"].items():
        rate = row["best_learning_rate"]
        cells = [method, "none, all diverged", "", ""]
        if rate is not None:
            loss = spread(row["train_loss"][rate], ".3g")
            accuracy = spread(row["test_accuracy"][rate], ".3f")
            cells = [method, f"{rate:g}", loss, accuracy]
        cells += [f"{row['seconds_per_step']:.2g}", f"{row['compile_seconds']:.2g}"]
        lines.append(f"| {' | '.join(cells)} |")
    edge = [m for m, row in result["methods"].items() if row["best_on_edge_of_grid"]]
    lines.append(f"\nBest rate on the edge of the grid: {', '.join(edge) or 'none'}.")
    if result["relative_change"]:
        numbers = [f"{key} {x:.1e}" for key, x in result["relative_change"].items()]
        lines.append(
            "Along AdaGrad-BMA, |update - AdaGrad-Diag's| / |AdaGrad-Diag's|: "
            f"{', '.join(numbers)}."
        )
    return "\n".join(lines)


def spread(values: list[float], form: str) -> str:
    """The mean over seeds, with the extremes."""
    extremes = f" ({min(values):{form}} to {max(values):{form}})"
    return f"{np.mean(values):{form}}" + (extremes if len(values) > 1 else "")


def draw(results: dict[str, Any], title: str, path: Path) -> None:
    figure = Figure(figsize=(5 * len(results), 3.8), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (net, result) in zip(panels, results.items(), strict=True):
        for method, row in result["methods"].items():
            if row["curve"] is None:
                continue
            step, loss = row["curve"]["step"], row["curve"]["loss"]
            label = f"{method}, rate {row['best_learning_rate']:g}"
            axes.plot(step, loss.mean(axis=0), STYLES[method], label=label)
            low, high = loss.min(axis=0), loss.max(axis=0)
            shade = {"color": STYLES[method][:2], "alpha": 0.2, "linewidth": 0}
            axes.fill_between(step, low, high, **shade)
            axes.legend(title=f"mean and range, seeds: {len(loss)}")
        axes.set(yscale="log", xlabel="step", ylabel="training loss of the batches")
        axes.set_title(f"{title}, {net} net, {result['parameters']} parameters")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def plain(value: Any) -> Any:
    """For JSON: lists for arrays, six digits, null for what is not finite."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rates = [1.0, 0.1, 0.01, 0.001, 0.0001]
    add = parser.add_argument
    add("--dataset", choices=list(DEFAULTS), default="digits")
    add("--data-dir", type=Path, help="the folder of MNIST's or CIFAR-10's files")
    add("--epochs", type=int, help="default: 20, MNIST 2, CIFAR-10 5")
    add("--batch-size", type=int, default=128)
    add("--seeds", type=int, help="how many; default: 3 on digits, else 1")
    add("--learning-rates", type=float, nargs="+", default=rates)
    add("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    epochs, seeds = DEFAULTS[options.dataset]
    options.epochs = epochs if options.epochs is None else options.epochs
    options.seeds = seeds if options.seeds is None else options.seeds
    counts = options.epochs, options.batch_size, options.seeds
    if min(*counts, *options.learning_rates) <= 0:
        parser.error("every number must be positive")
    return options


def main() -> None:
    options = parse_options()
    try:
        data = _data.load(options.dataset, options.data_dir)
    except _data.DataError as error:
        raise SystemExit(str(error)) from None
    if options.batch_size > len(data.train_labels):
        raise SystemExit(f"--batch-size exceeds the {len(data.train_labels)} images.")
    options.out.mkdir(parents=True, exist_ok=True)

    nets = {"small": (SMALL, ["AdaGrad-Diag", "AdaGrad-BMA"])}
    if options.dataset == "digits":
        nets["tiny"] = (TINY, list(METHODS))
    results = {}
    for net, (channels, methods) in nets.items():
        results[net] = study(Problem(data, channels, options), methods, options)
        print(table(net, results[net]), flush=True)

    path = options.out / f"figure2_{options.dataset}"
    draw(results, options.dataset, path.with_suffix(".png"))
    recorded = ("dataset", "epochs", "batch_size", "seeds", "learning_rates")
    modules = (jax, optax, flax, np, bma)
    content = {
        "options": {key: getattr(options, key) for key in recorded},
        **machine(*modules),
        "nets": results,
    }
    text = json.dumps(plain(content), allow_nan=False)
    path.with_suffix(".json").write_text(text + "\n")
    print(f"\nWrote {path}.png and .json")


if __name__ == "__main__":
    main()
