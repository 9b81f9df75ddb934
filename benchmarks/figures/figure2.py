"""Figure 2 of Lu et al. (2018): AdaGrad and its approximations train conv nets.

    python -m benchmarks.figures.figure2
    python -m benchmarks.figures.figure2 --dataset mnist --data-dir DIR
    python -m benchmarks.figures.figure2 --dataset cifar10 --data-dir DIR
    python -m benchmarks.figures.figure2 --nets small --untimed --out small.json

Every method sees the same initial weights and the same batches at every learning rate;
the rate with the lowest final training loss is shown. AdaGrad-Full holds a d x d
matrix, so it takes part on a tiny net only, on digits. With --untimed seconds are left
out: other runs share the device.
"""

import argparse
import functools
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
from benchmarks.figures.training import MakeOptimizer, Problem
from benchmarks.harness import datasets, tables
from benchmarks.harness.results import Parser, Results, positive
from benchmarks.harness.tuning import best_of

FULL, UNITS = "AdaGrad-Full", bma.within("array", bma.per_unit)
OPTIMIZERS: dict[str, MakeOptimizer] = {
    # Optax starts its sum of squares from 0.1, the paper and bma_optax from 0: with 0
    # for all, only the off-diagonal of the matrix makes the difference.
    "AdaGrad-Diag": lambda rate: optax.adagrad(rate, initial_accumulator_value=0.0),
    # One block for the weights of a layer and one for its bias, as in the paper.
    "AdaGrad-BMA": lambda rate: bma.adagrad_bma(rate, partition=bma.per_leaf),
    # The same with one block a unit, and the units of an array seeing each other.
    "BMA, units": lambda rate: bma.adagrad_bma(
        rate, partition=UNITS, estimator="report"
    ),
    # Eq. (2) for each unit alone: two numbers a block.
    "BMA, units alone": lambda rate: bma.adagrad_bma(rate, partition=bma.units),
    "BMA, units alone, learned weights": lambda rate: bma.adagrad_bma(
        rate, partition=bma.units, weights="learned"
    ),
    FULL: lambda rate: bma.adagrad_bma(
        rate, partition=bma.per_element, min_eigenvalue=0.0
    ),
    "Adam": optax.adam,  # What most people would take.
}
LOOKED_AT = ("AdaGrad-Diag", "AdaGrad-BMA", FULL)
# Channels of the convolutions, each of which halves the image.
NETS = {"small": (16, 32), "large": (32, 64, 128)}
# Digits are 8 x 8: no larger net, but one for AdaGrad-Full.
DIGITS = {"small": (16, 32), "tiny": (4, 4)}
EPOCHS = {"digits": 20, "mnist": 1, "cifar10": 2}


def makers_of(net: str) -> dict[str, MakeOptimizer]:
    """The optimisers on a net: AdaGrad-Full on the tiny one alone."""
    return {m: make for m, make in OPTIMIZERS.items() if m != FULL or net == "tiny"}


