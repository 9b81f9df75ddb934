"""The nets of this study and what they learn: digits, text, MNIST and CIFAR-10.

Plain functions on nested dictionaries with Flax's names and layout: a `kernel` is
(inputs, outputs), that of a convolution (3, 3, inputs, outputs), an `embedding`
(symbols, features).
"""

import functools
import math
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.harness import datasets

EMBEDDING = "embedding"  # In their paths: one unit a row, not a column.
LETTERS = [chr(code) for code in range(32, 127)] + ["\n"]
Arrays = tuple[np.ndarray, ...]


class Task(NamedTuple):
    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, Any], jax.Array]  # Of params and examples.
    train: Arrays  # Examples are rows of every array.
    test: Arrays
    steps: int
    batch_size: int

    def batches(self, seed: int) -> np.ndarray:
        """The rows of every step's examples, one permutation after the other."""
        rng, count = np.random.default_rng(seed), self.steps * self.batch_size
        rows = len(self.train[0])
        orders = [rng.permutation(rows) for _ in range(math.ceil(count / rows))]
        every = np.concatenate(orders)[:count].astype(np.int32)
        return every.reshape(self.steps, self.batch_size)


def kernel(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.nn.initializers.lecun_normal()(key, shape)


def dense_init(key: jax.Array, widths: tuple[int, ...]) -> dict[str, Any]:
    pairs = zip(widths[:-1], widths[1:], strict=True)
    params = {}
    for i, shape in enumerate(pairs):
        weights = kernel(jax.random.fold_in(key, i), shape)
        params[f"dense{i}"] = {"kernel": weights, "bias": jnp.zeros(shape[-1])}
    return params


def norm_init(width: int) -> dict[str, jax.Array]:
    return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}


def dense(layer: Any, x: jax.Array) -> jax.Array:
    return x @ layer["kernel"] + layer.get("bias", 0)


def mlp(params: Any, x: jax.Array, activation: Callable) -> jax.Array:
    *hidden, last = (name for name in sorted(params) if name.startswith("dense"))
    for name in hidden:
        x = activation(dense(params[name], x))
    return dense(params[last], x)


def mlp_loss(activation: Callable, params: Any, examples: Any) -> jax.Array:
    images, labels = examples
    return cross_entropy(mlp(params, images, activation), labels)


def autoencoder_loss(params: Any, examples: Any) -> jax.Array:
    (images,) = examples
    output = jax.nn.sigmoid(mlp(params, images, jax.nn.sigmoid))
    return jnp.mean(jnp.sum((output - images) ** 2, axis=-1))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def conv_init(shape: tuple[int, ...], channels: tuple[int, ...], norm: bool, key):
    height, width, depth = shape
    params: dict[str, Any] = {}
    for i, count in enumerate(channels):
        name = jax.random.fold_in(key, i)
        params[f"conv{i}"] = {"kernel": kernel(name, (3, 3, depth, count))}
        params[f"conv{i}"]["bias"] = jnp.zeros(count)
        if norm:
            params[f"norm{i}"] = norm_init(count)
        depth = count
        if i > 0:
            height, width = math.ceil(height / 2), math.ceil(width / 2)
    widths = height * width * depth, datasets.CLASSES
    return params | dense_init(jax.random.fold_in(key, len(channels)), widths)


def convolution(layer: Any, x: jax.Array, stride: int) -> jax.Array:
    """3 x 3, zeros around: XLA's own is slow in a loop on a CPU, a product is not."""
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [
        x[:, i : i + height : stride, j : j + width : stride]
        for i in range(3)
        for j in range(3)
    ]
    weights = layer["kernel"].reshape(-1, layer["kernel"].shape[-1])
    return jnp.concatenate(shifted, axis=-1) @ weights + layer["bias"]


