"""The tables and the figure of this study."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.harness import tables
from benchmarks.harness.tables import number
from benchmarks.networks.methods import METHODS

COLUMNS = [
    "method",
    "rate, settings",
    "training loss",
    "minus Adam's, same seed",
    "test loss",
    "steps to Adam's loss",
    "seconds to it",
    "ms a step",
    "state / d",
    "seconds to compile",
]
SHOWN = ("adam", "adam_centralized", "adam_mini", "soap", "muon", "mini_bma")


def mean(values: list[float | None]) -> float:
    return float(np.mean([np.inf if x is None else x for x in values]))


def difference(row: dict[str, Any], adam: dict[str, Any]) -> str:
    """Mean, and the extremes over seeds."""
    pairs = zip(row["train_loss"], adam["train_loss"], strict=True)
    values = [np.inf if None in pair else pair[0] - pair[1] for pair in pairs]
    return tables.mean(values, "+.2g") if np.all(np.isfinite(values)) else "diverged"


def steps_to_adam(row: dict[str, Any]) -> float | None:
    """The median over seeds, None unless most get there."""
    steps = [np.inf if x is None else x for x in row["steps_to_adam"]]
    middle = statistics.median(steps)
    return middle if np.isfinite(middle) else None


def cells(name: str, task: dict[str, Any]) -> list[str]:
    row, adam = task["methods"][name], task["methods"]["adam"]
    timed, tuned, steps = task["timings"][name], row["tuning"], steps_to_adam(row)
    settings = [f"{tuned['rate']:.2g}"]
    settings += [f"{key} {x:g}" for key, x in tuned["settings"].items()]
    if not tuned["interior"]:
        settings.append("edge of the grid")
    reached = sum(x is not None for x in row["steps_to_adam"])
    per_step = timed["seconds_per_step"]
    return [
        METHODS[name].label,
        ", ".join(settings),
        number(mean(row["train_loss"])),
        "" if name == "adam" else difference(row, adam),
        number(mean(row["test_loss"])),
        f"{steps:.0f}" if steps else f"{reached} of {len(row['train_loss'])} do",
        number(steps * per_step) if steps else "",
        f"{1e3 * per_step:.3g}",
        f"{timed['state_over_params']:.3g}",
        f"{timed['compile_seconds']:.2g}",
    ]


def table(name: str, task: dict[str, Any]) -> str:
    """Every method on one task, losing rows too."""
    seconds = task["timings"]["gradient"]["seconds_per_step"]
    rows = [cells(method, task) for method in METHODS if method in task["methods"]]
    return (
        f"\n### {name}: {task['parameters']} parameters, {task['steps']} steps of "
        f"{task['batch_size']} examples\n\n{tables.table(COLUMNS, rows)}\n\n"
        f"The gradient and a step of SGD: {1e3 * seconds:.3g} ms."
    )


def summary(tasks: dict[str, Any]) -> str:
    """Training losses of all methods on all tasks, and the gap that mini-BMA closes."""
    losses = [
        {m: mean(row["train_loss"]) for m, row in task["methods"].items()}
        for task in tasks.values()
    ]
    rows = [
        [method.label, *(number(x[name]) if name in x else "" for x in losses)]
        for name, method in METHODS.items()
        if any(name in x for x in losses)
    ]
    closed = [gap_closed(x) for x in losses]
    if any(closed):
        label = "mini-BMA's part of the gap from Adam to the better of SOAP and Muon"
        rows.append([label, *closed])
    head = "\n### Training loss, mean over seeds\n\n"
    return head + tables.table(["method", *tasks], rows)


def gap_closed(losses: dict[str, float]) -> str:
    peers = {"soap", "muon", "muon_rms"}
    if not peers | {"adam", "mini_bma"} <= set(losses):
        return ""
    best = min(losses[name] for name in peers)
    if not best < losses["adam"]:
        return "no gap"
    return f"{(losses['adam'] - losses['mini_bma']) / (losses['adam'] - best):.0%}"


def angle_table(tasks: dict[str, Any]) -> str:
    """Cosines of the learned directions at the end, layer by layer."""
    rows = []
    for name, task in tasks.items():
        for layer, row in task["methods"].get("mini_bma", {}).get("angles", {}).items():
            last = [number(row[key][-1], ".2f") for key in ("mean", "top", "share")]
            rows.append([name, layer, *last, f"{row['chance']:.2f}"])
    columns = ["task", "layer", "mean input", "first eigenvector of the inputs"]
    columns += ["part of the gradient's square", "a random direction"]
    head = "\n### Cosine of mini-BMA's learned direction with, at the last step\n\n"
    return head + tables.table(columns, rows) if rows else ""


def draw(tasks: dict[str, Any], path: Path) -> None:
    """Loss against steps and against seconds, for at most four tasks."""
    preferred = ("mlp_pixel", "conv", "autoencoder", "transformer")
    names = [name for name in preferred if name in tasks] or list(tasks)[:4]
    figure = Figure(figsize=(4 * len(names), 6), layout="constrained")
    panels = figure.subplots(2, len(names), squeeze=False, sharey="col")
    for column, name in zip(panels.T, names, strict=True):
        task = tasks[name]
        for color, method in enumerate(SHOWN):
            if method not in task["methods"]:
                continue
            curve = task["methods"][method]["curve"]
            steps, loss = np.array(curve["step"]), np.array(curve["loss"], float)
            style = {"color": f"C{color}", "label": METHODS[method].label}
            style["linewidth"] = 2 if method == "mini_bma" else 1
            per_step = task["timings"][method]["seconds_per_step"]
            column[0].plot(steps, loss, **style)
            column[1].plot(steps * per_step, loss, **style)
        column[0].set(title=name, xlabel="step")
        column[1].set(xlabel="second")
        for axes in column:
            axes.set_yscale("log")
            axes.grid(alpha=0.3)
    for axes in panels[:, 0]:
        axes.set_ylabel("training loss")
    panels[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=80)
    print(f"Wrote {path}")
