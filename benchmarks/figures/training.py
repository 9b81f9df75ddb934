"""How figure2.py trains: a net, its batches, and runs that outlive an interruption."""

import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from tqdm import tqdm

from benchmarks.harness import datasets

MakeOptimizer = Callable[[Any], optax.GradientTransformation]
KEEP_AFTER = 5.0  # Seconds of training that an interruption may lose.


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


class Run(NamedTuple):
    """One training: a method, a learning rate, a seed."""

    losses: np.ndarray  # Of each step's batch.
    train_loss: float  # Of the whole training set, at the end. Not finite: diverged.
    test_accuracy: float
    seconds: list[float]  # Per step, one entry an epoch.


class Problem:
    """A net, its data and its batches: what all methods and learning rates share."""

    def __init__(
        self,
        data: datasets.Dataset,
        channels: tuple[int, ...],
        options: Any,
        folder: Path,
    ) -> None:
        self.train = jnp.asarray(data.train_images), jnp.asarray(data.train_labels)
        self.test = jnp.asarray(data.test_images), jnp.asarray(data.test_labels)
        self.net = functools.partial(ConvNet, data.train_images.shape[1:], channels)
        self.graphdef, self.params = nnx.split(self.net(seed=0))
        self.epochs, self.batch_size = options.epochs, options.batch_size
        self.steps = len(data.train_labels) // self.batch_size  # Per epoch.
        self.folder = folder.absolute()

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
        start = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
            self.params, state, 1.0, self.train, batch
        )
        return lowered.compile(), time.perf_counter() - start

    def start(self, make: MakeOptimizer, seed: int) -> dict[str, Any]:
        """All that a run is, before its first step."""
        params = nnx.state(self.net(seed))
        # Donated buffers must not be shared, as constants are.
        state = jax.tree.map(jnp.array, make(1.0).init(params))
        return {
            "params": params,
            "state": state,
            "losses": np.zeros((self.epochs, self.steps), np.float32),
            "seconds": np.zeros(self.epochs),
        }

    def batches(self, seed: int, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(len(self.train[1])).astype(np.int32)
        return order[: self.steps * self.batch_size].reshape(self.steps, -1)

    def run(
        self,
        name: str,
        make: MakeOptimizer,
        step: Callable,
        rate: float,
        seed: int,
        bar: tqdm,
    ) -> Run:
        """Trains from the last epoch that an earlier start has kept, if any."""
        keeping = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
        with ocp.CheckpointManager(
            self.folder / f"{name}-{seed}", options=keeping
        ) as kept:
            run, done = self.start(make, seed), kept.latest_step() or 0
            if done:
                run = kept.restore(done, args=ocp.args.StandardRestore(run))
            bar.update(done)
            saved = time.perf_counter()
            for epoch in range(done, self.epochs):
                losses, start = [], time.perf_counter()
                params, state = run["params"], run["state"]
                for batch in self.batches(seed, epoch):
                    params, state, loss = step(params, state, rate, self.train, batch)
                    losses.append(loss)
                jax.block_until_ready(params)
                run["seconds"][epoch] = (time.perf_counter() - start) / self.steps
                run["losses"][epoch] = jax.device_get(losses)
                run |= {"params": params, "state": state}
                last = epoch + 1 == self.epochs
                if last or time.perf_counter() - saved > KEEP_AFTER:
                    kept.save(epoch + 1, args=ocp.args.StandardSave(run))
                    kept.wait_until_finished()
                    saved = time.perf_counter()
                bar.update()
        train_loss, _ = self.evaluate(run["params"], *self.train)
        _, accuracy = self.evaluate(run["params"], *self.test)
        losses = np.asarray(run["losses"], np.float64).reshape(-1)
        return Run(losses, train_loss, accuracy, run["seconds"].tolist())


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
