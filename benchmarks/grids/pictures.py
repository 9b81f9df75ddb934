"""The picture of this study: seconds against the size, and on each other problem."""

import statistics
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Results = dict[str, dict[str, Any]]  # By the names of the problems.
LABELS = {
    "bma_heavy_ball": "heavy ball on `scale_by_newton_bma`",
    "newton_bma": "`newton_bma`",
    "sgd": "SGD with momentum",
    "adam": "Adam",
    "adagrad": "AdaGrad",
    "lbfgs": "L-BFGS",
    "cg": "conjugate gradients",
    "direct": "sparse direct solver",
    "pyamg": "PyAMG",
    "newton_cg": "Newton-CG",
    "photo": "photograph, 5 % seen",
    "plasma": "Poisson-Boltzmann",
    "deblur": "deblurring",
    "spline": "smoothing spline",
    "heat": "conductivity of a plate",
}


def draw(scaling: Results, others: Results, path: Path) -> None:
    """Median seconds to the target of every method that gets there."""
    every = [result["methods"] for result in (scaling | others).values()]
    colors = {
        name: f"C{i}" for i, name in enumerate(dict.fromkeys(sum(map(list, every), [])))
    }
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    squares, volumes, points = figure.subplots(1, 3, width_ratios=(2, 2, 3))

    def panel(axes, title: str, results: Results, places: list, style: str) -> None:
        for name, color in colors.items():
            rows = [result["methods"].get(name) for result in results.values()]
            reached = [i for i, row in enumerate(rows) if row and row["reached"]]
            seconds = [statistics.median(rows[i]["seconds"]) for i in reached]
            axes.plot([places[i] for i in reached], seconds, style, color=color)
        axes.set(title=title, yscale="log")
        axes.grid(alpha=0.3)

    for axes, kind, title in ((squares, "paint", "n × n"), (volumes, "volume", "n³")):
        results = {name: x for name, x in scaling.items() if name.startswith(kind)}
        sides = [int(name.removeprefix(f"{kind}_")) for name in results]
        panel(axes, f"in-painting, {title} points", results, sides, "o-")
        axes.set(xscale="log", xlabel="n", ylabel="seconds")
        axes.set_xticks(sides, sides)
        axes.minorticks_off()
    panel(points, "other problems", others, list(range(len(others))), "o")
    names = [textwrap.fill(LABELS.get(name, name), 12) for name in others]
    points.set_xticks(range(len(others)), names, fontsize=8)
    for name, color in colors.items():
        label = LABELS.get(name, name).replace("`", "")
        points.plot([], [], "o", color=color, label=label)
    points.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=100)
    print(f"Wrote {path}")
