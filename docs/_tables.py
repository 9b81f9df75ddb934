"""Tables of the site in Markdown, from the JSON that the benchmarks wrote."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.convex import __main__ as linear
from benchmarks.costs import step_cost
from benchmarks.figures import figure2
from benchmarks.grids import gallery as operators
from benchmarks.grids import pictures
from benchmarks.grids.__main__ import OTHERS
from benchmarks.harness import tables
from benchmarks.harness.race import summary
from benchmarks.networks import report

Content = dict[str, Any]

# What the cells of the tables are called on the site, in place of names in the files.
WORDS = {
    **pictures.LABELS,
    "newton_bma_per_leaf": "`newton_bma`, a block an array",
    "newton_bma_finer": "`newton_bma`, finer blocks",
    "newton_bma_diagonal": "`newton_bma`, no blocks",
    "natural_bma": "`natural_bma`",
    **{f"paint_{n}": f"{n}²" for n in (64, 128, 256, 512, 1024, 2048)},
    **{f"volume_{n}": f"{n}³" for n in (32, 64, 128)},
    "softmax": "softmax regression",
    "factorisation": "factors of images",
    "net": "net with one hidden layer",
    **report.TITLES,
}


def of_machine(content: Content) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in content["versions"].items())
    device = content["device"].replace("cpu", "CPU")
    cores = f"{content['cores']} core{'s' * (content['cores'] > 1)}"
    return f"\n\n*{device}, {cores}; {versions}.*\n"


def in_words(markdown: str) -> str:
    """The cells of a table that are a name of the files, in words."""

    def cells(line: str) -> str:
        return " | ".join(WORDS.get(x, x) for x in line.split(" | "))

    lines = markdown.splitlines()
    return "\n".join(
        f"| {cells(x[2:-2])} |" if x.startswith("| ") else x for x in lines
    )


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
    return without_heading(report.summary(content["tasks"])) + of_machine(content)


def longer(content: Content) -> str:
    """Training and test loss after ten times the steps."""
    found = content["tasks"].values()

    def cell(row: Content) -> str:
        losses = (report.mean(row[x]) for x in ("train_loss", "test_loss"))
        return ", ".join(map(tables.number, losses))

    rows = [
        [method.label, *(cell(task["methods"][name]) for task in found)]
        for name, method in report.METHODS.items()
        if all(name in task["methods"] for task in found)
    ]
    return tables.table(["method", *content["tasks"]], rows) + of_machine(content)


def convex(content: Content) -> str:
    found = [bold_heading(linear.table(x, content[x])) for x in linear.REGIMES]
    return "\n\n".join(found) + of_machine(content)


def costs(content: Content) -> str:
    found = [bold_heading(step_cost.table(x)) for x in content["trees"].values()]
    return "\n\n".join(found) + of_machine(content)


def nets(content: Content) -> str:
    found = [bold_heading(figure2.table(k, x)) for k, x in content["nets"].items()]
    return "\n\n".join(found) + of_machine(content)


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
    "longer": ("networks/results/longer.json", longer),
    "convex": ("convex/results/convex.json", convex),
    "costs": ("costs/results/step_cost.json", costs),
    "costs_h100": ("costs/results/step_cost_h100.json", costs),
    "digits": ("figures/results/figure2_digits.json", nets),
    "mnist": ("figures/results/figure2_mnist.json", nets),
    "cifar10": ("figures/results/figure2_cifar10.json", nets),
}


def write(benchmarks: Path, folder: Path) -> None:
    """One Markdown file a table."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (file, make) in TABLES.items():
        content = json.loads((benchmarks / file).read_text())
        (folder / f"{name}.md").write_text(in_words(make(content)) + "\n")
