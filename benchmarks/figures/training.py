"""How figure 2 is trained: a net, its batches, and runs of one rate and seed."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.harness import datasets
from benchmarks.harness.timing import clock, compiled
from benchmarks.networks.tasks import cross_entropy

MakeOptimizer = Callable[[Any], optax.GradientTransformation]
POINTS = 100  # Of a curve.


class ConvNet(nnx.Module):
    """Convolutions that halve the image, then a linear layer."""

    def __init__(self, shape: tuple[int, ...], channels: tuple[int, ...], seed: int):
        height, width, depth = shape
        rngs, layers = nnx.Rngs(seed), []
        for count in channels:
            layers.append(nnx.Conv(depth, count, (3, 3), strides=2, rngs=rngs))
            height, width, depth = math.ceil(height / 2), math.ceil(width / 2), count
        self.convs = nnx.List(layers)
        self.linear = nnx.Linear(height * width * depth, datasets.CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        for conv in self.convs:
            images = nnx.relu(conv(images))
        return self.linear(images.reshape(len(images), -1))


class Problem:
    """A net, its data and its batches: what all methods and learning rates share."""

    def __init__(self, data: datasets.Dataset, channels: tuple[int, ...], options: Any):
        self.train = jnp.asarray(data.train_images), jnp.asarray(data.train_labels)
        self.test = jnp.asarray(data.test_images), jnp.asarray(data.test_labels)
        self.net = functools.partial(ConvNet, data.train_images.shape[1:], channels)
        self.graphdef, self.params = nnx.split(self.net(seed=0))
        self.epochs, self.batch_size = options.epochs, options.batch_size
        self.steps = len(data.train_labels) // self.batch_size  # Per epoch.

    @functools.partial(jax.jit, static_argnums=0)
    def logits(self, params: Any, images: jax.Array) -> jax.Array:
        return nnx.merge(self.graphdef, params)(images)

    def loss(self, params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        return cross_entropy(self.logits(params, images), labels)

    def evaluate(
        self, params: Any, images: jax.Array, labels: jax.Array
    ) -> tuple[float, float]:
        """Mean loss and accuracy over a whole data set, some images at a time."""
        starts = range(0, len(images), 1000)
        parts = [self.logits(params, images[start : start + 1000]) for start in starts]
        logits = jnp.concatenate(parts)
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == labels)
        return float(cross_entropy(logits, labels)), float(accuracy)

    def compile(self, make: MakeOptimizer) -> tuple[Callable, float]:
        """One step for all learning rates, and the seconds its compilation took."""

        # Not a scan over the batches: on a CPU, XLA's convolutions are some ten times
        # slower inside a loop than outside.
        def step(params, state, rate, train, batch):
            examples = (array[batch] for array in train)
            loss, grads = jax.value_and_grad(self.loss)(params, *examples)
            updates, state = make(rate).update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        state = make(1.0).init(self.params)
        batch = np.zeros(self.batch_size, np.int32)
        arguments = self.params, state, 1.0, self.train, batch
        return compiled(step, *arguments, donate_argnums=(0, 1))

    def batches(self, seed: int, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(len(self.train[1])).astype(np.int32)
        return order[: self.steps * self.batch_size].reshape(self.steps, -1)

    def run(self, make: MakeOptimizer, step: Callable, rate: float, seed: int):
        """One training: what is not finite in it diverged."""
        params = nnx.state(self.net(seed))
        # Donated buffers must not be shared, as constants are.
        state = jax.tree.map(jnp.array, make(1.0).init(params))
        losses, seconds = [], []

        def train(params, state, batches):
            found = []
            for batch in batches:
                params, state, loss = step(params, state, rate, self.train, batch)
                found.append(loss)
            return params, state, found

        for epoch in range(self.epochs):
            batches = self.batches(seed, epoch)
            (params, state, found), passed = clock(train, params, state, batches)
            losses.extend(np.asarray(jax.device_get(found), np.float64))
            seconds.append(passed / self.steps)
        parts = np.array_split(losses, min(POINTS, len(losses)))
        return {
            "train_loss": self.evaluate(params, *self.train)[0],
            "test_accuracy": self.evaluate(params, *self.test)[1],
            "seconds_per_step": seconds,  # One an epoch.
            # Losses of the batches, thinned to means over consecutive steps.
            "step": np.cumsum([len(part) for part in parts]),
            "loss": [part.mean() for part in parts],
        }
