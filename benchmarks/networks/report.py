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
]
TITLES = {
    "mlp_raw": "MLP, pixels from 0 to 1",
    "mlp_global": "MLP, standardised",
    "mlp_pixel": "MLP, standardised by pixel",
    "mlp_sigmoid": "MLP, sigmoids",
    "conv": "conv net",
    "conv_norm": "conv net, normalised",
    "mnist": "MNIST",
    "cifar10": "CIFAR-10",
    "transformer_large": "large transformer",
    "cifar10_large": "CIFAR-10, large net",
}
SHOWN = ("adam", "adagrad", "units_learned", "adam_bma_units", "soap", "muon_rms")


def finite(values: list[float | None]) -> list[float]:
    """JSON has null for what diverged."""
    return [np.inf if x is None else x for x in values]


def mean(values: list[float | None]) -> float:
    return statistics.fmean(finite(values))


def differences(row: dict[str, Any], adam: dict[str, Any]) -> list[float]:
    """To Adam's training loss on the same seed."""
    pairs = zip(finite(row["train_loss"]), finite(adam["train_loss"]), strict=True)
    return [x - y if np.isfinite([x, y]).all() else np.inf for x, y in pairs]


def cells(name: str, task: dict[str, Any]) -> list[str]:
    row, adam = task["methods"][name], task["methods"]["adam"]
    tuned = row["tuning"]
    settings = [f"{tuned['rate']:.2g}"]
    settings += [f"{key} {x:g}" for key, x in tuned["settings"].items()]
    if not tuned["interior"]:
        settings.append("edge of the grid")
    less, steps = differences(row, adam), finite(row["steps_to_adam"])
    difference = tables.mean(less, "+.2g") if np.isfinite(less).all() else "diverged"
    middle, reached = statistics.median(steps), int(np.isfinite(steps).sum())
    return [
        METHODS[name].label,
        ", ".join(settings),
        number(mean(row["train_loss"])),
        "" if name == "adam" else difference,
        number(mean(row["test_loss"])),
        f"{middle:.0f}" if np.isfinite(middle) else f"{reached} of {len(steps)} do",
    ]


def table(name: str, task: dict[str, Any]) -> str:
    """Every method on one task, losing rows too."""
    rows = [cells(method, task) for method in METHODS if method in task["methods"]]
    return (
        f"\n### {name}: {task['parameters']} parameters, {task['steps']} steps of "
        f"{task['batch_size']} examples\n\n{tables.table(COLUMNS, rows)}\n"
    )


def summary(tasks: dict[str, Any]) -> str:
    """Mean training losses of all methods on all tasks, and the gap that is closed.

    Bold where every seed is below Adam's.
    """

    def cell(name: str, methods: dict[str, Any]) -> str:
        if name not in methods:
            return ""
        loss = number(mean(methods[name]["train_loss"]))
        below = max(differences(methods[name], methods["adam"])) < 0
        return f"**{loss}**" if below else loss

    found = [task["methods"] for task in tasks.values()]
    rows = [
        [method.label, *(cell(name, methods) for methods in found)]
        for name, method in METHODS.items()
        if any(name in methods for methods in found)
    ]
    closed = [gap_closed(methods) for methods in found]
    if any(closed):
        label = "its part of the gap from Adam to the better of SOAP and Muon"
        rows.append([f"{METHODS['units_learned'].label}: {label}", *closed])
    head = "\n### Training loss, mean over seeds\n\n"
    return head + tables.table(["method", *tasks], rows)


def gap_closed(methods: dict[str, Any]) -> str:
    losses = {name: mean(row["train_loss"]) for name, row in methods.items()}
    peers = [losses[name] for name in ("soap", "muon_rms") if name in losses]
    if not peers or "units_learned" not in losses:
        return ""
    gap = losses["adam"] - min(peers)
    return f"{(losses['adam'] - losses['units_learned']) / gap:.0%}" if gap > 0 else "-"


def draw(tasks: dict[str, Any], path: Path) -> None:
    """Loss against steps, for at most four tasks."""
    preferred = ("mlp_raw", "mlp_sigmoid", "conv", "conv_norm", "mnist", "cifar10")
    names = [name for name in preferred if name in tasks][:4] or list(tasks)[:4]
    figure = Figure(figsize=(4 * len(names), 3.6), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        methods = tasks[name]["methods"]
        for color, method in enumerate(SHOWN):
            if method in methods:
                curve = methods[method]["curve"]
                loss = np.array(curve["loss"], float)
                width = 2 if method == "units_learned" else 1
                style = {"color": f"C{color}", "label": METHODS[method].label}
                axes.semilogy(curve["step"], loss, linewidth=width, **style)
        axes.set(title=TITLES.get(name, name), xlabel="step")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("training loss")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=80)
    print(f"Wrote {path}")
