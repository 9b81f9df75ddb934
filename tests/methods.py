"""A row for every transformation of the library. ``test_harness.py`` tests each row."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest

import bma_optax as bma


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """An optimiser and what it takes to build it."""

    factory: Callable[..., Any]
    kwargs: dict[str, Any]  # all of them pass through inject_hyperparams
    trees: int  # trees like the parameters in its state

    @functools.cache  # noqa: B019
    def build(self):
        """The same transformation at each call, so that tests share its programs."""
        return self.factory(**self.kwargs)


def row(name, factory, trees=1, **kwargs):
    return pytest.param(Method(factory, kwargs, trees), id=name)


# The Hessian of whatever loss `update` is given as `loss_of`.
ANY_LOSS = bma.GaussNewton(lambda p: p, lambda y, loss_of: loss_of(y))
# The units of arrays that have no name to go by, as in many tests.
UNITS = bma.within("block", bma.per_column)

# The losses of the tests couple all elements of an array.
GRID = bma.per_tile((2,), reach=15)
OTHERS = [(name,) for name in ("0", "b", "bias", "embedding")]


@dataclasses.dataclass(frozen=True)
class GridsAndOthers(bma.Rule):
    """Arrays with some names have one block and no reach: a grid is a long program."""

    def tile(self, path, shape):
        return shape if self.is_other(path) else GRID.tile(path, shape)

    def reach(self, path, shape):
        return None if self.is_other(path) else GRID.reach(path, shape)

    def is_other(self, path):
        return "c" in path[:1] or path[-1:] in OTHERS


METHODS = [
    row("adagrad_bma", bma.adagrad_bma, learning_rate=1.0),
    row(
        "adagrad_bma per_column symmetric",
        bma.adagrad_bma,
        learning_rate=1.0,
        partition=bma.per_column,
        form="symmetric",
        update_interval=2,
    ),
    row(
        "adagrad_bma per_tile by layer",
        bma.adagrad_bma,
        learning_rate=1.0,
        partition=bma.within("layer", bma.per_tile((2,))),
        initial_accumulator_value=0.1,
    ),
    row(
        "adagrad_bma learned",
        bma.adagrad_bma,
        trees=2,
        learning_rate=1.0,
        partition=UNITS,
        weights="learned",
        min_eigenvalue=1.0,
    ),
    row(
        "adam_bma learned",
        bma.adam_bma,
        trees=3,
        learning_rate=0.01,
        partition=bma.within("array", bma.per_column),
        estimator="projection",
        weights="learned",
        update_interval=2,
    ),
    row(
        "mini_bma",
        bma.mini_bma,
        trees=5,
        learning_rate=0.01,
        partition=bma.per_column,
    ),
    row("newton_bma", bma.newton_bma, trees=4, learning_rate=None),
    row(
        "newton_bma with a reach",
        bma.newton_bma,
        trees=4,
        learning_rate=None,
        partition=GridsAndOthers(),
    ),
    row(
        "natural_bma per_column by layer damped",
        bma.natural_bma,
        trees=4,
        learning_rate=None,
        curvature=ANY_LOSS,
        partition=bma.within("layer", bma.per_column),
        update_interval=2,
        b2=0.5,
        damping=0.1,
        max_norm=10.0,
        key=1,
    ),
]
BY_NAME = {m.id: m.values[0] for m in METHODS}
# newton_bma has the keywords of the one with a reach, which has arrays of one block
# beside its grids: what is told of types and of layouts runs for the latter alone.
DISTINCT = [m for m in METHODS if m.id != "newton_bma"]
every_distinct_method = pytest.mark.parametrize("method", DISTINCT)
every_method = pytest.mark.parametrize("method", METHODS)
# One of each kind, for what is told of a wrapper: first order; and Newton, whose state
# holds a dense coarse matrix and nested ones.
KINDS = ("adagrad_bma", "newton_bma with a reach")
every_kind = pytest.mark.parametrize("method", [m for m in METHODS if m.id in KINDS])
# Those with a rate, which need neither parameters nor a loss.
RATED = [m for m in METHODS if m.values[0].kwargs["learning_rate"] is not None]
every_rated_method = pytest.mark.parametrize("method", RATED)
