"""Every public name has a page on the site and an example that runs."""

import ast
import doctest
import inspect
import re
from pathlib import Path

import jax
import pytest

import bma_optax as bma

DOCS = Path(__file__).parent.parent / "docs"
PROGRAMS = re.findall(
    r"```python\n(.*?)```", (DOCS / "training.md").read_text(), re.DOTALL
)


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


@pytest.mark.benchmark
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_of_the_docs_runs(program):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        exec(program, {})
