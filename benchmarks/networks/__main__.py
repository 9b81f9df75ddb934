"""AdaGrad-BMA and its kin on networks, beside their controls and peers.

    python -m benchmarks.networks
    python -m benchmarks.networks --tasks conv --methods units_learned soap --out c.json
    python -m benchmarks.networks --add --methods mini_bma
    python -m benchmarks.networks --data-dir DIR --out images.json
    python -m benchmarks.networks --tasks mlp_global --times 10 --out longer.json
    python -m benchmarks.networks --tasks transformer_large --out large.json

Small nets on scikit-learn's digits and on the sources of Python's own library; with
--data-dir larger conv nets on MNIST and CIFAR-10; and on request nets of millions of
parameters, for a GPU. Every method is tuned alike: rates are powers of 2, more of them
until the best one has worse neighbours, with every combination of its settings, by the
training loss of the last tenth of the steps, its mean over three seeds. Then fresh
seeds: the same initial weights and batches for all methods.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

import bma_optax as bma
from benchmarks.harness import datasets
from benchmarks.harness.results import Parser, Results, positive
from benchmarks.networks.methods import METHODS
from benchmarks.networks.report import draw, summary, table
from benchmarks.networks.study import study
from benchmarks.networks.tasks import FILES, LARGE, TASKS, Task, make


def run(name: str, task: Task, options: Any, results: Results, bar: tqdm) -> dict:
    """One task, cell by cell."""

    def facts():
        return {
            "parameters": optax.tree.size(task.init(jax.random.key(0))),
            "steps": task.steps,
            "batch_size": task.batch_size,
            "examples": [len(task.train[0]), len(task.test[0])],
            "methods": {},
        }

    def method_on_task(method):
        adam = result["methods"].get("adam")
        return study(task, METHODS[method], list(range(1, 1 + options.seeds)), adam)

    result = results.cell(facts, "tasks", name)
    for method in options.methods:
        bar.set_postfix_str(f"{name}: {method}")
        keys = "tasks", name, "methods", method
        results.cell(lambda method=method: method_on_task(method), *keys)
        bar.update()
    return result


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("benchmarks.networks", __doc__)
    add = parser.add_argument
    add("--data-dir", type=Path, help="the folder of MNIST's and CIFAR-10's files")
    add("--tasks", nargs="+", choices=(*TASKS, *FILES, *LARGE))
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    add("--seeds", type=positive, default=6, help="how many; default: 6")
    add("--times", type=positive, default=1, help="so many times the steps")
    add("--small", action="store_true", help="tiny nets and few steps, to try it out")
    options = parser.parse(arguments)
    options.tasks = options.tasks or (FILES if options.data_dir else TASKS)
    # Adam comes first: the others are measured against it.
    chosen = {"adam", *options.methods}
    options.methods = [name for name in METHODS if name in chosen]
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    names = "seeds", "times", "small"
    shared = {name: getattr(options, name) for name in names}
    results = Results(options, shared, jax, optax, np, bma)
    total = len(options.tasks) * len(options.methods)
    with tqdm(total=total, unit="cell", disable=None) as bar:
        for name in options.tasks:
            try:
                task = make(name, options.data_dir, options.small, options.times)
            except datasets.DataError as error:
                raise SystemExit(str(error)) from None
            bar.write(table(name, run(name, task, options, results, bar)))
    tasks = results.content["tasks"]
    print(summary(tasks))
    results.finish()
    draw(tasks, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
