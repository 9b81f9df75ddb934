"""A row for every transformation of the library: the harness tests each of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

import bma_optax as bma


class Method(NamedTuple):
    """An optimiser and what it takes to build it."""

    factory: Callable[..., Any]
    kwargs: dict[str, Any]  # all of them pass through inject_hyperparams

    def build(self):
        return self.factory(**self.kwargs)


def row(name, factory, **kwargs):
    return pytest.param(Method(factory, kwargs), id=name)


METHODS = [
    row("adagrad_bma", bma.adagrad_bma, learning_rate=1.0),
    row(
        "adagrad_bma per_unit symmetric",
        bma.adagrad_bma,
        learning_rate=1.0,
        partition=bma.per_unit,
        form="symmetric",
    ),
    row(
        "adagrad_bma per_element",
        bma.adagrad_bma,
        learning_rate=1.0,
        partition=bma.per_element,
    ),
    row(
        "adagrad_bma per_tile by layer",
        bma.adagrad_bma,
        learning_rate=1.0,
        partition=bma.per_tile((2,)),
        couple="layer",
        initial_accumulator_value=0.1,
    ),
]
every_method = pytest.mark.parametrize("method", METHODS)
