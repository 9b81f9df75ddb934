"""Formulas as MathML: browsers draw them without a script and without a network."""

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert


def mathml(node: nodes.Node, display: str) -> str:
    formula = node.astext().strip()
    if r"\\" in formula and r"\begin" not in formula:  # As in Sphinx, lines.
        formula = rf"\begin{{split}}{formula}\end{{split}}"
    return convert(formula, display=display)


def inline(translator: Any, node: nodes.Node) -> None:
    translator.body.append(mathml(node, "inline"))
    raise nodes.SkipNode


def block(translator: Any, node: nodes.Node) -> None:
    translator.body.append(f'<div class="math">{mathml(node, "block")}</div>\n')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
