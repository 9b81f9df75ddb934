"""The problems of this study: digits, whose parameters have no neighbours."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import bma_optax as bma
from benchmarks.harness import solver

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem(solver.Problem):
    fisher: bma.Curvature | None = None


def digits(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Seeds 0 and 1 have disjoint halves of the examples."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    size = len(order) // 2
    rows = order[seed % 2 * size :][:size]
    return (images[rows] - 4.9) / 6.0, labels[rows]  # Mean 0 and variance 1, about.


def squares(params) -> jax.Array:
    return optax.tree.norm(params, squared=True) / 2


def softmax_instance(seed: int):
    return {"w": np.zeros((64, 10)), "b": np.zeros(10)}, digits(seed)


def softmax_loss(params, data) -> jax.Array:
    images, labels = data
    logits = images @ params["w"] + params["b"]
    return cross_entropy(logits, labels).mean() + 1e-3 * squares(params)


def factorisation_instance(seed: int):
    images, _ = digits(seed)
    rng = np.random.default_rng(seed)
    seen = rng.random(images.shape) < 0.5
    factors = {"u": (len(images), 8), "v": (64, 8)}
    params = {name: 0.3 * rng.normal(size=shape) for name, shape in factors.items()}
    return params, (images, seen)


def factorisation_loss(params, data) -> jax.Array:
    images, seen = data
    errors = jnp.where(seen, params["u"] @ params["v"].T - images, 0)
    return (jnp.vdot(errors, errors) / 2 + 0.1 * squares(params)) / len(images)


def net_instance(seed: int):
    rng = np.random.default_rng(seed)
    params = {
        "w1": rng.normal(size=(64, 16)) / 8,
        "b1": np.zeros(16),
        "w2": rng.normal(size=(16, 10)) / 4,
        "b2": np.zeros(10),
    }
    return params, digits(0)  # The same images: a loss says little across others.


def net(params, data) -> jax.Array:
    hidden = jnp.tanh(data[0] @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def net_outer(outputs, data) -> jax.Array:
    logits, params = outputs
    return cross_entropy(logits, data[1]).mean() + 1e-4 * squares(params)


PROBLEMS = {
    "softmax": Problem(
        name="softmax",
        title="softmax regression",
        make=softmax_instance,
        loss=softmax_loss,
        partition=bma.per_unit,
    ),
    # Not convex, but every method was seen to end at the same loss to all digits.
    "factorisation": Problem(
        name="factorisation",
        title="factors of images, half of whose pixels are seen",
        make=factorisation_instance,
        loss=factorisation_loss,
        partition=bma.per_column,
    ),
    "net": Problem(
        name="net",
        title="net with one hidden layer",
        make=net_instance,
        loss=lambda params, data: net_outer((net(params, data), params), data),
        curvature=bma.GaussNewton(lambda p, data: (net(p, data), p), net_outer),
        partition=bma.per_unit,
        update_interval=20,
        level=0.014,  # The rates were tuned to it on the other start.
        fisher=bma.Fisher(net, jax.random.categorical, cross_entropy),
    ),
}
