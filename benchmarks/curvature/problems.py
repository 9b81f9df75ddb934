"""The problems of curvature.py: none has neighbours that pull together."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

import bma_optax as bma


def tiles_of_five(path, shape):
    return tuple(min(5, n) for n in shape)  # Arrays may be shorter.


TILES = bma.by_function(tiles_of_five)
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


class Problem(NamedTuple):
    """A loss, and `make`: seed -> (params, data) of an instance; 0 is reported."""

    make: Callable[[int], tuple[Any, Any]]
    loss: Callable[..., jax.Array]
    curvature: bma.Curvature
    finer: bma.Rule
    update_interval: int = 10
    convexity: float | None = None  # A lower bound of the Hessian's eigenvalues.
    level: float | None = None  # The loss to reach, where there are many minima.
    fisher: bma.Curvature | None = None


def half(seed: int, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Seeds 0 and 1 have disjoint halves of the examples."""
    order = np.random.default_rng(0).permutation(len(arrays[0]))
    size = len(order) // 2
    rows = order[seed % 2 * size :][:size]
    return tuple(array[rows] for array in arrays)


def standardise(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(0)) / np.maximum(x.std(0), 1e-6)


def grouped(groups: dict[str, np.ndarray]) -> tuple[Any, Any]:
    """Zero weights and standardised features, an array for each group."""
    features = {name: standardise(x) for name, x in groups.items()}
    params = {name: np.zeros(x.shape[1]) for name, x in groups.items()}
    return params | {"bias": np.zeros(())}, features


def products_of(x: np.ndarray, y: np.ndarray | None = None) -> np.ndarray:
    """Products of all pairs of columns."""
    if y is None:
        i, j = np.triu_indices(x.shape[1])
        return x[:, i] * x[:, j]
    return (x[:, :, None] * y[:, None, :]).reshape(len(x), -1)


def predict(params, features) -> jax.Array:
    return params["bias"] + sum(x @ params[name] for name, x in features.items())


def squares(params) -> jax.Array:
    return optax.tree.norm(params, squared=True) / 2


def logistic_instance(seed: int):
    x, labels = half(seed, *datasets.load_breast_cancer(return_X_y=True))
    mean, error, worst = np.split(standardise(x), 3, axis=1)
    families = {"mean": mean, "error": error, "worst": worst}
    pairs = {f"{name} squared": products_of(x) for name, x in families.items()}
    params, features = grouped(families | pairs)
    return params, (features, labels.astype(np.float64))


def logistic_loss(params, data) -> jax.Array:
    features, labels = data
    losses = optax.sigmoid_binary_cross_entropy(predict(params, features), labels)
    return losses.mean() + 1e-3 * squares(params)


def poisson_instance(seed: int):
    x, counts = half(seed, *datasets.load_diabetes(return_X_y=True))
    body, serum = np.split(standardise(x), [4], axis=1)
    pairs = {
        "body squared": products_of(body)[:, [0, *range(2, 10)]],  # Sex is binary.
        "serum squared": products_of(serum),
        "body by serum": products_of(body, serum),
    }
    params, features = grouped({"body": body, "serum": serum} | pairs)
    params["bias"] = np.log(counts.mean())
    return params, (features, counts)


def poisson_loss(params, data) -> jax.Array:
    features, counts = data
    log_rates = predict(params, features)
    losses = (jnp.exp(log_rates) - counts * log_rates) / counts.mean()
    return losses.mean() + 1e-3 * squares(params)


def digits(seed: int) -> tuple[np.ndarray, np.ndarray]:
    images, labels = half(seed, *datasets.load_digits(return_X_y=True))
    return (images - 4.9) / 6.0, labels  # Mean 0 and variance 1, about.


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


def net_loss(params, data) -> jax.Array:
    return net_outer((net(params, data), params), data)


PROBLEMS = {
    "logistic": Problem(
        logistic_instance, logistic_loss, bma.Hessian(), TILES, convexity=1e-3
    ),
    "softmax": Problem(
        softmax_instance, softmax_loss, bma.Hessian(), bma.per_unit, convexity=1e-3
    ),
    "poisson": Problem(
        poisson_instance, poisson_loss, bma.Hessian(), TILES, convexity=1e-3
    ),
    # Not convex, but every method was seen to end at the same loss to all digits.
    "factorisation": Problem(
        factorisation_instance, factorisation_loss, bma.Hessian(), bma.per_column
    ),
    "net": Problem(
        net_instance,
        net_loss,
        bma.GaussNewton(lambda params, data: (net(params, data), params), net_outer),
        bma.per_unit,
        update_interval=20,
        level=0.014,  # The rates were tuned to it on the other start.
        fisher=bma.Fisher(net, jax.random.categorical, cross_entropy),
    ),
}
