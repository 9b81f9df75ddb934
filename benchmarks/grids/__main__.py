"""Newton-BMA where parameters have neighbours, against Optax and experts' tools.

    python -m benchmarks.grids
    python -m benchmarks.grids --sizes 512 1024 --max-steps 5000

Seconds until the loss is within 1e-6 of the starting gap f(x0) - f*, set-up included,
compilation apart, in float64. Newton-BMA, L-BFGS and conjugate gradients run as they
come; the rates and momentum of the others are tuned on another instance, on a grid
that grows until the best point is inside. Experts' tools are given the assembled
matrix. What does not get there on a grid is left out on finer ones. Total variation,
deblurring, tomography, splines and the conductivity of a plate are what Newton-BMA
does not suit.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

import bma_optax as bma
from benchmarks.grids.hard_problems import (
    deblur,
    heat,
    spline,
    tomography,
    total_variation,
)
from benchmarks.grids.methods import EXPERTS, METHODS
from benchmarks.grids.pictures import draw
from benchmarks.grids.problems import paint, photo, plasma, terrain
from benchmarks.grids.study import Study
from benchmarks.harness.results import machine

REAL = {
    "terrain": terrain,
    "photo": photo,
    "plasma": plasma,
    "total_variation": total_variation,
    "deblur": deblur,
    "tomography": tomography,
    "spline": spline,
    "heat": heat,
}


def cell(row: dict[str, Any]) -> str:
    """The median of the seconds with the extremes."""
    seconds = row["seconds"]
    if not seconds:
        return ""
    text = f"{statistics.median(seconds):.3g}"
    if not row["reached"]:
        return f"({text})"
    return f"{text} ({min(seconds):.3g} to {max(seconds):.3g})"


def table(name: str, result: dict[str, Any]) -> str:
    lines = [
        f"\n### {name}: {result['title']}, {result['parameters']} parameters\n",
        "| method | settings | steps | seconds | seconds to compile |",
        "|---|---|---|---|---|",
    ]
    for method, row in result["methods"].items():
        settings = ", ".join(f"{k} {x:.2g}" for k, x in row["settings"].items())
        steps = "" if row["steps"] is None else row["steps"]
        if not row["reached"]:
            gap = "diverged" if row["gap"] is None else f"gap {row['gap']:.1e}"
            steps = f"not reached in {steps}: {gap}"
        compiled = row["compile_seconds"]
        compiled = "" if compiled is None else f"{compiled:.2g}"
        cells = [row.get("label", method), settings, steps, cell(row), compiled]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def summary(title: str, results: dict[str, Any]) -> str:
    """Median seconds of every method on every problem, and the steps."""
    lines = [
        f"\n## {title}: seconds (steps) to 1e-6 of the starting gap\n",
        f"| method | {' | '.join(results)} |",
        "|---" * (1 + len(results)) + "|",
    ]
    for method in (*METHODS, *EXPERTS):
        cells = []
        for result in results.values():
            row = result["methods"].get(method)
            if row is None:
                text = "-"
            elif not row["reached"]:
                text = "not reached"
            else:
                steps = f" ({row['steps']})" if row["steps"] else ""
                text = f"{statistics.median(row['seconds']):.3g}{steps}"
            cells.append(text)
        if set(cells) != {"-"}:
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = [*METHODS, *EXPERTS]
    add = parser.add_argument
    add("--sizes", type=int, nargs="*", default=[64, 256, 512])
    add("--volume-sizes", type=int, nargs="*", default=[32, 64])
    add("--problems", nargs="*", choices=list(REAL), default=list(REAL))
    add("--methods", nargs="+", choices=every, default=every)
    add("--repeats", type=int, default=3)
    add("--max-steps", type=int, default=2000)
    add("--output-dir", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    numbers = (options.repeats, options.max_steps)
    if min(*numbers, *options.sizes, *options.volume_sizes) < 1:
        parser.error("every number must be positive")
    return options


def scaled(results: dict[str, Any], factor: float) -> dict[str, tuple | None]:
    """Where tuning starts on a grid so much finer; None for what has no hope there."""
    starts: dict[str, tuple | None] = {}
    for name, row in results["methods"].items():
        settings = tuple(row["settings"].values())
        if not row["reached"]:
            starts[name] = None
        elif settings:  # Momentum closes in on 1 as the root of the condition grows.
            starts[name] = settings[0], *(x / factor for x in settings[1:])
    return starts


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    jax.config.update("jax_enable_x64", True)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    synthetic, real, studies = {}, {}, {}
    total = len(options.sizes) + len(options.volume_sizes) + len(options.problems)
    with tqdm(total=total * len(METHODS), unit="method", disable=None) as bar:
        for sizes, dimensions in ((options.sizes, 2), (options.volume_sizes, 3)):
            starts = {}
            for size, following in itertools.zip_longest(sizes, sizes[1:]):
                problem = paint(size, dimensions)
                bar.set_description(problem.name)
                result = Study(problem, options, starts).run(bar)
                synthetic[problem.name] = result
                bar.write(table(problem.name, result))
                if following:
                    starts |= scaled(result, following / size)
        for name in options.problems:
            bar.set_description(name)
            studies[name] = Study(REAL[name](), options, {})
            real[name] = studies[name].run(bar)
            bar.write(table(name, real[name]))
    for title, results in (("Scaling", synthetic), ("Real data", real)):
        if results:
            print(summary(title, results))
    content = {
        "options": {"repeats": options.repeats, "max_steps": options.max_steps},
        **machine(jax, optax, np, bma),
        "problems": synthetic | real,
    }
    path = options.output_dir / "grids.json"
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    print(f"\nWrote {path}")
    if studies:
        draw(studies, path.with_suffix(".png"))
        print(f"Wrote {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
