"""The picture of figure 2: losses by step and by second. The notebook has more."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

STYLES = {"AdaGrad-Diag": "C0-", "AdaGrad-BMA": "C1--", "AdaGrad-Full": "C2-."} | {
    "BMA, units": "C4--",
    "BMA, units alone": "C3-",
    "BMA, units alone, learned weights": "C5-",
    "Adam": "C7:",
}


def draw(results: dict[str, Any], title: str, path: Path) -> None:
    """One row a net; a row for both where seconds are left out."""
    every = [row for result in results.values() for row in result["methods"].values()]
    if all("seconds_per_step" in row for row in every):
        figure = Figure(figsize=(12, 4.2 * len(results)), layout="constrained")
        grid = figure.subplots(len(results), 2, squeeze=False)
    else:
        figure = Figure(figsize=(12, 4.2), layout="constrained")
        grid = figure.subplots(1, len(results), squeeze=False).T
    for row, (net, result) in zip(grid, results.items(), strict=True):
        row[0].set_title(f"{title}, {net} net, {result['parameters']} parameters")
        for axes, seconds in zip(row, (False, True), strict=False):
            losses(axes, result, seconds)
    figure.savefig(path, dpi=70, pil_kwargs={"optimize": True})
    print(f"Wrote {path}")


def losses(axes, result: dict[str, Any], seconds: bool) -> None:
    for method, row in result["methods"].items():
        if row["curve"] is None:
            continue
        step, loss = row["curve"]["step"], np.asarray(row["curve"]["loss"])
        along = np.asarray(step) * (row["seconds_per_step"] if seconds else 1)
        label = f"{method}, rate {row['best_learning_rate']:g}"
        axes.plot(along, loss.mean(axis=0), STYLES[method], label=label)
        low, high = loss.min(axis=0), loss.max(axis=0)
        shade = {"color": STYLES[method][:2], "alpha": 0.2, "linewidth": 0}
        axes.fill_between(along, low, high, **shade)
        axes.legend(title=f"mean and range, seeds: {len(loss)}", fontsize=8)
    axes.set(yscale="log", ylabel="training loss of the batches")
    axes.set_xlabel("seconds in steps, compilation apart" if seconds else "step")
    axes.grid(alpha=0.3)
