"""What people see: each energy's data, its field after equal steps, and its losses.

python -m benchmarks.grids.sheet

A step of L-BFGS takes one gradient or more, one of Newton-BMA a gradient and about one
product. In float32, as both come; seconds are in the table of `benchmarks.grids`.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from benchmarks.grids.energies import ENERGIES
from benchmarks.grids.images import disc
from benchmarks.harness.peers import newton_bma
from benchmarks.harness.solver import (
    Method,
    Problem,
    as_floats,
    from_optax,
    trajectory,
)

STEPS, LAST = 20, 100
Picture = np.ndarray


def field(u: Any, data: Any) -> Picture:
    return np.asarray(u)


def length(u: Any, data: Any) -> Picture:
    return np.linalg.norm(u, axis=-1)


def colours(x: Any) -> Picture:
    return np.clip((np.asarray(x) + 1) / 2, 0, 1)


def blended(u: Any, data: Any) -> Picture:
    return colours(np.where(disc(len(u)), u, data[1]))


def middle(u: Any, data: Any = None) -> Picture:
    return np.asarray(u)[len(u) // 2]


def everywhere(x: Any) -> Picture:
    return np.full((64, 64), x)


def edge_alone(frame: Any) -> Picture:
    inside = np.full_like(frame, np.nan)
    inside[[0, -1]] = frame[[0, -1]]
    inside[:, [0, -1]] = frame[:, [0, -1]]
    return inside


def moved(data: Any) -> Picture:
    return np.stack([data[-2], data[-1], data[-2]], -1) / 2 + 0.5


# What is shown of the data, and of the field.
VIEWS: dict[str, tuple[Callable[[Any], Picture], Callable[[Any, Any], Picture]]] = {
    "flow": (lambda data: data[2], length),
    "blend": (lambda data: colours(data[0]), blended),
    "surface": (edge_alone, field),
    "torsion": (everywhere, field),
    "bratu": (everywhere, field),
    "superconductor": (lambda data: np.arctan2(data[..., 0], data[..., 1]), length),
    "registration": (lambda data: np.clip(moved(data), 0, 1), length),
    "phases": (np.asarray, field),
    "denoise": (middle, middle),
}


def run(problem: Problem, make_tx: Callable) -> tuple[list[Any], np.ndarray]:
    """The fields and the losses at every step."""
    instance = as_floats(problem.make(0), jnp.float32)
    return trajectory(problem, Method(from_optax(make_tx)), (), instance, LAST)


def row(axes: Any, name: str) -> None:
    problem = ENERGIES[name]()
    of_data, of_field = VIEWS[name]
    runs = {"L-BFGS": run(problem, lambda _: optax.lbfgs())}
    runs["newton_bma"] = run(problem, newton_bma)
    least = min(losses.min() for _, losses in runs.values())
    best = min(runs.values(), key=lambda found: found[1].min())[0][-1]
    data = problem.make(0)[1]
    limits = of_field(best, data).min(), of_field(best, data).max()
    axes[0].imshow(of_data(data), cmap="gray")
    axes[0].set_title(problem.title.split(",")[0], fontsize=9)
    for place, (method, (fields, losses)) in zip(axes[1:], runs.items(), strict=False):
        place.imshow(of_field(fields[STEPS], data), clim=limits)
        place.set_title(f"{method}, {STEPS} steps", fontsize=9)
        gap = (losses - least) / (losses[0] - least)
        axes[3].plot(np.maximum(gap, 1e-8), label=method)
    axes[3].set(yscale="log", ylim=(1e-6, 1.5))
    axes[3].set_title("part of the gap that is left", fontsize=9)
    axes[3].grid(alpha=0.3)
    for place in axes[:3]:
        place.set_axis_off()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", nargs="+", choices=VIEWS, default=list(VIEWS))
    out = Path(__file__).parent / "results" / "energies.png"
    parser.add_argument("--out", type=Path, default=out)
    options = parser.parse_args(arguments)
    names = options.problems
    figure = Figure(figsize=(8.3, 2.0 * len(names)), layout="constrained")
    for axes, name in zip(
        figure.subplots(len(names), 4, squeeze=False), names, strict=True
    ):
        row(axes, name)
        print(name, flush=True)
    axes[3].legend(fontsize=8)
    axes[3].set_xlabel("step")
    figure.savefig(options.out, dpi=100)
    print(f"Wrote {options.out}")


if __name__ == "__main__":
    main()
