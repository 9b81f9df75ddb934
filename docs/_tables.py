"""Tables of the site in Markdown, from the JSON that the benchmarks wrote."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.convex import __main__ as linear
from benchmarks.costs import accelerator, collectives, step_cost
from benchmarks.figures import figure2
from benchmarks.grids import gallery as operators
from benchmarks.grids import pictures, prices
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
    **{f"{n}x{n}": f"{n}²" for n in (512, 1024, 2048)},
    **{f"{n}x{n}x{n}": f"{n}³" for n in (64, 128)},
    "gridding_1310": "2 % seen",
    "gridding_327": ".5 % seen",
    "gridding_81": ".125 % seen",
    "bma_heavy_ball, refresh": "heavy ball on `scale_by_newton_bma`, with a refresh",
    "newton_bma, refresh": "`newton_bma`, with a refresh",
    "product": "product with the Hessian",
    **{f"eigh {n}": f"`eigh`, L = {n}" for n in (16, 64, 256, 1024)},
    "scale_by_rss": "update of AdaGrad",
    "scale_by_bma": "update of `scale_by_bma`, L = 10",
    "scale_by_bma, sums": "update of `scale_by_bma` without its root",
    "softmax": "softmax regression",
    "factorisation": "factors of images",
    "net": "net with one hidden layer",
    **report.TITLES,
}
SHAPES = ["x".join(map(str, shape)) for shape in accelerator.SHAPES]
COMPILED = {  # There SGD has no momentum.
    **{name: method.label for name, method in step_cost.METHODS.items()},
    **{"sgd": "SGD", "heavy ball": WORDS["bma_heavy_ball"]},
    "newton_bma": WORDS["newton_bma"],
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


def one_size(content: Content) -> str:
    """The page tells the size, which here is a part of the problems' names."""
    return everything(
        content
        | {"problems": {k.split("_")[0]: v for k, v in content["problems"].items()}}
    )


def real(content: Content) -> str:
    found = {k: v for k, v in content["problems"].items() if k in OTHERS}
    return summary(found) + of_machine(content)


def gallery(content: Content) -> str:
    return operators.report(content) + of_machine(content)


def prices_of_blocks(content: Content) -> str:
    return prices.report(content) + of_machine(content)


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


def floors(content: Content) -> str:
    """A row for each partition and form, and a column for each floor."""
    columns: dict[str, Content] = {}
    for variant, cells in content["rows"].items():
        for floor, found in cells.items():
            columns.setdefault(f"{float(floor):g}", {})[variant] = found
    cell = "{loss:.4f}, {largest:.1f}".format_map
    return across(columns, cell) + of_machine(content)


def nets(content: Content) -> str:
    found = [bold_heading(figure2.table(k, x)) for k, x in content["nets"].items()]
    return "\n\n".join(found) + of_machine(content)


def across(found: dict[str, Content], cell: Callable[[Any], str]) -> str:
    """A column for each key, and a row for each name that any of them has."""
    names = dict.fromkeys(name for rows in found.values() for name in rows)
    lines = [
        [name, *(cell(rows[name]) if name in rows else "-" for rows in found.values())]
        for name in names
    ]
    return tables.table(["", *found], lines)


def steps_on_gpu(content: Content) -> str:
    """Milliseconds, the least of the rounds."""

    def least(row: Content) -> str:
        return f"{1e3 * row['range'][0]:.2g}"

    found = {shape: content["steps"][shape] for shape in SHAPES}
    return across(found, least) + of_machine(content)


def races_on_gpu(content: Content) -> str:
    """Seconds, of which the file has the medians, and steps."""

    def cell(row: Content) -> str:
        return f"{row['seconds']:.3g} ({row['steps']})"

    found = {shape: content["races"][shape]["methods"] for shape in SHAPES}
    return across(found, cell) + of_machine(content)


def roots(content: Content) -> str:
    return accelerator.table(content["roots"]) + of_machine(content)


