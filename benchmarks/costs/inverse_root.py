"""Ways to M^-1/2 r for a small matrix M, in seconds and in error.

    python -m benchmarks.costs.inverse_root
    python -m benchmarks.costs.inverse_root --sizes 64 256

The library takes eigenvalues (`eigh`): they are also what the floor, the failures and
the diagnostics are made of. Here beside it, in float32 on symmetric positive definite M
of known condition: a rational approximation by Cholesky solves (Hale, Higham and
Trefethen 2008, ten shifts), the coupled Newton-Schulz iteration, and Lanczos with 32
vectors. Errors are against float64 eigenvalues.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import scipy.special
from tqdm import tqdm

import bma_optax as bma
from benchmarks.harness.results import machine

SHIFTS = 10
ITERATIONS = 30
VECTORS = 32
highest = jax.default_matmul_precision("highest")


def by_eigh(M, r, condition):
    values, vectors = jnp.linalg.eigh(M)
    return vectors @ (jax.lax.rsqrt(values) * (r @ vectors))


def by_cholesky(M, r, condition):
    """2/π times the integral of (M + t²)^-1 r over t, by t = sn / cn."""
    quarter = scipy.special.ellipk(1 - 1 / condition)
    points = (np.arange(SHIFTS) + 0.5) * quarter / SHIFTS
    sn, cn, dn, _ = scipy.special.ellipj(points, 1 - 1 / condition)
    weights = 2 / np.pi * quarter / SHIFTS * dn / cn**2
    eye = jnp.eye(len(r), dtype=r.dtype)
    result = jnp.zeros_like(r)
    for shift, weight in zip((sn / cn) ** 2, weights, strict=True):
        factor = jax.scipy.linalg.cho_factor(M + jnp.asarray(shift, r.dtype) * eye)
        x = jax.scipy.linalg.cho_solve(factor, r)
        result = result + jnp.asarray(weight, r.dtype) * x
    return result


def by_newton_schulz(M, r, condition):
    """Y Z^-1 = M with Y -> M^1/2, Z -> M^-1/2, for M over its norm."""
    norm = jnp.linalg.norm(M)
    eye = jnp.eye(len(r), dtype=r.dtype)

    def step(_, pair):
        Y, Z = pair
        T = (3 * eye - Z @ Y) / 2
        return Y @ T, T @ Z

    _, Z = jax.lax.fori_loop(0, ITERATIONS, step, (M / norm, eye))
    return Z @ r * jax.lax.rsqrt(norm)


def by_lanczos(M, r, condition):
    """‖r‖ V T^-1/2 e, T = Vᵀ M V for an orthonormal basis V of the Krylov space."""
    count = min(VECTORS, len(r))

    def step(carry, _):
        V, v, i = carry
        V = V.at[i].set(v)
        w = M @ v
        for _ in range(2):  # Orthogonal in float32 too.
            w = w - V.T @ (V @ w)
        norm = jnp.linalg.norm(w)
        return (V, w / jnp.where(norm > 0, norm, 1), i + 1), None

    norm = jnp.linalg.norm(r)
    start = jnp.zeros((count, len(r)), r.dtype), r / norm, 0
    (V, _, _), _ = jax.lax.scan(step, start, length=count)
    values, vectors = jnp.linalg.eigh(V @ M @ V.T)
    values = jnp.maximum(values, jnp.finfo(r.dtype).tiny)
    return norm * (vectors @ (jax.lax.rsqrt(values) * vectors[0])) @ V


METHODS: dict[str, Callable[..., jax.Array]] = {
    "eigh": by_eigh,
    "ten Cholesky solves": by_cholesky,
    "Newton-Schulz": by_newton_schulz,
    "Lanczos": by_lanczos,
}


def instance(size: int, condition: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """M with eigenvalues from 1 to the condition, evenly in logarithm; r; M^-½ r."""
    rng = np.random.default_rng(size)
    Q, _ = np.linalg.qr(rng.standard_normal((size, size)))
    values = np.geomspace(1, condition, size)
    r = rng.standard_normal(size)
    return (Q * values) @ Q.T, r, (Q * values**-0.5) @ (Q.T @ r)


def measure(size: int, condition: float, repeats: int) -> dict[str, dict[str, Any]]:
    M, r, exact = instance(size, condition)
    M32, r32 = jnp.asarray(M, jnp.float32), jnp.asarray(r, jnp.float32)
    compiled, seconds = {}, {}
    for name, method in METHODS.items():
        with highest:
            function = jax.jit(lambda M, r, f=method: f(M, r, condition))
            compiled[name] = function.lower(M32, r32).compile()
        seconds[name] = []
    for _ in range(repeats + 1):  # Once to warm up.
        for name, function in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(function(M32, r32))
            seconds[name].append(time.perf_counter() - start)
    rows = {}
    for name, function in compiled.items():
        error = np.linalg.norm(np.asarray(function(M32, r32), np.float64) - exact)
        error = float(error / np.linalg.norm(exact))
        rows[name] = {
            "seconds": statistics.median(seconds[name][1:]),
            "error": error if np.isfinite(error) else None,
        }
    return rows


def table(cells: list[dict[str, Any]]) -> str:
    lines = [
        f"| L | condition | {' | '.join(METHODS)} |",
        "|--" * (2 + len(METHODS)) + "|",
    ]
    for cell in cells:
        row = [f"{cell['size']}", f"{cell['condition']:.0e}"]
        for name in METHODS:
            found = cell["methods"][name]
            error = "not finite" if found["error"] is None else f"{found['error']:.0e}"
            row.append(f"{1e3 * found['seconds']:.3g} ms, {error}")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def draw(cells: list[dict[str, Any]], path: Path) -> None:
    """Cost against L at the second condition, or the only one."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    conditions = sorted({cell["condition"] for cell in cells})
    condition = conditions[len(conditions) // 2]
    chosen = [cell for cell in cells if cell["condition"] == condition]
    figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for name in METHODS:
        times = [1e3 * cell["methods"][name]["seconds"] for cell in chosen]
        axes.plot([cell["size"] for cell in chosen], times, "o-", label=name)
    axes.set(xscale="log", yscale="log", xlabel="L", ylabel="milliseconds")
    axes.set_title(f"M^-1/2 r, condition {condition:.0e}", fontsize="medium")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).parent / "results" / "inverse_root.json"
    add = parser.add_argument
    add("--sizes", nargs="+", type=int, default=[16, 64, 256, 512, 1024], help="L")
    add("--conditions", nargs="+", type=float, default=[10.0, 1e3, 1e6])
    add("--repeats", type=int, default=7, help="timings of each; default: 7")
    add("--out", type=Path, default=default, help="JSON; the figure lies beside it")
    options = parser.parse_args(arguments)
    if min(options.repeats, *options.sizes) < 1 or min(options.conditions) <= 1:
        parser.error("sizes and repeats must be positive, conditions above 1")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    cells = []
    pairs = [(n, c) for n in options.sizes for c in options.conditions]
    for size, condition in tqdm(pairs, unit="matrix"):
        found = measure(size, condition, options.repeats)
        cells.append({"size": size, "condition": condition, "methods": found})
    content = {
        **machine(jax, np, bma),
        "cells": cells,
    }
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    print(table(cells))
    draw(cells, options.out.with_suffix(".png"))
    print(f"\n{content['device']}, {content['cores']} cores, JAX {jax.__version__}")
    print(f"Wrote {options.out} and its figure")


if __name__ == "__main__":
    main()
