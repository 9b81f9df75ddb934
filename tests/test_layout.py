"""Each folder lists its modules, and imports go from upper floors to lower ones."""

import ast
import graphlib
import re
from pathlib import Path

import bma_optax as bma

PACKAGE, ROOT = Path(bma.__file__).parent, Path(__file__).parent.parent
# Each floor may take from those before it, and no folder from another of its floor.
FLOORS = [
    {"partitions", "algebra"},
    {"adaptive", "curvature"},
    {"multilevel"},
    {"newton"},
    {"_diagnostics", "suggest"},
    {"__init__"},
]


def modules():
    """Each module's dotted name, and the names of those that it imports."""
    paths = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
    }
    found = {}
    for name, path in paths.items():
        imports = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                # One spelling, which the next lines know.
                assert not any(x.name.startswith("bma_optax") for x in node.names), name
            if not isinstance(node, ast.ImportFrom):
                continue
            assert node.level == 0, name
            if node.module.startswith("bma_optax"):
                base = node.module.removeprefix("bma_optax").lstrip(".")
                whole = [f"{base}.{alias.name}".lstrip(".") for alias in node.names]
                imports |= {w if w in paths else base for w in whole}
        found[name] = imports - {"", name}
    return found


def floor(name):
    part = name.partition(".")[0]
    return next((i for i, names in enumerate(FLOORS, 1) if part in names), 0)


def test_no_import_goes_up_or_across():
    for name, imports in modules().items():
        for other in imports:
            same_folder = name.partition(".")[0] == other.partition(".")[0]
            down = floor(other) < floor(name) or floor(name) == floor(other) == 0
            assert same_folder or down, (name, other)


def test_no_imports_form_a_circle():
    tuple(graphlib.TopologicalSorter(modules()).static_order())


def test_every_module_says_what_it_is_for_and_is_short():
    for path in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path
        assert len(path.read_text().splitlines()) < 300, path


def test_every_folder_lists_its_modules():
    for folder in PACKAGE.iterdir():
        if (folder / "__init__.py").exists():
            text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
            listed = set(re.findall(r"\b(_[a-z_]+)", text))
            assert listed == {path.stem for path in folder.glob("_[a-z]*.py")}, folder
    # The ground floor has its list in the map, with the folders.
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = set(re.findall(r"\b_[a-z]\w+", text.split("## What a change needs")[0]))
    assert found == {path.stem for path in PACKAGE.glob("_[a-z]*.py")}


def test_benchmarks_use_public_names_alone():
    for path in (ROOT / "benchmarks").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not node.module.startswith("bma_optax"), path
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "bma":
                assert node.attr in bma.__all__, (path, node.attr)
