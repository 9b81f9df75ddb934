"""The methods of this study: what they are called, and how they are tuned."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bma_optax as bma
from benchmarks.networks.peers import is_embedding, scale_along_direction, scale_by_soap


class Method(NamedTuple):
    """`make`: settings -> a transformation to the direction that a rate multiplies.

    Every combination of the values in `settings` is tuned over rates 2^k around
    `start`; all of them may be traced. `factorizes`: it has eigenvectors of its own.
    """

    label: str
    make: Callable[..., optax.GradientTransformation]
    settings: dict[str, tuple[float, ...]] = {}
    start: int = -8
    factorizes: bool = False

    def variants(self) -> list[dict[str, float]]:
        values = itertools.product(*self.settings.values())
        return [dict(zip(self.settings, each, strict=True)) for each in values]


def adam(b2: Any):
    return optax.scale_by_adam(b2=b2)


def adagrad():
    return optax.scale_by_rss(initial_accumulator_value=0.0)


def units_learned():
    return bma.scale_by_bma(bma.units, weights="learned")


def decay(count):
    return 1 / jnp.sqrt(1 + count)


def warm_up(tx):
    """The first 25 steps are shorter: rates rise in proportion to the step."""
    rise = optax.linear_schedule(1 / 25, 1.0, 24)
    return optax.chain(tx, optax.scale_by_schedule(rise))


def muon_dimensions(params: Any):
    """Embeddings, the transformer's head and what is no matrix have Adam."""

    def one(path, p):
        if p.ndim < 2 or is_embedding(path) or "head" in str(path):
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(p.ndim - 1)), p.ndim - 1)

    return jax.tree.map_with_path(one, params)


def muon(beta: Any, rest: Any):
    return optax.contrib.muon(
        -1.0,  # Its sign is for descent already.
        beta=beta,
        adam_learning_rate=-rest,
        muon_weight_dimension_numbers=muon_dimensions,
        consistent_rms=0.2,
    )


B2 = {"b2": (0.95, 0.99, 0.999)}
C = {"c": (0.0, 0.1, 0.3)}

METHODS = {
    "adam": Method("Adam", adam, B2),
    "adagrad": Method("AdaGrad", adagrad, start=-5),
    "adagrad_bma": Method(
        "AdaGrad-BMA, a block an array", bma.scale_by_bma, start=-5, factorizes=True
    ),
    "units_report": Method(
        "AdaGrad-BMA, units of an array see each other",
        lambda: bma.scale_by_bma(bma.within("array", bma.per_unit), estimator="report"),
        start=-5,
        factorizes=True,
    ),
    "units_constant": Method(
        "AdaGrad-BMA, each unit alone", lambda: bma.scale_by_bma(bma.units), start=-5
    ),
    "units_learned": Method(
        "AdaGrad-BMA, each unit alone, learned weights", units_learned, start=-5
    ),
    "units_learned_warm": Method(
        "AdaGrad-BMA, each unit alone, learned weights, warm-up",
        lambda: warm_up(units_learned()),
        start=-5,
    ),
    "adagrad_shrunk_learned": Method(
        "AdaGrad, a learned direction of the update times c",
        lambda c: optax.chain(adagrad(), scale_along_direction(c)),
        C,
        start=-5,
    ),
    "adam_shrunk_learned": Method(
        "Adam, a learned direction of the update times c",
        lambda c, b2: optax.chain(adam(b2), scale_along_direction(c)),
        C | {"b2": (0.99, 0.999)},
    ),
    "adam_bma_units": Method(
        "Adam-BMA, each unit alone, learned weights",
        lambda b2: bma.scale_by_adam_bma(b2=b2, partition=bma.units, weights="learned"),
        B2,
    ),
    "mini_bma": Method("mini-BMA", lambda b2: bma.scale_by_mini_bma(b2=b2), B2),
    "soap": Method(
        "SOAP",
        scale_by_soap,
        {"b1": (0.9, 0.95), "b2": (0.95, 0.99)},
        factorizes=True,
    ),
    "muon_rms": Method(
        "Muon, scaled to Adam's size",
        muon,
        {"beta": (0.9, 0.95), "rest": (0.3, 1.0)},
        start=-6,
    ),
    "adam_warm": Method("Adam, warm-up", lambda b2: warm_up(adam(b2)), B2),
    "adagrad_warm": Method("AdaGrad, warm-up", lambda: warm_up(adagrad()), start=-5),
    "adam_decayed": Method(
        "Adam, rate / √t",
        lambda b2: optax.chain(adam(b2), optax.scale_by_schedule(decay)),
        {"b2": (0.99, 0.999)},
        start=-5,
    ),
}
