"""What the floor `min_eigenvalue` does: AdaGrad-BMA on scikit-learn's digits.

    python -m benchmarks.costs.min_eigenvalue

A small multilayer perceptron, mini-batches, no momentum. For each partition rule and
floor: the mean training loss over seeds at the best learning rate of an interior grid,
that rate, and the largest single entry of any update before the rate.
"""

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import bma_optax as bma
from benchmarks.harness import datasets

FLOORS = (0.0, 1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0)
RATES = np.float32(10.0) ** np.arange(-3.5, 0.6, 0.5, dtype=np.float32)
RULES = (bma.per_leaf, bma.per_unit)
FORMS = ("left", "symmetric")
SIZES = (64, 32, 10)


def init(key: jax.Array) -> list[dict[str, jax.Array]]:
    keys = jax.random.split(key, len(SIZES) - 1)
    return [
        {"w": jax.random.normal(k, (m, n)) / m**0.5, "b": jnp.zeros(n)}
        for k, m, n in zip(keys, SIZES[:-1], SIZES[1:], strict=True)
    ]


def loss(params, images, labels) -> jax.Array:
    hidden = images
    for layer in params[:-1]:
        hidden = jax.nn.relu(hidden @ layer["w"] + layer["b"])
    logits = hidden @ params[-1]["w"] + params[-1]["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    data = datasets.load("digits", None)
    images = jnp.asarray(data.train_images).reshape(len(data.train_images), -1)
    labels = jnp.asarray(data.train_labels)
    print("| rule | form | min_eigenvalue | training loss | best rate | max update |")
    print("|---|---|---|---|---|---|")
    for rule, form in itertools.product(RULES, FORMS):
        train = make_training(rule, form, images, labels, options.steps)
        for floor in tqdm(FLOORS, desc=f"{rule} {form}", leave=False):
            losses, largest = train(
                jnp.float32(floor), RATES, jnp.arange(options.seeds)
            )
            means = np.nan_to_num(np.asarray(losses).mean(axis=1), nan=np.inf)
            best = int(means.argmin())
            edge = " (edge of the grid)" if best in (0, len(RATES) - 1) else ""
            print(
                f"| {rule} | {form} | {floor:g} | {means[best]:.4f} | "
                f"{RATES[best]:.2g}{edge} | {np.asarray(largest[best]).max():.1f} |"
            )


if __name__ == "__main__":
    main()
