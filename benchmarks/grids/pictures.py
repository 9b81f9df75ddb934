"""The picture of this study: images along the way, and loss by seconds."""

import statistics
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from benchmarks.grids.methods import METHODS, find_goal
from benchmarks.grids.problems import Problem
from benchmarks.harness.race import Race

FEW = 3  # Steps of Newton-BMA shown.
POINTS = 10  # Of each curve.
LONG = 3.0  # Seconds: no curves of what takes longer.


def add_curves(race: Race) -> None:
    """The gap after more and more steps, each from the start with its set-up."""
    optimum, start = race.goal["optimum"], race.goal["start"]
    for name, row in race.rows.items():
        if name in METHODS and statistics.median(row["seconds"]) <= LONG:
            steps = np.unique(np.geomspace(1, max(row["steps"], 1), POINTS).astype(int))
            found = [race.after(name, int(count)) for count in steps]
            row["curve"] = {
                "seconds": [x.seconds for x in found],
                "gap": [(x.loss - optimum) / (start - optimum) for x in found],
            }


def draw(problems: list[Problem], results: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(17, 3.1 * len(problems)), layout="constrained")
    panels = figure.subplots(
        len(problems), 5, squeeze=False, width_ratios=[1] * 4 + [1.5]
    )
    for row, problem in zip(panels, problems, strict=True):
        result = results[problem.name]
        shown = images(problem, result)
        for axes in row[len(shown) : 4]:
            axes.set_axis_off()
        for position, (title, image) in enumerate(shown.items()):
            # One scale for what is on the way and the end.
            like = list(shown.values())[-1] if position else image
            show(row[position], image, like)
            row[position].set_title(title, fontsize=9)
        row[4].set_title(problem.title, fontsize=9)
        curves(row[4], result["methods"])
    figure.savefig(path, dpi=70, pil_kwargs={"optimize": True})
    print(f"Wrote {path}")


def images(problem: Problem, result: dict[str, Any]) -> dict[str, np.ndarray]:
    """What was observed, both methods after the same seconds, and the end."""
    picture, rows = problem.picture, result["methods"]
    if picture is None:
        return {}
    race = Race(problem, METHODS, find_goal, 0)
    race.rows = rows
    titles = {"observed": observed(problem, race.instance[1])}
    if "newton_bma" not in rows:
        return titles

    def add(name, steps):
        found = race.after(name, steps)
        titles[f"{name}, {steps} steps, {found.seconds:.2g} s"] = picture(found.params)
        return found.seconds

    last = rows["newton_bma"]["steps"]
    race.after("newton_bma", 1)  # Once to warm up.
    seconds = add("newton_bma", min(FEW, last))
    if "sgd" in rows:
        sgd = rows["sgd"]
        rate = statistics.median(sgd["seconds"]) / sgd["steps"]
        add("sgd", max(1, round(seconds / rate)))
    add("newton_bma", last)
    return titles


def observed(problem: Problem, data: Any) -> np.ndarray:
    """The data: unseen pixels are not a number."""
    data = jax.tree.map(np.asarray, data)
    if len(data) == 1:
        return data[0]
    mask, y, *more = data
    if more:  # Temperatures: the last ones of the first experiment.
        y = y[-1, 0]
    if y.ndim > mask.ndim:
        return np.where(mask[..., None] > 0, problem.picture(y), 1.0)
    return np.where(mask > 0, y, np.nan)


def show(axes, image: np.ndarray, like: np.ndarray) -> None:
    low, high = np.nanmin(like), np.nanmax(like)
    if image.ndim == 1:
        axes.plot(image, ".", markersize=2)
        axes.set_ylim(low, high)
        return
    axes.set(xticks=[], yticks=[])
    axes.imshow(image, vmin=low, vmax=high, cmap="terrain", interpolation="nearest")


def curves(axes, rows: dict[str, Any]) -> None:
    for name, row in rows.items():
        if "curve" in row:
            curve = row["curve"]
            axes.plot(curve["seconds"], curve["gap"], ".-", label=name, markersize=4)
        elif name not in METHODS and row["reached"]:
            seconds, style = statistics.median(row["seconds"]), "*d"[name == "direct"]
            axes.plot(seconds, 1e-6, style, label=row.get("label", name))
    axes.axhline(1e-6, color="grey", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="seconds", ylabel="gap / first gap")
    axes.set_ylim(3e-7, 2)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