def group_norm(layer: Any, x: jax.Array, groups: int = 4) -> jax.Array:
    parts = x.reshape(*x.shape[:-1], groups, -1)
    axes = (1, 2, 4)
    mean = parts.mean(axes, keepdims=True)
    scaled = (parts - mean) * jax.lax.rsqrt(parts.var(axes, keepdims=True) + 1e-5)
    return scaled.reshape(x.shape) * layer["scale"] + layer["bias"]


def conv_loss(params: Any, examples: Any) -> jax.Array:
    (x, labels), i = examples, 0
    while f"conv{i}" in params:
        x = convolution(params[f"conv{i}"], x, stride=2 if i else 1)
        if f"norm{i}" in params:
            x = group_norm(params[f"norm{i}"], x)
        x, i = jax.nn.relu(x), i + 1
    return cross_entropy(mlp(params, x.reshape(len(x), -1), jax.nn.relu), labels)


def transformer_init(length: int, width: int, layers: int, key):
    params: dict[str, Any] = {}

    def matrix(name, *shape):
        layer = jax.random.fold_in(key, len(params))
        params[name] = {"kernel": kernel(layer, shape)}

    for i in range(layers):
        params[f"block{i}_norm"] = norm_init(width)
        for name in ("query", "key", "value", "out"):
            matrix(f"block{i}_{name}", width, width)
        params[f"block{i}_mlp_norm"] = norm_init(width)
        matrix(f"block{i}_up", width, 4 * width)
        matrix(f"block{i}_down", 4 * width, width)
    params["norm"] = norm_init(width)
    matrix("head", width, len(LETTERS) + 1)
    keys = jax.random.split(jax.random.fold_in(key, len(params)))
    for name, key, rows in zip(
        ("token", "position"), keys, (len(LETTERS) + 1, length), strict=True
    ):
        params[name] = {EMBEDDING: 0.02 * jax.random.normal(key, (rows, width))}
    return params


def layer_norm(layer: Any, x: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    scaled = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5)
    return scaled * layer["scale"] + layer["bias"]


def transformer_loss(heads: int, params: Any, examples: Any) -> jax.Array:
    (rows,), i = examples, 0
    symbols, targets = rows[:, :-1].astype(jnp.int32), rows[:, 1:].astype(jnp.int32)
    shape = (*symbols.shape, heads, -1)
    x = params["token"][EMBEDDING][symbols] + params["position"][EMBEDDING]
    while f"block{i}_query" in params:
        name = f"block{i}"
        y = layer_norm(params[f"{name}_norm"], x)
        q, k, v = (
            dense(params[f"{name}_{part}"], y).reshape(shape)
            for part in ("query", "key", "value")
        )
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
        x = x + dense(params[f"{name}_out"], y)
        y = layer_norm(params[f"{name}_mlp_norm"], x)
        y = jax.nn.gelu(dense(params[f"{name}_up"], y))
        x, i = x + dense(params[f"{name}_down"], y), i + 1
    return cross_entropy(dense(params["head"], layer_norm(params["norm"], x)), targets)


