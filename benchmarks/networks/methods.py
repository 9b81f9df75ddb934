"""The methods of this study: what they are called, and how they are tuned."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import bma_optax as bma
from benchmarks.networks.peers import (
    is_embedding,
    scale_by_adam_mini,
    scale_by_soap,
    with_random_directions,
)
from benchmarks.networks.tasks import EMBEDDINGS


def unit_tile(path, shape):
    """One block a unit, one a row of embeddings, none in arrays with one axis."""
    if len(shape) < 2:
        return None
    return (1, *shape[1:]) if EMBEDDINGS in path else (*shape[:-1], 1)


UNITS = bma.by_function(unit_tile)
KEPT = 1 - 2**-24  # A decay with which nothing moves.


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


def muon_dimensions(params: Any):
    """Embeddings, the transformer's head and what is no matrix have Adam."""

    def one(path, p):
        if p.ndim < 2 or is_embedding(path) or "head" in str(path):
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(p.ndim - 1)), p.ndim - 1)

    return jax.tree.map_with_path(one, params)


def muon(beta: Any, rest: Any, consistent_rms: float | None):
    return optax.contrib.muon(
        -1.0,  # Its sign is for descent already.
        beta=beta,
        adam_learning_rate=-rest,
        muon_weight_dimension_numbers=muon_dimensions,
        consistent_rms=consistent_rms,
    )


def mini_bma(**options: Any):
    return bma.scale_by_mini_bma(partition=UNITS, **options)


def random_directions():
    return with_random_directions(mini_bma(b3=KEPT), jax.random.key(99))


B2 = {"b2": (0.95, 0.99, 0.999)}
C = {"c": (0.0, 0.3), "b2": (0.99, 0.999)}

METHODS = {
    "adam": Method("Adam", adam, B2),
    "adam_centralized": Method(
        "Adam, centralised gradients",
        # `optax.centralize` is for the layout (units, inputs).
        lambda b2: optax.chain(bma.scale_block_mean(0.0, UNITS), adam(b2)),
        B2,
    ),
    "adam_mini": Method("Adam-mini", lambda b2: scale_by_adam_mini(b2=b2), B2),
    "muon": Method(
        "Muon, scaled by width",
        functools.partial(muon, consistent_rms=None),
        {"beta": (0.9, 0.95), "rest": (0.03, 0.1)},
        -6,
    ),
    "muon_rms": Method(
        "Muon, scaled to Adam's size",
        functools.partial(muon, consistent_rms=0.2),
        {"beta": (0.9, 0.95), "rest": (0.3, 1.0)},
        -6,
    ),
    "soap": Method(
        "SOAP",
        scale_by_soap,
        {"b1": (0.9, 0.95), "b2": (0.95, 0.99)},
        factorizes=True,
    ),
    "adagrad": Method(
        "AdaGrad", lambda: optax.scale_by_rss(initial_accumulator_value=0.0), start=-5
    ),
    "adagrad_bma": Method("AdaGrad-BMA", bma.scale_by_bma, start=-5, factorizes=True),
    "adagrad_bma_projection": Method(
        "AdaGrad-BMA, projection",
        lambda: bma.scale_by_bma(estimator="projection", min_eigenvalue=1.0),
        start=-5,
        factorizes=True,
    ),
    "adam_bma": Method(
        "Adam-BMA", lambda b2: bma.scale_by_adam_bma(b2=b2), B2, factorizes=True
    ),
    "adam_bma_projection": Method(
        "Adam-BMA, projection",
        lambda b2: bma.scale_by_adam_bma(
            b2=b2, estimator="projection", min_eigenvalue=1.0
        ),
        B2,
        factorizes=True,
    ),
    "adam_shrunk": Method(
        "Adam, block means of the update times c",
        lambda c, b2: optax.chain(adam(b2), bma.scale_block_mean(c, UNITS)),
        C,
    ),
    "adam_shrunk_learned": Method(
        "Adam, a learned direction of the update times c",
        lambda c, b2: optax.chain(
            adam(b2), bma.scale_block_mean(c, UNITS, weights="learned")
        ),
        C,
    ),
    "mini_bma": Method("mini-BMA, learned weights", mini_bma),
    "mini_bma_tuned": Method(
        "mini-BMA, learned weights, b2 and b3 tuned",
        mini_bma,
        {"b2": (0.95, 0.99), "b3": (0.8, 0.95, 0.99)},
    ),
    "mini_bma_constant": Method("mini-BMA, plain means", lambda: mini_bma(b3=KEPT)),
    "mini_bma_random": Method("mini-BMA, random weights", random_directions),
}
