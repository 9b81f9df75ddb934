"""What the floor `min_eigenvalue` does: AdaGrad-BMA on scikit-learn's digits.

    python -m benchmarks.costs.min_eigenvalue

A small multilayer perceptron, mini-batches, no momentum. For each partition rule and
floor: the mean training loss over seeds at the best learning rate of an interior grid,
that rate, and the largest single entry of any update before the rate.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import bma_optax as bma
from benchmarks.harness import datasets
from benchmarks.harness.results import Parser, Results, positive
from benchmarks.harness.tables import table
from benchmarks.harness.tuning import best_of
from benchmarks.networks.tasks import cross_entropy

FLOORS = (0.0, 1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0)
RATES = np.float32(10.0) ** np.arange(-3.5, 0.6, 0.5, dtype=np.float32)
VARIANTS = tuple(itertools.product((bma.per_leaf, bma.per_unit), ("left", "symmetric")))
SHAPES = (64, 32), (32, 10)


def init(key: jax.Array) -> dict[str, jax.Array]:
    keys = jax.random.split(key)
    params = {"b1": jnp.zeros(32), "b2": jnp.zeros(10)}
    for name, k, (inputs, units) in zip(("w1", "w2"), keys, SHAPES, strict=True):
        params[name] = jax.random.normal(k, (inputs, units)) / inputs**0.5
    return params


def loss(params, images, labels) -> jax.Array:
    hidden = jax.nn.relu(images @ params["w1"] + params["b1"])
    return cross_entropy(hidden @ params["w2"] + params["b2"], labels)


def make_training(rule, form, images, labels, steps):
    """(floor, rate, seed) -> final training loss and the largest entry of an update."""

    def train(floor, rate, seed):
        tx = bma.scale_by_bma(rule, form=form, min_eigenvalue=floor)
        init_key, data_key = jax.random.split(jax.random.key(seed))
        params = init(init_key)

        def step(carry, key):
            params, state, largest = carry
            batch = jax.random.randint(key, (64,), 0, len(images))
            grads = jax.grad(loss)(params, images[batch], labels[batch])
            updates, state = tx.update(grads, state, params)
            largest = jnp.maximum(largest, optax.tree.norm(updates, ord=jnp.inf))
            params = optax.apply_updates(params, optax.tree.scale(-rate, updates))
            return (params, state, largest), None

        carry = (params, tx.init(params), jnp.float32(0))
        keys = jax.random.split(data_key, steps)
        (params, _, largest), _ = jax.lax.scan(step, carry, keys)
        return loss(params, images, labels), largest

    over_seeds = jax.vmap(train, (None, None, 0))
    return jax.jit(jax.vmap(over_seeds, (None, 0, None)))


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("benchmarks.costs.min_eigenvalue", __doc__)
    parser.add_argument("--steps", type=positive, default=400)
    parser.add_argument("--seeds", type=positive, default=3)
    options = parser.parse(arguments)
    data = datasets.load("digits")
    images = jnp.asarray(data.train_images).reshape(len(data.train_images), -1)
    labels = jnp.asarray(data.train_labels)
    shared = {"steps": options.steps, "seeds": options.seeds}
    results, lines = Results(options, shared, jax, optax, bma), []
    for rule, form in tqdm(VARIANTS, disable=None):
        train = make_training(rule, form, images, labels, options.steps)
        for floor in FLOORS:

            def row(train=train, floor=floor):
                seeds = jnp.arange(options.seeds)
                losses, largest = train(jnp.float32(floor), RATES, seeds)
                means = np.asarray(losses, float).mean(axis=1)
                best, on_edge = best_of(dict(enumerate(means)))
                found = {"loss": means[best], "rate": RATES[best]}
                return found | {
                    "on_edge": on_edge,
                    "largest": float(largest[best].max()),
                }

            found = results.cell(row, "rows", f"{rule} {form}", floor)
            edge = " (edge of the grid)" if found["on_edge"] else ""
            numbers = f"{found['loss']:.4f}", f"{found['rate']:.2g}{edge}"
            lines.append((rule, form, floor, *numbers, f"{found['largest']:.1f}"))
    columns = "rule, form, min_eigenvalue, training loss, best rate, max update"
    print(table(columns.split(", "), lines))
    results.finish()


if __name__ == "__main__":
    main()
