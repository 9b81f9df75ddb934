"""Figure 1 from real gradients: a matrix, its block mean, and the small matrix.

    python -m benchmarks.figures.figure1

A small net learns scikit-learn's digits by AdaGrad; F = Z^-1 H Z^-1 with
H = sum of g gᵀ is built in full, projected by eq. (2), one block per unit, and drawn.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import bma_optax as bma
from benchmarks.harness import datasets
from benchmarks.networks.tasks import cross_entropy

HIDDEN, STEPS, BATCH = 8, 600, 64


def gradients(images: jax.Array, labels: jax.Array) -> np.ndarray:
    """The gradient of each step, (steps, d), the weights of a unit side by side."""
    classes = int(labels.max()) + 1
    keys = jax.random.split(jax.random.key(0), 3)
    width = images.shape[1]
    params = [
        jnp.zeros(HIDDEN),
        jax.random.normal(keys[0], (HIDDEN, width)) / width**0.5,
        jnp.zeros(classes),
        jax.random.normal(keys[1], (classes, HIDDEN)) / HIDDEN**0.5,
    ]

    def loss(params, batch):
        hidden = jnp.tanh(images[batch] @ params[1].T + params[0])
        logits = hidden @ params[3].T + params[2]
        return cross_entropy(logits, labels[batch])

    tx = optax.adagrad(0.1, initial_accumulator_value=0.0)

    def step(carry, key):
        params, state = carry
        batch = jax.random.randint(key, (BATCH,), 0, len(images))
        grads = jax.grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        flat = jnp.concatenate([g.ravel() for g in grads])
        return (optax.apply_updates(params, updates), state), flat

    steps = jax.random.split(keys[2], STEPS)
    return np.asarray(jax.lax.scan(step, (params, tx.init(params)), steps)[1])


def main() -> None:
    data = datasets.load("digits")
    images = jnp.asarray(data.train_images).reshape(len(data.train_images), -1)
    g = gradients(images, jnp.asarray(data.train_labels))
    g = g[STEPS // 2 :]  # The first few gradients are so large that H would be theirs.
    moves = np.any(g != 0, axis=0)  # Some pixels are always empty.
    units = (HIDDEN, *(images.shape[1],) * HIDDEN, 10, *(HIDDEN,) * 10)
    block = np.repeat(np.arange(len(units)), units)[moves]
    sizes = [int(size) for size in np.bincount(block) if size]
    g = g[:, moves]
    d = len(block)
    H = g.T @ g
    z = np.sqrt(np.diag(H))
    F = H / np.outer(z, z)
    matrix = bma.BlockMeanMatrix.project(F, sizes)
    approximation = np.asarray(matrix.to_dense())

    figure = Figure(figsize=(11, 3.9), layout="constrained")
    panels = [
        (F, f"$F = Z^{{-1}} H Z^{{-1}}$: {d} × {d}"),
        (approximation, f"its block mean: {len(sizes)} blocks"),
        (np.asarray(matrix.B), f"what is stored: $\\Lambda$ and $B$, {len(sizes)}²"),
    ]
    for axes, (values, title) in zip(figure.subplots(1, 3), panels, strict=True):
        image = axes.imshow(values, cmap="RdBu", vmin=-0.6, vmax=0.6)
        axes.set_title(title)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.colorbar(image, ax=figure.axes, shrink=0.8)
    path = Path(__file__).parent / "results" / "figure1.png"
    figure.savefig(path, dpi=70)
    lost = np.linalg.norm(F - approximation) / np.linalg.norm(F)
    diagonal = np.linalg.norm(F - np.eye(d)) / np.linalg.norm(F)
    print(f"relative error: block mean {lost:.3f}, diagonal {diagonal:.3f}")
    print(path)


if __name__ == "__main__":
    main()
