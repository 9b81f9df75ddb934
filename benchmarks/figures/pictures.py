"""The pictures of figure 2: losses, and what the matrix looks like."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

STYLES = {"AdaGrad-Diag": "C0-", "AdaGrad-BMA": "C1--", "AdaGrad-Full": "C2-."} | {
    "BMA, units": "C4--",
    "BMA, units alone": "C3-",
    "BMA, units alone, learned weights": "C5-",
}
LARGE = 12  # More blocks have no names in a heat map.


def draw(results: dict[str, Any], title: str, path: Path) -> None:
    """One row a net: loss by step and by second, M, its spectrum, angles."""
    figure = Figure(figsize=(25, 4.2 * len(results)), layout="constrained")
    grid = figure.subplots(len(results), 6, squeeze=False)
    for row, (net, result) in zip(grid, results.items(), strict=True):
        heading = f"{title}, {net} net, {result['parameters']} parameters"
        losses(row[0], result, seconds=False)
        losses(row[1], result, seconds=True)
        row[0].set_title(heading)
        look = result["look"]
        if look is None:
            for axes in row[2:]:
                axes.set_axis_off()
            continue
        matrices = list(look["matrices"].items())
        heat_map(row[2], look, *matrices[0])
        heat_map(row[3], look, *matrices[-1])
        spectrum(row[4], look)
        angles(row[5], look)
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


def heat_map(axes, look: dict[str, Any], step: int, M: np.ndarray) -> None:
    """M - I: the correlations of block sums, as Lu et al. (2018) shrink them."""
    off = np.asarray(M) - np.eye(len(M))
    most = max(np.abs(off).max(), 1e-12)
    image = axes.imshow(off, vmin=-most, vmax=most, cmap="RdBu_r")
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
    names = [name.removesuffix("/value") for name in look["names"]]
    if len(names) <= LARGE:
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_title(f"M - I after {step} steps")


def spectrum(axes, look: dict[str, Any]) -> None:
    axes.plot(look["step"], np.asarray(look["spectrum"]), "C1", linewidth=0.8)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="step", title="eigenvalues of M")
    axes.grid(alpha=0.3)


def angles(axes, look: dict[str, Any]) -> None:
    for pair, degrees in look["angles"].items():
        axes.plot(look["step"], degrees, label=pair)
    axes.set(xscale="log", yscale="log", xlabel="step")
    axes.set_title("degrees between updates")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
