"""Mini-BMA, Adam-BMA and AdaGrad-BMA on networks, beside their controls and peers.

    python -m benchmarks.networks
    python -m benchmarks.networks --tasks conv --methods adam mini_bma soap
    python -m benchmarks.networks --tasks mlp_raw_norm --out normalised.json
    python -m benchmarks.networks --data-dir DIR --out mnist_and_cifar10.json
    python -m benchmarks.networks --tasks mlp_global --times 10 --out longer.json

Small nets on scikit-learn's digits and on the sources of Python's own library; with
--data-dir on MNIST (MLPs, autoencoder) and CIFAR-10 (conv nets). Every method is tuned
alike: rates are powers of 2, more of them until the best one has worse neighbours, with
every combination of its settings, by the mean training loss of the last tenth of the
steps on a seed of its own. Then fresh seeds: the same initial weights and batches for
all methods. Finished cells are kept in the output file, and a second start goes on.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

import bma_optax as bma
from benchmarks.harness import datasets
from benchmarks.harness.results import machine
from benchmarks.networks.angles import angles
from benchmarks.networks.costs import CHEAP, cost_table, costs
from benchmarks.networks.methods import METHODS
from benchmarks.networks.report import angle_table, draw, summary, table
from benchmarks.networks.study import study, timings
from benchmarks.networks.tasks import OTHERS, TASKS, Task, make


def run(name: str, task: Task, options: Any, content: dict, bar: tqdm) -> dict:
    """What is missing of one task, written to the file cell by cell."""
    result = content["tasks"].setdefault(
        name,
        {
            "parameters": optax.tree.size(task.init(jax.random.key(0))),
            "steps": task.steps,
            "batch_size": task.batch_size,
            "examples": [len(task.train[0]), len(task.test[0])],
            "methods": {},
        },
    )
    seeds = list(range(1, 1 + options.seeds))
    for method in options.methods:
        bar.set_postfix_str(f"{name}: {method}")
        if method not in result["methods"]:
            found = study(task, METHODS[method], seeds, result["methods"].get("adam"))
            if method == "mini_bma":
                tx = METHODS[method].make(**found["tuning"]["settings"])
                found["angles"] = angles(task, tx, found["tuning"]["rate"], seeds[0])
            result["methods"][method] = plain(found)
            write(content, options.out)
        bar.update()
    missing = set(options.methods) - set(result.get("timings", {}))
    if missing:
        timed = {}
        for method in result["methods"]:
            tuned = result["methods"][method]["tuning"]
            timed[method] = METHODS[method].make(**tuned["settings"]), tuned["rate"]
        result["timings"] = plain(timings(task, timed, options.repeats, bar))
        write(content, options.out)
    else:
        bar.update(1 + len(options.methods))
    return result


def plain(value: Any) -> Any:
    """For JSON: six digits, null for what is not finite."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def write(content: dict[str, Any], path: Path) -> None:
    """All of it or nothing: a run may be interrupted here as well."""
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(content, allow_nan=False) + "\n")
    draft.replace(path)


def header(options: Any) -> dict[str, Any]:
    """What every cell of a file must share."""
    return {
        "options": {
            "data": "mnist and cifar10" if options.data_dir else "digits",
            "seeds": options.seeds,
            "times": options.times,
            "small": options.small,
        },
        **machine(jax, optax, np, bma),
    }


def start(options: Any) -> dict[str, Any]:
    """What an earlier run left in the file, if it was one of the same settings."""
    fresh = header(options) | {"tasks": {}}
    if not options.out.exists():
        return fresh
    try:
        found = json.loads(options.out.read_text())
        same = all(found[key] == fresh[key] for key in header(options))
        tasks = dict(found["tasks"])
    except (OSError, ValueError, KeyError, TypeError):
        raise SystemExit(f"{options.out}: no results of this benchmark.") from None
    if not same:
        raise SystemExit(
            f"{options.out}: results of other settings or versions. Remove the file or "
            "choose another one with --out."
        )
    return fresh | {"tasks": tasks, "costs": found.get("costs", {})}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).parent / "results" / "networks.json"
    add = parser.add_argument
    add("--data-dir", type=Path, help="the folder of MNIST's and CIFAR-10's files")
    add("--tasks", nargs="+", choices=(*TASKS, *OTHERS), default=list(TASKS))
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    add("--seeds", type=int, default=6, help="how many; default: 6")
    add("--times", type=int, default=1, help="so many times the steps; default: 1")
    add("--repeats", type=int, default=5, help="timings of each method; default: 5")
    add("--small", action="store_true", help="tiny nets and few steps, to try it out")
    add("--out", type=Path, default=default, help="JSON; the figure lies beside it")
    options = parser.parse_args(arguments)
    if min(options.seeds, options.times, options.repeats) < 1:
        parser.error("every number must be positive")
    # Adam comes first: the others are measured against it.
    chosen = {"adam", *options.methods}
    options.methods = [name for name in METHODS if name in chosen]
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    content = start(options)
    total = len(options.tasks) * (2 * len(options.methods) + 1)
    with tqdm(total=total, unit="cell") as bar:
        for name in options.tasks:
            try:
                task = make(name, options.data_dir, options.small, options.times)
            except datasets.DataError as error:
                raise SystemExit(str(error)) from None
            result = run(name, task, options, content, bar)
            bar.write(table(name, result))
        chosen = [name for name in CHEAP if name in options.methods]
        if not set(chosen) <= set(content.get("costs", {}).get("methods", {})):
            width = 64 if options.small else 4096
            content["costs"] = plain(costs(chosen, width, options.repeats, bar))
            write(content, options.out)
    print(summary(content["tasks"]))
    print(angle_table(content["tasks"]))
    print(cost_table(content["costs"]))
    draw(content["tasks"], options.out.with_suffix(".png"))
    print(f"\nWrote {options.out} and its figure")


if __name__ == "__main__":
    main()
