"""The tables and the figure of networks.py."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

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


def number(x: float | None, form: str = ".3g") -> str:
    return "diverged" if x is None or not np.isfinite(x) else format(x, form)


def mean(values: list[float | None]) -> float:
    return float(np.mean([np.inf if x is None else x for x in values]))


def difference(row: dict[str, Any], adam: dict[str, Any]) -> str:
    """Mean, and the extremes over seeds."""
    pairs = zip(row["train_loss"], adam["train_loss"], strict=True)
    values = [np.inf if None in pair else pair[0] - pair[1] for pair in pairs]
    if not np.all(np.isfinite(values)):
        return "diverged"
    low, high = min(values), max(values)
    return f"{np.mean(values):+.2g} ({low:+.2g} to {high:+.2g})"


def steps_to_adam(row: dict[str, Any]) -> float | None:
    """The median over seeds, None unless most get there."""
    steps = [np.inf if x is None else x for x in row["steps_to_adam"]]
    middle = statistics.median(steps)
    return middle if np.isfinite(middle) else None


def cells(name: str, task: dict[str, Any]) -> list[str]:
    row, adam = task["methods"][name], task["methods"]["adam"]
    tuned = row["tuning"]
    settings = [f"{tuned['rate']:.2g}"]
    settings += [f"{key} {x:g}" for key, x in tuned["settings"].items()]
    if not tuned["interior"]:
        settings.append("edge of the grid")
    steps, timed = steps_to_adam(row), task.get("timings", {}).get(name)
    reached = sum(x is not None for x in row["steps_to_adam"])
    count = f"{steps:.0f}" if steps else f"{reached} of {len(row['train_loss'])} do"
    result = [
        METHODS[name].label,
        ", ".join(settings),
        number(mean(row["train_loss"])),
        "" if name == "adam" else difference(row, adam),
        number(mean(row["test_loss"])),
        count,
    ]
    if timed is None:
        return result + [""] * 4
    per_step = timed["seconds_per_step"]
    return result + [
        number(steps * per_step) if steps else "",
        f"{1e3 * per_step:.3g}",
        f"{timed['state_over_params']:.3g}",
        f"{timed['compile_seconds']:.2g}",
    ]


def table(name: str, task: dict[str, Any]) -> str:
    """Every method on one task, losing rows too."""
    head = (
        f"\n### {name}: {task['parameters']} parameters, {task['steps']} steps of "
        f"{task['batch_size']} examples\n"
    )
    lines = [head, f"| {' | '.join(COLUMNS)} |", "|--" * len(COLUMNS) + "|"]
    for method in METHODS:
        if method in task["methods"]:
            lines.append(f"| {' | '.join(cells(method, task))} |")
    if "gradient" in task.get("timings", {}):
        seconds = task["timings"]["gradient"]["seconds_per_step"]
        lines.append(f"\nThe gradient and a step of SGD: {1e3 * seconds:.3g} ms.")
    return "\n".join(lines)


def summary(tasks: dict[str, Any]) -> str:
    """Training losses of all methods on all tasks, and the gap that mini-BMA closes."""
    lines = [
        "\n### Training loss, mean over seeds\n",
        f"| method | {' | '.join(tasks)} |",
        "|--" * (1 + len(tasks)) + "|",
    ]
    losses = {
        task: {m: mean(row["train_loss"]) for m, row in tasks[task]["methods"].items()}
        for task in tasks
    }
    for method in METHODS:
        if any(method in found for found in losses.values()):
            row = [
                number(found[method]) if method in found else ""
                for found in losses.values()
            ]
            lines.append(f"| {METHODS[method].label} | {' | '.join(row)} |")
    closed = [gap_closed(found) for found in losses.values()]
    if any(closed):
        label = "mini-BMA's part of the gap from Adam to the better of SOAP and Muon"
        lines.append(f"| {label} | {' | '.join(closed)} |")
    return "\n".join(lines)


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
    lines = []
    for name, task in tasks.items():
        for layer, row in task["methods"].get("mini_bma", {}).get("angles", {}).items():
            last = [number(row[key][-1], ".2f") for key in ("mean", "top", "share")]
            cell = [name, layer, *last, f"{row['chance']:.2f}"]
            lines.append(f"| {' | '.join(cell)} |")
    if not lines:
        return ""
    columns = ["task", "layer", "mean input", "first eigenvector of the inputs"]
    columns += ["part of the gradient's square", "a random direction"]
    head = [
        "\n### Cosine of mini-BMA's learned direction with, at the last step\n",
        f"| {' | '.join(columns)} |",
        "|--" * len(columns) + "|",
    ]
    return "\n".join(head + lines)


def draw(tasks: dict[str, Any], path: Path) -> None:
    """Loss against steps and against seconds, for at most four tasks."""
    preferred = ("mlp_pixel", "conv", "autoencoder", "transformer")
    names = [name for name in preferred if name in tasks] or list(tasks)[:4]
    figure = Figure(figsize=(4 * len(names), 6), layout="constrained")
    panels = figure.subplots(2, len(names), squeeze=False)
    for column, name in zip(panels.T, names, strict=True):
        task = tasks[name]
        for color, method in enumerate(SHOWN):
            if method not in task["methods"]:
                continue
            curve = task["methods"][method]["curve"]
            steps = np.array(curve["step"])
            loss = np.array([np.nan if x is None else x for x in curve["loss"]])
            seconds = task["timings"][method]["seconds_per_step"]
            style = {"color": f"C{color}", "label": METHODS[method].label}
            style["linewidth"] = 2 if method == "mini_bma" else 1
            column[0].plot(steps, loss, **style)
            column[1].plot(steps * seconds, loss, **style)
        column[0].set(title=name, xlabel="step")
        column[1].set(xlabel="second")
        for axes in column:
            axes.set(yscale="log")
            axes.grid(alpha=0.3)
    panels[0, 0].set(ylabel="training loss")
    panels[1, 0].set(ylabel="training loss")
    panels[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=80)
