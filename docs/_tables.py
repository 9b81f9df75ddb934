"""Tables of the site in Markdown, from the JSON that the benchmarks wrote."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.convex import __main__ as linear
from benchmarks.costs import step_cost
from benchmarks.figures import figure2
from benchmarks.grids import gallery as operators
from benchmarks.grids.__main__ import OTHERS
from benchmarks.harness.race import summary
from benchmarks.networks import report

Content = dict[str, Any]


def of_machine(content: Content) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in content["versions"].items())
    return f"\n\n*{content['device']}, {content['cores']} cores; {versions}.*\n"


def without_heading(markdown: str) -> str:
    lines = markdown.strip().splitlines()
    return "\n".join(line for line in lines if not line.startswith("#")).strip() + "\n"


def bold_heading(markdown: str) -> str:
    """The page has its own headings."""
    first, *lines = markdown.strip().splitlines()
    return "\n".join([f"**{first.removeprefix('### ')}**", *lines])


def grids(content: Content) -> str:
    found = {k: v for k, v in content["problems"].items() if k not in OTHERS}
    return summary(found) + of_machine(content)


def everything(content: Content) -> str:
    return summary(content["problems"]) + of_machine(content)


def real(content: Content) -> str:
    found = {k: v for k, v in content["problems"].items() if k in OTHERS}
    return summary(found) + of_machine(content)


def gallery(content: Content) -> str:
    return operators.report(content) + of_machine(content)


def networks(content: Content) -> str:
    tables = without_heading(report.summary(content["tasks"]))
    return tables + of_machine(content)


def convex(content: Content) -> str:
    tables = [bold_heading(linear.table(x, content[x])) for x in linear.REGIMES]
    return "\n\n".join(tables) + of_machine(content)


def costs(content: Content) -> str:
    tables = [bold_heading(step_cost.table(x)) for x in content["trees"].values()]
    return "\n\n".join(tables) + of_machine(content)


def nets(content: Content) -> str:
    tables = [bold_heading(figure2.table(k, x)) for k, x in content["nets"].items()]
    return "\n\n".join(tables) + of_machine(content)


# The file of each table, and what makes it.
TABLES: dict[str, tuple[str, Callable[[Content], str]]] = {
    "current": ("grids/results/current.json", everything),
    "grids": ("grids/results/grids.json", grids),
    "one_core": ("grids/results/one_core.json", grids),
    "volumes": ("grids/results/volumes.json", grids),
    "real": ("grids/results/grids.json", real),
    "gallery": ("grids/results/gallery.json", gallery),
    "curvature": ("curvature/results/curvature.json", everything),
    "networks": ("networks/results/networks.json", networks),
    "networks_gpu": ("networks/results/gpu.json", networks),
    "convex": ("convex/results/convex.json", convex),
    "costs": ("costs/results/step_cost.json", costs),
    "digits": ("figures/results/figure2_digits.json", nets),
    "mnist": ("figures/results/figure2_mnist.json", nets),
    "cifar10": ("figures/results/figure2_cifar10.json", nets),
}


def write(benchmarks: Path, folder: Path) -> None:
    """One Markdown file a table."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (file, make) in TABLES.items():
        content = json.loads((benchmarks / file).read_text())
        (folder / f"{name}.md").write_text(make(content))
