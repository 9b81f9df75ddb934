"""The site: `sphinx-build -W docs docs/_build`, after `pip install -e ".[docs]"`."""

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "docs"))

import _tables

import bma_optax

project = "bma_optax"
author = "The bma_optax developers"
copyright = "The bma_optax developers"
version = release = bma_optax.__version__

extensions = [
    "_mathml",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",
    "sphinx_copybutton",
]
html_math_renderer = "mathml"
add_function_parentheses = False  # A rule is no call.
html_theme = "sphinx_book_theme"
html_title = "bma_optax"
html_theme_options = {
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "navbar_persistent": [],  # The sidebar has the search.
}
# One place for the repository's address.
urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
if repository := urls.get("Repository"):
    html_theme_options |= {
        "repository_url": repository,
        "use_repository_button": True,
        "use_issues_button": True,
    }
html_static_path = ["_static"]
html_css_files = ["site.css"]
templates_path = ["_templates"]
exclude_patterns = ["_build", "generated/tables", "jupyter_execute"]
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # They are saved with outputs, and executed by the tests.
autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # The docstrings say more.
napoleon_use_rtype = False

# The pages' tables, from what the benchmarks wrote.
_tables.write(ROOT / "benchmarks", ROOT / "docs" / "generated" / "tables")
