"""Every public name has a page on the site and an example that runs."""

import ast
import doctest
import inspect
import json
import re
import sys
from pathlib import Path

import jax
import pytest

import bma_optax as bma

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
PROGRAMS = [
    pytest.param(program, id=f"{page.stem}-{i}")
    for page in PAGES
    if page.stem != "troubles"  # Its recipes are in test_troubles.py.
    for i, program in enumerate(
        re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    )
]


def test_every_public_name_has_a_page():
    listed = re.findall(r"^   (\w+)$", (DOCS / "api.md").read_text(), re.M)
    assert sorted(listed) == sorted(bma.__all__)


def test_every_public_name_has_an_example():
    for name in bma.__all__:
        text = getattr(bma, name).__doc__ or ""
        assert doctest.DocTestParser().get_examples(text), name


def test_the_version_has_one_source():
    tree = ast.parse(Path(bma.__file__).read_text())
    assigned = [x for x in tree.body if isinstance(x, ast.Assign)]
    assert "__version__" in {x.targets[0].id for x in assigned}
    project = (DOCS.parent / "pyproject.toml").read_text()
    assert not re.search(r"^version\s*=", project, re.M)
    changes = (DOCS.parent / "CHANGELOG.md").read_text()
    assert f"## {bma.__version__}" in changes


def test_workflows_pin_their_actions():
    for path in (DOCS.parent / ".github" / "workflows").glob("*.yml"):
        text = path.read_text()
        uses = re.findall(r"uses: (\S+)", text)
        assert uses and all(re.search(r"@[0-9a-f]{40}$", x) for x in uses)
        assert "bash .ci/run" in text


def test_aliases_take_what_their_transformations_take_and_document_it():
    for alias, transformation in (
        (bma.adagrad_bma, bma.scale_by_bma),
        (bma.adam_bma, bma.scale_by_adam_bma),
        (bma.mini_bma, bma.scale_by_mini_bma),
        (bma.newton_bma, bma.scale_by_newton_bma),
        (bma.natural_bma, bma.scale_by_natural_bma),
    ):
        mine = inspect.signature(alias).parameters
        for name, theirs in inspect.signature(transformation).parameters.items():
            # The step rule of the alias knows when the direction is out of date.
            by_rule = (alias, name) == (bma.newton_bma, "update_interval")
            wanted = None if by_rule else theirs.default
            assert mine[name].default == wanted, (alias, name)
        for name in mine:
            assert f"\n  {name}: " in inspect.getdoc(alias), (alias, name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_page_says_first_who_it_is_for(page):
    _, first = re.findall(r"^(?!\().+", page.read_text(), re.M)[:2]
    assert first.startswith("For those ")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_says_first_who_it_is_for_and_in_which_precision(notebook):
    first = "".join(json.loads(notebook.read_text())["cells"][0]["source"])
    title, text = first.split("\n\n", 1)
    assert title.startswith("# ") and text.startswith("For those ")
    assert re.search("float(32|64)", text)


def test_every_page_and_notebook_is_in_the_index():
    listed = re.findall(r"^[\w/]+$", (DOCS / "index.md").read_text(), re.M)
    names = [f"notebooks/{x.stem}" for x in NOTEBOOKS] + [x.stem for x in PAGES]
    assert sorted([*listed, "index"]) == sorted(names)


@pytest.mark.benchmark
def test_tables_have_words_in_the_place_of_names_of_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(DOCS)])
    import _tables

    _tables.write(DOCS.parent / "benchmarks", tmp_path)
    for table in tmp_path.glob("*.md"):
        cells = re.findall(r"(?<=\| )[^|]+?(?= \|)", table.read_text())
        assert cells and not [x for x in cells if re.fullmatch(r"[a-z]+_\w+", x)]


@pytest.mark.benchmark
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_of_the_docs_runs(program, monkeypatch):
    # Sums over shards of hundreds of steps can wait for each other on two cores.
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        exec(program, {})