def compiled(content: Content, part: str) -> str:
    """Bytes an element and kernels, of a step and of one that has a refresh."""

    def rows(cells: Content) -> Content:
        found = {}
        for name, row in cells.items():
            found[COMPILED[name]] = row["step"]
            if row["with refresh"] != row["step"]:
                found[f"{COMPILED[name]}, with a refresh"] = row["with refresh"]
        return found

    def cell(row: Content) -> str:
        return f"{row['bytes']:.1f}, {row['kernels']}"

    unit = " arrays" if part == "trees" else ""
    found = {name + unit: rows(cells) for name, cells in content[part].items()}
    head = f"**Compiled for {content['options']['target']}**\n\n"
    return head + across(found, cell) + of_machine(content)


compiled_trees = partial(compiled, part="trees")
compiled_grids = partial(compiled, part="grids")


def devices(text: str) -> str:
    """How the devices of a cell are called; the method is heavy ball in all of them."""
    text = text.replace(" auto, heavy ball", "").replace("4x2", "4 x 2")
    return text.replace(" explicit, heavy ball", ", explicit axes")


def sent(content: Content) -> str:
    """Bytes of one device, on one of the grids."""
    cells, kept = content["grids"]["512x512"], ("1", "8", "4x2")
    numbers = ("permuted", "gathered", "arguments", "temporaries")
    rows = [
        [devices(where), program, *(f"{row[x]:,}" for x in numbers)]
        for where in (f"{mesh} auto, heavy ball" for mesh in kept)
        for program, row in cells[where].items()
        if program != "product"
    ]
    columns = ["devices", "program", "permuted", "gathered or reduced", *numbers[2:]]
    return tables.table(columns, rows) + of_machine(content)


def sent_relatively(content: Content) -> str:
    found = [
        f"**{WORDS[name]}**\n\n{collectives.ratios(cells)}"
        for name, cells in content["grids"].items()
    ]
    return devices("\n\n".join(found)) + of_machine(content)


# The file of each table, and what makes it.
TABLES: dict[str, tuple[str, Callable[[Content], str]]] = {
    "grids": ("grids/results/grids.json", grids),
    "one_core": ("grids/results/one_core.json", grids),
    "volumes": ("grids/results/volumes.json", grids),
    "real": ("grids/results/grids.json", real),
    "energies": ("grids/results/energies.json", everything),
    "energies_256": ("grids/results/energies_256.json", one_size),
    "energies_float32": ("grids/results/energies_float32.json", everything),
    "gallery": ("grids/results/gallery.json", gallery),
    "prices": ("grids/results/prices.json", prices_of_blocks),
    "gridding": ("grids/results/gridding.json", everything),
    "curvature": ("curvature/results/curvature.json", everything),
    "networks": ("networks/results/networks.json", networks),
    "networks_gpu": ("networks/results/gpu.json", networks),
    "longer": ("networks/results/longer.json", longer),
    "convex": ("convex/results/convex.json", convex),
    "costs": ("costs/results/step_cost.json", costs),
    "costs_h100": ("costs/results/step_cost_h100.json", costs),
    "steps_h100": ("costs/results/accelerator_h100.json", steps_on_gpu),
    "races_h100": ("costs/results/accelerator_h100.json", races_on_gpu),
    "roots_h100": ("costs/results/accelerator_h100.json", roots),
    "min_eigenvalue": ("costs/results/min_eigenvalue.json", floors),
    "compiled_h100": ("costs/results/compiled_h100.json", compiled_trees),
    "compiled_v5e": ("costs/results/compiled_v5e.json", compiled_trees),
    "compiled_h100_grids": ("costs/results/compiled_h100.json", compiled_grids),
    "compiled_v5e_grids": ("costs/results/compiled_v5e.json", compiled_grids),
    "sent": ("costs/results/collectives.json", sent),
    "sent_relatively": ("costs/results/collectives.json", sent_relatively),
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