def nets_of(options: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    return DIGITS if options.dataset == "digits" else NETS


def study(net: str, data: Any, options: Any, results: Results, bar: tqdm):
    """All methods, learning rates and seeds on one net, run by run."""
    problem, rows = Problem(data, nets_of(options)[net], options), {}
    makers = makers_of(net)
    for method, make in makers.items():
        step, compile_seconds = problem.compile(make)
        for rate in options.learning_rates:
            for seed in range(options.seeds):
                bar.set_description(f"{net}: {method}, rate {rate:g}, seed {seed}")
                results.cell(
                    functools.partial(problem.run, make, step, rate, seed),
                    *("runs_of_nets", net, method, rate, seed),
                )
                bar.update()
        runs = results.content["runs_of_nets"][net][method]
        seconds = {} if options.untimed else seconds_of(runs, compile_seconds)
        rows[method] = summary(runs) | seconds
    rate, seen = rows["AdaGrad-BMA"]["best_learning_rate"], None
    if rate is not None:
        bar.set_description(f"{net}: what the matrix looks like")
        seen = look(
            problem, {m: makers[m] for m in LOOKED_AT if m in makers}, float(rate)
        )
    return {
        "parameters": optax.tree.size(problem.params),
        "methods": rows,
        "look": seen,
    }


def seconds_of(runs: dict[str, dict[str, Any]], compile_seconds: float):
    steps = [run["seconds_per_step"] for each in runs.values() for run in each.values()]
    return {"seconds_per_step": np.median(steps), "compile_seconds": compile_seconds}


def summary(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The numbers of one method; the best rate is None if every rate diverged."""

    def of(rate, key):
        return [np.nan if run[key] is None else run[key] for run in runs[rate].values()]

    losses = {float(rate): np.mean(of(rate, "train_loss")) for rate in runs}
    best, on_edge = best_of(losses)
    shown = {float(rate): list(each.values()) for rate, each in runs.items()}.get(best)
    diverged = not np.isfinite(losses[best])
    return {
        "best_learning_rate": None if diverged else best,
        "best_on_edge_of_grid": on_edge and not diverged,
        "train_loss": {r: of(r, "train_loss") for r in runs},
        "test_accuracy": {r: of(r, "test_accuracy") for r in runs},
        "curve": None
        if diverged
        else {"step": shown[0]["step"], "loss": [run["loss"] for run in shown]},
    }


def table(net: str, result: dict[str, Any]) -> str:
    """The methods on one net in Markdown, and what to know beside them."""
    columns = ["method", "best learning rate", "training loss", "test accuracy"]
    timed = all("seconds_per_step" in row for row in result["methods"].values())
    columns += ["seconds per step", "seconds to compile"] if timed else []
    rows = []
    for method, row in result["methods"].items():
        rate, cells = row["best_learning_rate"], [method, "none, all diverged", "", ""]
        if rate is not None:
            # The keys of JSON are the numbers' strings.
            loss, accuracy = (
                next(x for key, x in row[name].items() if float(key) == rate)
                for name in ("train_loss", "test_accuracy")
            )
            cells = [method, f"{rate:g}", tables.mean(loss)]
            cells.append(tables.mean(accuracy, ".3f"))
        if timed:
            cells.append(f"{row['seconds_per_step']:.2g}")
            cells.append(f"{row['compile_seconds']:.2g}")
        rows.append(cells)
    lines = [f"\n### {net} net, {result['parameters']} parameters\n"]
    lines.append(tables.table(columns, rows))
    edge = [m for m, row in result["methods"].items() if row["best_on_edge_of_grid"]]
    lines.append(f"\nBest rate on the edge of the grid: {', '.join(edge) or 'none'}.")
    if result["look"]:
        for pair, degrees in result["look"]["angles"].items():
            lines.append(
                f"Degrees between updates of {pair}, along AdaGrad-BMA: median "
                f"{tables.middle(degrees, '.2g')}."
            )
        lines.append(
            "AdaGrad-BMA's correction over AdaGrad-Diag's update: median "
            f"{tables.middle(result['look']['corrections'], '.1e')}."
        )
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("benchmarks.figures.figure2", __doc__)
    # The paper has 1 to 0.0001; the best rate of AdaGrad-Full was its edge.
    rates = [10.0, 1.0, 0.1, 0.01, 0.001, 0.0001]
    add = parser.add_argument
    add("--dataset", choices=list(EPOCHS), default="digits")
    add("--data-dir", type=Path, help="the folder of MNIST's or CIFAR-10's files")
    add("--nets", nargs="+", choices=("small", "large", "tiny"))
    add("--untimed", action="store_true", help="leave seconds out")
    add("--epochs", type=positive, help="default: 20, MNIST 1, CIFAR-10 2")
    add("--batch-size", type=positive, default=128)
    add("--seeds", type=positive, default=3, help="how many; default: 3")
    add("--learning-rates", type=float, nargs="+", default=rates)
    options = parser.parse(arguments)
    options.epochs = options.epochs or EPOCHS[options.dataset]
    unknown = {*(options.nets or ())} - {*nets_of(options)}
    if unknown:
        parser.error(f"{options.dataset} has no net {', '.join(unknown)}")
    if options.out == parser.get_default("out"):
        options.out = options.out.with_stem(f"figure2_{options.dataset}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    try:
        data = datasets.load(options.dataset, options.data_dir)
    except datasets.DataError as error:
        raise SystemExit(str(error)) from None
    if options.batch_size > len(data.train_labels):
        raise SystemExit(f"--batch-size exceeds the {len(data.train_labels)} images.")
    names = "dataset epochs batch_size seeds learning_rates".split()
    shared = {name: getattr(options, name) for name in names}
    results = Results(options, shared, jax, optax, flax, np, bma)
    nets = options.nets or list(nets_of(options))
    each = len(options.learning_rates) * options.seeds
    total = each * sum(len(makers_of(net)) for net in nets)
    with tqdm(total=total, unit="run", disable=None) as bar:
        for net in nets:
            found = results.cell(
                functools.partial(study, net, data, options, results, bar), "nets", net
            )
            bar.write(table(net, found))
    results.content.pop("runs_of_nets", None)  # All that is shown is in `nets`.
    results.finish()
    draw(results.content["nets"], options.dataset, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
