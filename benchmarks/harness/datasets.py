"""Digits, MNIST and CIFAR-10 as NumPy arrays, from scikit-learn or from files."""

import gzip
import io
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits

SOURCES = {
    "mnist": "the four idx-ubyte files come from https://yann.lecun.com/exdb/mnist or "
    "its copy https://storage.googleapis.com/cvdf-datasets/mnist",
    "cifar10": "cifar-10-binary.tar.gz comes from "
    "https://www.cs.toronto.edu/~kriz/cifar.html",
}
CLASSES = 10
Parts = tuple[np.ndarray, ...]  # Images and labels to train with, then to test with.


class DataError(ValueError):
    """A file is missing or is not what its name promises: one line for the user."""


class Dataset(NamedTuple):
    """Standardised float32 images (NHWC) and int32 labels."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load(dataset: str, data_dir: str | Path | None = None) -> Dataset:
    """Loads a data set; its images have mean 0 and variance 1 over the training set.

    Args:
      dataset: "digits" (no files), "mnist" (IDX files, gzipped or not) or "cifar10"
        (the archive of the binary version).
      data_dir: the folder that holds the files, or that folder's parent.

    Raises:
      DataError: if a file is missing or damaged.
    """
    loaders = {"digits": _digits, "mnist": _mnist, "cifar10": _cifar10}
    if dataset not in loaders:
        raise DataError(f"`dataset` must be digits, mnist or cifar10, got {dataset!r}.")
    source = SOURCES.get(dataset)
    if source and data_dir is None:
        raise DataError(f"{dataset} needs the folder of its files (data_dir): {source}")
    try:
        parts = loaders[dataset](Path(data_dir or "."))
    except DataError as error:
        raise DataError(f"{error}; {source}") from error
    mean, std = (
        moment(parts[0], axis=(0, 1, 2), dtype=np.float64).astype(np.float32)
        for moment in (np.mean, np.std)
    )
    std = np.where(std > 0, std, np.float32(1))
    train, test = (
        np.ascontiguousarray((images.astype(np.float32) - mean) / std)
        for images in parts[::2]
    )
    labels, test_labels = (x.astype(np.int32) for x in parts[1::2])
    return Dataset(train, labels, test, test_labels)


def _digits(_: Path) -> Parts:
    digits = load_digits()
    images = digits.images[..., None]
    order = np.random.default_rng(0).permutation(len(images))
    test, train = np.split(order, [len(images) // 5])
    return images[train], digits.target[train], images[test], digits.target[test]


def _mnist(folder: Path) -> Parts:
    parts = []
    for part in ("train", "t10k"):
        images = _read(folder, "mnist", f"{part}-images-idx3-ubyte", _images)
        name = f"{part}-labels-idx1-ubyte"
        labels = _read(folder, "mnist", name, lambda x: _labels(_idx(x, 1)))
        if len(labels) != len(images):
            raise DataError(f"{name}: {len(labels)} labels for {len(images)} images")
        parts += [images, labels]
    return tuple(parts)


def _cifar10(folder: Path) -> Parts:
    return _read(folder, "cifar10", "cifar-10-binary.tar", _batches)


def _read(folder: Path, inner: str, name: str, decode: Callable[[bytes], Any]) -> Any:
    """What a file holds, gzipped or not, or one line that names it."""
    places = [place / name for place in (folder, folder / inner)]
    paths = [Path(f"{place}{end}") for place in places for end in ("", ".gz")]
    path = next(filter(Path.is_file, paths), None)
    if path is None:
        raise DataError(f"{places[0]}[.gz]: no such file")
    try:
        content = path.read_bytes()
        # Browsers unpack some downloads and keep the name: trust the content.
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        return decode(content)
    except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{path}: truncated or damaged: {error}") from error


def _idx(content: bytes, axes: int) -> np.ndarray:
    """Unsigned bytes in IDX: magic number, big-endian shape, values."""
    if content[:4] != bytes([0, 0, 8, axes]):
        raise ValueError(f"not an IDX file of bytes with {axes} axes")
    shape = np.frombuffer(content, ">u4", count=axes, offset=4)
    values = np.frombuffer(content, np.uint8, offset=4 * (1 + axes))
    if values.size == 0:
        raise ValueError("no values")
    return values.reshape(shape)


def _images(content: bytes) -> np.ndarray:
    return _idx(content, 3)[..., None]


def _labels(labels: np.ndarray) -> np.ndarray:
    if labels.max() >= CLASSES:
        raise ValueError(f"a label is {labels.max()}, above 9")
    return labels


def _batches(content: bytes) -> Parts:
    """Rows of one label and 3 x 32 x 32 pixels, channels first in the file."""
    rows = {"data": [], "test": []}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            kind, _, rest = Path(member.name).name.partition("_")
            if kind in rows and rest.endswith(".bin"):
                values = np.frombuffer(tar.extractfile(member).read(), np.uint8)
                rows[kind].append(values.reshape(-1, 3073))
    parts = []
    for kind, batches in rows.items():
        if sum(map(len, batches)) == 0:
            raise ValueError(f"no {kind}_batch*.bin with images")
        every = np.concatenate(batches)
        images = every[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        parts += [images, _labels(every[:, 0])]
    return tuple(parts)
