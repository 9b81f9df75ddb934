"""The pictures of inverse_problems.py: images along the way, and loss by seconds."""

import statistics
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure

from benchmarks.grids.study import Study

FEW = 3  # Steps of Newton-BMA shown.
POINTS = 10  # Of each curve.
LONG = 3.0  # Seconds: no curves of what takes longer.


def draw(studies: dict[str, Study], path: Path) -> None:
    figure = Figure(figsize=(17, 3.1 * len(studies)), layout="constrained")
    panels = figure.subplots(
        len(studies), 5, squeeze=False, width_ratios=[1] * 4 + [1.5]
    )
    for row, study in zip(panels, studies.values(), strict=True):
        shown = images(study)
        for axes in row[len(shown) : 4]:
            axes.set_axis_off()
        for position, (title, image) in enumerate(shown.items()):
            # One scale for what is on the way and the end.
            like = list(shown.values())[-1] if position else image
            show(row[position], image, like)
            row[position].set_title(title, fontsize=9)
        row[4].set_title(study.problem.title, fontsize=9)
        curves(row[4], study)
    figure.savefig(path, dpi=70, pil_kwargs={"optimize": True})


def images(study: Study) -> dict[str, np.ndarray]:
    """What was observed, both methods after the same seconds, and the end."""
    picture = study.problem.picture
    if picture is None:
        return {}
    titles = {"observed": observed(study)}
    bma = study.rows.get("newton_bma")
    if bma is None:
        return titles
    steps = min(FEW, bma["steps"])
    seconds = statistics.median(study.after("newton_bma", steps).seconds for _ in "123")
    few = study.after("newton_bma", steps).params
    titles[f"newton_bma, {steps} steps, {seconds:.2g} s"] = picture(few)
    if "sgd" in study.rows:
        sgd = study.rows["sgd"]
        rate = statistics.median(sgd["seconds"]) / sgd["steps"]
        steps = max(1, round(seconds / rate))
        found = study.after("sgd", steps)
        titles[f"sgd, {steps} steps, {found.seconds:.2g} s"] = picture(found.params)
    last = study.after("newton_bma", bma["steps"])
    titles[f"newton_bma, {bma['steps']} steps, {last.seconds:.2g} s"] = picture(
        last.params
    )
    return titles


def observed(study: Study) -> np.ndarray:
    """The data: unseen pixels are not a number."""
    data = jax.tree.map(np.asarray, study.instance[1])
    if len(data) == 1:
        return data[0]
    mask, y, *more = data
    if more:  # Temperatures: the last ones of the first experiment.
        y = y[-1, 0]
    if y.ndim > mask.ndim:
        return np.where(mask[..., None] > 0, study.problem.picture(y), 1.0)
    return np.where(mask > 0, y, np.nan)


def show(axes, image: np.ndarray, like: np.ndarray) -> None:
    low, high = np.nanmin(like), np.nanmax(like)
    if image.ndim == 1:
        axes.plot(image, ".", markersize=2)
        axes.set_ylim(low, high)
        return
    axes.set(xticks=[], yticks=[])
    axes.imshow(image, vmin=low, vmax=high, cmap="terrain", interpolation="nearest")


def curves(axes, study: Study) -> None:
    """The gap after more and more steps, each from the start with its set-up."""
    optimum, span = study.goal["optimum"], study.goal["start"] - study.goal["optimum"]
    for method, row in study.rows.items():
        if row["compile_seconds"] is None or statistics.median(row["seconds"]) > LONG:
            continue
        steps = np.unique(np.geomspace(1, max(row["steps"], 1), POINTS).astype(int))
        found = [study.after(method, int(count)) for count in steps]
        gaps = [(x.loss - optimum) / span for x in found]
        axes.plot([x.seconds for x in found], gaps, ".-", label=method, markersize=4)
    for method in ("direct", "pyamg"):
        row = study.rows.get(method)
        if row is not None and row["reached"]:
            seconds = statistics.median(row["seconds"])
            label = row.get("label", method)
            axes.plot(seconds, 1e-6, "*" if method == "pyamg" else "d", label=label)
    axes.axhline(1e-6, color="grey", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="seconds", ylabel="gap / first gap")
    axes.set_ylim(3e-7, 2)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