def text(characters: int, length: int) -> Arrays:
    """Windows of Python's own library, its largest modules in the order of names."""
    folder = Path(sysconfig.get_path("stdlib"))
    parts, total = [], 0
    for path in sorted(folder.glob("[a-z]*.py")):
        part = path.read_text(encoding="utf-8", errors="replace")
        if total < characters and len(part) > 30_000:
            parts.append(part[: characters - total])
            total += len(parts[-1])
    codes = {letter: code for code, letter in enumerate(LETTERS)}
    symbols = [codes.get(letter, len(LETTERS)) for letter in "".join(parts)]
    rows = len(symbols) // (length + 1)
    windows = np.array(symbols[: rows * (length + 1)], np.uint8).reshape(rows, -1)
    held_out = max(1, rows // 10)  # The last modules.
    return windows[:-held_out], windows[-held_out:]


@functools.cache
def images(source: str, scaling: str, data_dir: Path | None) -> datasets.Dataset:
    data = datasets.load(source, data_dir)
    train, test = data.train_images, data.test_images
    low = train.min(axis=(0, 1, 2))
    span = train.max(axis=(0, 1, 2)) - low
    mean, std = train.mean(axis=0), train.std(axis=0)
    scale = {
        "raw": lambda x: (x - low) / span,  # The file's pixels, from 0 to 1.
        "global": lambda x: x,
        "pixel": lambda x: (x - mean) / np.where(std > 0, std, 1),
    }[scaling]
    return data._replace(train_images=scale(train), test_images=scale(test))


class Size(NamedTuple):
    widths: tuple[int, ...]  # Without those of the data.
    steps: int
    batch_size: int


class Transformer(NamedTuple):
    length: int  # Of a window of text.
    layers: int
    heads: int


SIZES = {
    "mlp": Size((256, 128), 200, 32),
    "conv": Size((16, 32, 32), 200, 32),
    "autoencoder": Size((96, 48, 12), 600, 32),
    "transformer": Size((32,), 250, 16),  # A window of text is many examples.
    "transformer_large": Size((512,), 300, 16),
    "mnist": Size((32, 64, 128), 300, 64),
    "cifar10": Size((32, 64, 128), 300, 64),
    "cifar10_large": Size((256, 512, 1024), 300, 64),
}
TRANSFORMERS = {
    "transformer": Transformer(32, 2, 4),
    "transformer_large": Transformer(64, 4, 8),
}
SMALL = {"mlp": (6,), "autoencoder": (4,), "transformer": (8,)}  # Else (4, 4).
MLPS = {
    "mlp_raw": ("raw", jax.nn.relu),
    "mlp_global": ("global", jax.nn.relu),
    "mlp_pixel": ("pixel", jax.nn.relu),
    "mlp_sigmoid": ("global", jax.nn.sigmoid),
}
TASKS = (*MLPS, "conv", "conv_norm", "autoencoder", "transformer")
FILES = ("mnist", "cifar10")  # Conv nets, on data that needs a folder.
LARGE = ("transformer_large", "cifar10_large")  # Nets for a GPU.


def make(name: str, data_dir: Path | None, small: bool, times: int = 1) -> Task:
    """A task of TASKS, FILES or LARGE, with so many times its steps."""
    family = name.split("_")[0]
    size = SIZES[name if name in SIZES else family]
    if small:
        size = Size(SMALL.get(family, (4, 4)), 12, 8)
    budget = size.steps * times, size.batch_size
    if family == "transformer":
        length, layers, heads = TRANSFORMERS[name]
        length = 6 if small else length
        train, test = text(4000 if small else 400_000, length)
        init = functools.partial(transformer_init, length, *size.widths, layers)
        loss = functools.partial(transformer_loss, heads)
        return Task(init, loss, (train,), (test,), *budget)
    scaling, activation = MLPS.get(name, ("global", None))
    x, labels, test_x, test_labels = images(
        family if family in FILES else "digits",
        "raw" if name == "autoencoder" else scaling,
        data_dir,
    )
    if family in ("conv", *FILES):
        norm = name.endswith("_norm")
        init = functools.partial(conv_init, x.shape[1:], size.widths, norm)
        return Task(init, conv_loss, (x, labels), (test_x, test_labels), *budget)
    x, test_x = x.reshape(len(x), -1), test_x.reshape(len(test_x), -1)
    if family == "autoencoder":
        widths = (x.shape[1], *size.widths, *size.widths[-2::-1], x.shape[1])
        init = functools.partial(dense_init, widths=widths)
        return Task(init, autoencoder_loss, (x,), (test_x,), *budget)
    init = functools.partial(
        dense_init, widths=(x.shape[1], *size.widths, datasets.CLASSES)
    )
    loss = functools.partial(mlp_loss, activation)
    return Task(init, loss, (x, labels), (test_x, test_labels), *budget)
