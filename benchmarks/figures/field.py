"""A field from forty of its points, after equal steps of three optimisers.

python -m benchmarks.figures.field
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import bma_optax as bma

N, POINTS, EARLY, LATE, LAST = 128, 40, 3, 17, 60
RATES = tuple(float(x) for x in np.geomspace(0.02, 0.25, 6))
MOMENTA = (0.5, 0.8, 0.9, 0.95)


def instance(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which points are seen, and a smooth field."""
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
    return seen.reshape(N, N), field


def loss(u, seen, field):
    smoothness = sum(jnp.sum(jnp.diff(u, axis=axis) ** 2) for axis in (0, 1))
    return smoothness + jnp.sum(seen * (u - field) ** 2)


def run(tx, seed: int, steps: int = LAST) -> tuple[list[np.ndarray], list[float]]:
    """The fields and the losses at every step."""
    seen, field = (jnp.asarray(x, jnp.float32) for x in instance(seed))

    def f(u):
        return loss(u, seen, field)

    @jax.jit
    def step(u, state):
        value, grad = jax.value_and_grad(f)(u)
        updates, state = tx.update(grad, state, u, value=value, grad=grad, value_fn=f)
        return optax.apply_updates(u, updates), state, value

    u, fields, losses = jnp.zeros((N, N)), [], []
    state = tx.init(u)
    for _ in range(steps + 1):
        fields.append(np.asarray(u))
        u, state, value = step(u, state)
        losses.append(float(value))
    return fields, losses


def tuned_sgd(seed: int = 1):
    """The rate and momentum with the least loss after 17 steps, on another field."""
    found = {
        (rate, m): run(optax.sgd(rate, m), seed, LATE)[1][-1]
        for rate in RATES
        for m in MOMENTA
    }
    best = min(found, key=lambda key: np.nan_to_num(found[key], nan=np.inf))
    print(f"SGD: rate {best[0]:.3g}, momentum {best[1]:g}")
    return optax.sgd(*best)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output-dir", type=Path, default=Path(__file__).parent / "results"
    )
    options = parser.parse_args(args)
    newton = bma.newton_bma(bma.per_tile((4, 4), reach=1))
    runs: dict[str, Any] = {
        "SGD, tuned": run(tuned_sgd(), 0),
        "L-BFGS": run(optax.lbfgs(), 0),
        "newton_bma": run(newton, 0),
    }
    least = min(min(losses) for _, losses in runs.values())
    for name, (_, losses) in runs.items():
        early, late = ((losses[k] - least) / (losses[0] - least) for k in (EARLY, LATE))
        print(f"{name}: gap {early:.1e} after {EARLY} steps, {late:.1e} after {LATE}")
    draw(runs, least, options.output_dir / "field.png")


def draw(runs: dict[str, Any], least: float, path: Path) -> None:
    figure = Figure(figsize=(8.3, 4.9), layout="constrained")
    grid = figure.subplots(2, 3)
    seen, field = instance(0)
    solution = runs["newton_bma"][0][-1]
    low, high = solution.min(), solution.max()

    def show(axes, title: str, u: np.ndarray) -> None:
        axes.imshow(u, vmin=low, vmax=high, cmap="viridis")
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()

    data, curve = grid[0, 0], grid[1, 0]
    show(data, f"given: {POINTS} points of {N} × {N}", np.full((N, N), np.nan))
    rows, columns = np.nonzero(seen)
    data.scatter(columns, rows, c=field[rows, columns], vmin=low, vmax=high, s=14)
    show(grid[0, 1], f"SGD, tuned, {LATE} steps", runs["SGD, tuned"][0][LATE])
    show(grid[0, 2], f"L-BFGS, {LATE} steps", runs["L-BFGS"][0][LATE])
    show(grid[1, 1], f"newton_bma, {EARLY} steps", runs["newton_bma"][0][EARLY])
    show(grid[1, 2], f"newton_bma, {LATE} steps", runs["newton_bma"][0][LATE])
    for name, (_, losses) in runs.items():
        gap = (np.asarray(losses) - least) / (losses[0] - least)
        curve.plot(np.maximum(gap, 1e-7), label=name)
    curve.set(yscale="log", ylim=(1e-6, 1.5), xlabel="step")
    curve.set_title("part of the gap that is left", fontsize=10)
    curve.grid(alpha=0.3)
    curve.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
