"""The table that :func:`suggest_partition` prints."""

import jax.numpy as jnp

from bma_optax import _names
from bma_optax.partitions import _build
from bma_optax.partitions._rules import Rule, per_leaf
from bma_optax.suggest._structure import Probe, Structure
from bma_optax.suggest._trial import MOST_STEPS, Trial

_HEAD = (
    "array", "shape", "reach", "periodic", "fields", "apart", "stiffness",
    "without curvature", "meets",
)  # fmt: skip

_FEW = 10  # steps, of which blocks could save hardly any.


def report(
    found: list[Structure],
    rule: Rule,
    tried: Trial | None,
    all_tried: dict[Rule, Trial],
    probe: Probe,
    params,
) -> str:
    """Writes what was found, what to expect, and the partition.

    Args:
      found: the arrays.
      rule: what is suggested.
      tried: how it went; None if nothing was tried.
      all_tried: this trial and those of other rules.
      probe: the products that found the structure.
      params: the parameters.
    """
    total = probe.count + sum(x.products for x in all_tried.values())
    lines = [f"Suggested partition: {rule}", f"(found by {total:,} products)", ""]
    rows = [_HEAD, *(_row(array, found) for array in found)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines += [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines += ["", *_remarks(found), *_expectation(rule, tried, probe)]
    lines += [
        f"{_names.name_of(path)!r} is {x.dtype}: what a step changes by less than "
        f"{float(jnp.finfo(x.dtype).eps):.1g} of a number is lost, so that steps may "
        "stand still. Keep parameters in float32."
        for path, x in _names.named_leaves(params)
        if x.dtype.itemsize < 4
    ]
    if rule in all_tried:
        lines += [
            _other(x, all_tried[x], all_tried[rule]) for x in all_tried if x != rule
        ]
    if tried is not None and rule is not per_leaf:
        lines += ["", repr(_build.layout(params, rule))]
    return "\n".join(lines)


def _row(array: Structure, found: list[Structure]) -> tuple[str, ...]:
    axes, space = array.axes, array.space
    fields = [i for i, axis in enumerate(axes) if i not in space and not axis.is_apart]
    apart = [i for i, axis in enumerate(axes) if axis.is_batch]
    return (
        _names.name_of(array.path),
        str(array.shape),
        ", ".join(_reach(axis) for axis in axes) or "-",
        _positions([i for i in space if axes[i].periodic], "no"),
        _positions([i for i in fields if axes[i].length > 1] if space else []),
        _positions(apart),
        "-"
        if array.stiffness is None
        else ", ".join(f"{x:.2g}" for x in array.stiffness),
        f"{100 * array.empty:.0f} %" if space else "-",
        ", ".join(_names.name_of(found[i].path) for i in array.meets) or "-",
    )


def _reach(axis) -> str:
    return "all" if axis.reach is None else str(axis.reach)


def _positions(axes: list[int], none: str = "-") -> str:
    return "axis " + ", ".join(map(str, axes)) if axes else none


def _remarks(found: list[Structure]) -> list[str]:
    lines = []
    for array in found:
        name = repr(_names.name_of(array.path))
        if array.space and array.constant < 1e-3:
            lines.append(
                f"Constants have next to no curvature in {name}: its mean is slow, or "
                "free."
            )
        if array.is_fourth_order:
            lines.append(
                f"Slopes have no curvature in {name}: the loss is of fourth order. "
                "Block means alone are too rough there; blocks have slopes as well."
            )
        outside = [i for i in array.meets if found[i].shape != array.shape]
        if array.space and outside:
            names = ", ".join(_names.name_of(found[i].path) for i in outside)
            lines.append(
                f"What {name} and other arrays ({names}) have in common is taken for "
                "zero: they are not fields on one grid."
            )
    return lines


def _other(rule: Rule, other: Trial, tried: Trial) -> str:
    """How another rule went, in a sentence."""
    steps = f"more than {MOST_STEPS}" if other.steps is None else other.steps
    times = f"each {other.seconds / tried.seconds:.1f} times as long on this machine"
    return f"{rule} takes {steps} steps, {times}."


def _expectation(rule: Rule, tried: Trial | None, probe: Probe) -> list[str]:
    """Tells how many steps conjugate gradients took, in sentences."""
    if probe.is_flat:
        return [
            "The curvature is 0 here: the loss is linear, or has kinks. Pass another "
            "`curvature`, such as bma.GaussNewton, or take bma.adagrad_bma."
        ]
    if tried is None:
        return [
            "No array has neighbours: nothing is local, or arrays are too small. For a "
            "network take bma.adagrad_bma or bma.adam_bma with bma.units, for a few "
            "hundred parameters bma.newton_bma(bma.per_element), else optax.lbfgs."
        ]
    if not tried.local:
        return [
            "A check found entries of the curvature beyond the reach above. Pass a "
            "larger reach by hand if you know it; else take optax.lbfgs."
        ]
    if not tried.convex:
        return [
            "The curvature is not positive definite at these parameters, so what to "
            "expect is not known. Try again at parameters nearer to a minimum."
        ]
    if probe.vanishes:
        return [
            "Most elements have no curvature at these parameters, though they have "
            "nearby, so what to expect is not known. Try again at parameters nearer to "
            "a minimum."
        ]
    gap = "1e-6 of the gap"
    with_blocks = (
        f"{tried.steps} steps to {gap} with blocks"
        if tried.steps is not None
        else f"more than {MOST_STEPS} steps to {gap} with blocks"
    )
    if tried.steps_without is not None:
        without = f"{tried.steps_without} without"
    elif tried.steps is not None:
        without = (
            f"more than {tried.tried} without (then {tried.left_without:.1g} of it is "
            "left)"
        )
    else:
        without = "no fewer without"
    lines = [
        f"Conjugate gradients from here: {with_blocks}, {without}. coarse_ratio "
        f"{tried.coarse_ratio:.2g}."
    ]
    if rule is per_leaf:
        few = (tried.steps_without or MOST_STEPS) <= _FEW
        reason = (
            "few steps are needed without them"
            if few
            else "what is slow here is not smooth"
        )
        lines.append(
            f"Blocks do not pay: {reason}. Take optax.lbfgs, or conjugate gradients "
            "with the diagonal."
        )
    return lines
