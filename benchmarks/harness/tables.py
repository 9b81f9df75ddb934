"""Tables in Markdown, and the numbers in their cells."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any


def table(columns: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    lines = [columns, ["--"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def number(x: float | None, form: str = ".3g") -> str:
    return "diverged" if x is None or not math.isfinite(x) else format(x, form)


def middle(values: Sequence[float], form: str = ".3g") -> str:
    """The median, with the extremes."""
    return _with_range(statistics.median(values), values, form)


def mean(values: Sequence[float], form: str = ".3g") -> str:
    """The mean, with the extremes."""
    return _with_range(statistics.fmean(values), values, form)


def _with_range(center: float, values: Sequence[float], form: str) -> str:
    if len(values) == 1:
        return format(center, form)
    return f"{center:{form}} ({min(values):{form}} to {max(values):{form}})"
