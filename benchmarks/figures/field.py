"""A field from forty of its points, after equal steps of three optimisers.

python -m benchmarks.figures.field
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import bma_optax as bma
from benchmarks.harness.peers import PEERS, newton_bma
from benchmarks.harness.solver import (
    Method,
    Problem,
    Solver,
    from_optax,
    trajectory,
)
from benchmarks.harness.tuning import Settings, descend

N, POINTS, EARLY, LATE, LAST = 128, 40, 3, 17, 60


def make(seed: int) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Zeros to start from; which points are seen, and a smooth field."""
    rng = np.random.default_rng(seed)
    axis = np.linspace(0, 1, N)
    field = sum(
        rng.standard_normal()
        * np.outer(np.cos(np.pi * i * axis), np.cos(np.pi * j * axis))
        for i in range(4)
        for j in range(4)
    )
    seen = np.zeros(N * N)
    seen[rng.choice(N * N, POINTS, replace=False)] = 1
    return np.zeros((N, N)), (seen.reshape(N, N), field)


def loss(u, data):
    seen, field = data
    smoothness = sum(jnp.sum(jnp.diff(u, axis=axis) ** 2) for axis in (0, 1))
    return smoothness + jnp.sum(seen * (u - field) ** 2)


PROBLEM = Problem(
    name="field",
    title=f"{N} x {N}, {POINTS} points seen",
    make=make,
    loss=loss,
    partition=bma.per_tile((4, 4), reach=1),
    quadratic=True,
)
METHODS = {
    "SGD, tuned": PEERS["sgd"],
    "L-BFGS": PEERS["lbfgs"],
    "newton_bma": Method(from_optax(newton_bma)),
}


def run(name: str) -> tuple[list[Any], np.ndarray]:
    """A method's fields and losses at every step; tuned for 17 on another field."""
    method = METHODS[name]
    instance, other = (jax.tree.map(jnp.asarray, make(seed)) for seed in (0, 1))
    solver = Solver(PROBLEM, method, instance)

    def score(settings: Settings, _: Any) -> float:
        if any(x > 1 for x in settings[1:]):
            return np.inf  # A negative momentum.
        return np.nan_to_num(solver(settings, other, LATE).loss, nan=np.inf)

    settings, _ = descend(score, method.start, method.strides)
    print(name, *(f"{k} {x:.2g}" for k, x in zip(method.tuned, settings, strict=True)))
    return trajectory(PROBLEM, method, settings, instance, LAST)


@jax.enable_x64(True)
def main() -> None:
    runs = {name: run(name) for name in METHODS}
    losses = {name: found for name, (_, found) in runs.items()}
    least, start = min(map(np.min, losses.values())), losses["newton_bma"][0]
    gaps = {name: (x - least) / (start - least) for name, x in losses.items()}
    for name, gap in gaps.items():
        early, late = gap[EARLY], gap[LATE]
        print(f"{name}: gap {early:.1e} after {EARLY} steps, {late:.1e} after {LATE}")
    fields = {name: found for name, (found, _) in runs.items()}
    draw(fields, gaps, Path(__file__).parent / "results" / "field.png")


def draw(fields: dict[str, list[Any]], gaps: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(8.3, 4.9), layout="constrained")
    grid = figure.subplots(2, 3)
    _, (seen, field) = make(0)
    solution = fields["newton_bma"][-1]
    low, high = solution.min(), solution.max()

    def show(axes, title: str, u: Any) -> None:
        axes.imshow(u, vmin=low, vmax=high, cmap="viridis")
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()

    data, curve = grid[0, 0], grid[1, 0]
    show(data, f"given: {POINTS} points of {N} × {N}", np.full((N, N), np.nan))
    rows, columns = np.nonzero(seen)
    data.scatter(columns, rows, c=field[rows, columns], vmin=low, vmax=high, s=14)
    for axes, name, steps in (
        (grid[0, 1], "SGD, tuned", LATE),
        (grid[0, 2], "L-BFGS", LATE),
        (grid[1, 1], "newton_bma", EARLY),
        (grid[1, 2], "newton_bma", LATE),
    ):
        show(axes, f"{name}, {steps} steps", fields[name][steps])
    for name, gap in gaps.items():
        curve.plot(np.maximum(gap, 1e-7), label=name)
    curve.set(yscale="log", ylim=(1e-6, 1.5), xlabel="step")
    curve.set_title("part of the gap that is left", fontsize=10)
    curve.grid(alpha=0.3)
    curve.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
