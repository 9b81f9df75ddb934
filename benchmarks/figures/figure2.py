"""Figure 2 of the report: AdaGrad and its approximations train conv nets.

    python -m benchmarks.figures.figure2
    python -m benchmarks.figures.figure2 --dataset mnist --data-dir DIR
    python -m benchmarks.figures.figure2 --dataset cifar10 --data-dir DIR

Every method sees the same initial weights and the same batches at every learning rate;
the rate with the lowest final training loss is shown. AdaGrad-Full holds a d x d
matrix, so it takes part on a tiny net only, on digits. Each run is kept epoch by epoch:
what is interrupted goes on at a second start.
"""

import argparse
import functools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import optax
from tqdm import tqdm

import bma_optax as bma
from benchmarks.figures.look import look
from benchmarks.figures.pictures import draw
from benchmarks.figures.training import MakeOptimizer, Problem, Run
from benchmarks.harness import datasets
from benchmarks.harness.results import machine


def optimizers(options: Any) -> dict[str, MakeOptimizer]:
    return {
        # Optax starts its sum of squares from 0.1, the report and bma_optax from 0:
        # with 0 for all, only the off-diagonal of the matrix makes the difference.
        "AdaGrad-Diag": functools.partial(optax.adagrad, initial_accumulator_value=0.0),
        # One block for the weights of a layer and one for its bias, as in the report.
        "AdaGrad-BMA": functools.partial(
            bma.adagrad_bma,
            partition=bma.per_leaf,
            min_eigenvalue=options.min_eigenvalue,
        ),
        "AdaGrad-Full": functools.partial(
            bma.adagrad_bma, partition=bma.per_element, min_eigenvalue=0.0
        ),
    }


PAIR = ["AdaGrad-Diag", "AdaGrad-BMA"]
# Channels of the convolutions, each of which halves the image.
NETS = {"small": (16, 32), "large": (32, 64, 128)}
TINY = (4, 4)
DEFAULTS = {"digits": (20, 3), "mnist": (1, 3), "cifar10": (2, 3)}  # Epochs, seeds.


def study(problem: Problem, methods: list[str], options: Any) -> dict[str, Any]:
    """All methods, learning rates and seeds on one net."""
    results, makers = {}, optimizers(options)
    total = len(methods) * len(options.learning_rates) * options.seeds + 1
    with tqdm(total=total * problem.epochs, unit="epoch") as bar:
        for method in methods:
            make = makers[method]
            step, compile_seconds = problem.compile(make)
            runs: dict[float, list[Run]] = {}
            for rate in options.learning_rates:
                runs[rate] = []
                for seed in range(options.seeds):
                    bar.set_description(f"{method}, rate {rate:g}, seed {seed}")
                    run = problem.run(f"{method}-{rate:g}", make, step, rate, seed, bar)
                    runs[rate].append(run)
            results[method] = summary(runs, compile_seconds)
        rate, seen = results["AdaGrad-BMA"]["best_learning_rate"], None
        if rate is not None:
            bar.set_description("what the matrix looks like")
            seen = look(problem, {m: makers[m] for m in methods}, rate, bar)
    return {
        "parameters": optax.tree.size(problem.params),
        "methods": results,
        "look": seen,
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
    if result["look"]:
        for pair, degrees in result["look"]["angles"].items():
            least, median, most = np.quantile(degrees, (0, 0.5, 1))
            lines.append(
                f"Degrees between updates of {pair}, along AdaGrad-BMA: median "
                f"{median:.2g} ({least:.2g} to {most:.2g})."
            )
        least, median, most = np.quantile(result["look"]["corrections"], (0, 0.5, 1))
        lines.append(
            "AdaGrad-BMA's correction over AdaGrad-Diag's update: median "
            f"{median:.1e} ({least:.1e} to {most:.1e})."
        )
    return "\n".join(lines)


def spread(values: list[float], form: str) -> str:
    """The mean over seeds, with the extremes."""
    extremes = f" ({min(values):{form}} to {max(values):{form}})"
    return f"{np.mean(values):{form}}" + (extremes if len(values) > 1 else "")


def plain(value: Any) -> Any:
    """For JSON: lists for arrays, six digits, null for what is not finite."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # The report has 1 to 0.0001; the best rate of AdaGrad-Full was its edge.
    rates = [10.0, 1.0, 0.1, 0.01, 0.001, 0.0001]
    add = parser.add_argument
    add("--dataset", choices=list(DEFAULTS), default="digits")
    add("--data-dir", type=Path, help="the folder of MNIST's or CIFAR-10's files")
    add("--epochs", type=int, help="default: 20, MNIST 1, CIFAR-10 2")
    add("--batch-size", type=int, default=128)
    add("--seeds", type=int, help="how many; default: 3")
    add("--learning-rates", type=float, nargs="+", default=rates)
    add("--min-eigenvalue", type=float, default=0.3, help="AdaGrad-BMA's floor of M")
    add("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    epochs, seeds = DEFAULTS[options.dataset]
    options.epochs = epochs if options.epochs is None else options.epochs
    options.seeds = seeds if options.seeds is None else options.seeds
    counts = options.epochs, options.batch_size, options.seeds
    if min(*counts, *options.learning_rates) <= 0:
        parser.error("every number must be positive")
    return options


def keeping_folder(path: Path, content: dict[str, Any]) -> Path:
    """Where runs are kept; emptied if they were of other settings or versions."""
    folder = path.with_name(f".{path.name}_runs")
    header, text = folder / "header.json", json.dumps(plain(content), sort_keys=True)
    if not (header.exists() and header.read_text() == text):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        header.write_text(text)
    return folder


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    try:
        data = datasets.load(options.dataset, options.data_dir)
    except datasets.DataError as error:
        raise SystemExit(str(error)) from None
    if options.batch_size > len(data.train_labels):
        raise SystemExit(f"--batch-size exceeds the {len(data.train_labels)} images.")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"figure2_{options.dataset}"
    recorded = "dataset epochs batch_size seeds learning_rates min_eigenvalue".split()
    content = {
        "options": {key: getattr(options, key) for key in recorded},
        **machine(jax, optax, flax, np, bma),
    }
    folder = keeping_folder(path, content)

    nets = {net: (channels, PAIR) for net, channels in NETS.items()}
    if options.dataset == "digits":  # 8 x 8: no larger net, but one for AdaGrad-Full.
        nets = {"small": nets["small"], "tiny": (TINY, [*PAIR, "AdaGrad-Full"])}
    results = {}
    for net, (channels, methods) in nets.items():
        problem = Problem(data, channels, options, folder / net)
        results[net] = study(problem, methods, options)
        print(table(net, results[net]), flush=True)
    draw(results, options.dataset, path.with_suffix(".png"))
    text = json.dumps(plain(content | {"nets": results}), allow_nan=False)
    path.with_suffix(".json").write_text(text + "\n")
    shutil.rmtree(folder)
    print(f"\nWrote {path}.png and .json")


if __name__ == "__main__":
    main()
