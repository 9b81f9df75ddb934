"""Digits, MNIST and CIFAR-10 as NumPy arrays, from scikit-learn or from files."""

import gzip
import io
import math
import struct
import tarfile
import zlib
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np

SOURCES = {
    "mnist": "the four idx-ubyte files come from https://yann.lecun.com/exdb/mnist or "
    "its copy https://storage.googleapis.com/cvdf-datasets/mnist",
    "cifar10": "cifar-10-binary.tar.gz comes from "
    "https://www.cs.toronto.edu/~kriz/cifar.html",
}
CLASSES = 10


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
        (the binary version, as the archive or extracted).
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
    images = parts[0]
    mean = images.mean(axis=(0, 1, 2), dtype=np.float64).astype(np.float32)
    std = images.std(axis=(0, 1, 2), dtype=np.float64).astype(np.float32)
    std = np.where(std > 0, std, np.float32(1))

    def scaled(images: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray((images.astype(np.float32) - mean) / std)

    train, labels, test, test_labels = parts
    return Dataset(
        *(scaled(train), labels.astype(np.int32)),
        *(scaled(test), test_labels.astype(np.int32)),
    )


def _digits(_: Path) -> tuple[np.ndarray, ...]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = digits.images[..., None]
    order = np.random.default_rng(0).permutation(len(images))
    test, train = np.split(order, [len(images) // 5])
    return images[train], digits.target[train], images[test], digits.target[test]


def _mnist(data_dir: Path) -> tuple[np.ndarray, ...]:
    arrays: list[np.ndarray] = []
    for part in ("train", "t10k"):
        images_path = _find_idx(data_dir, f"{part}-images-idx3-ubyte")
        labels_path = _find_idx(data_dir, f"{part}-labels-idx1-ubyte")
        images = _read_idx(images_path, dimensions=3)
        labels = _read_idx(labels_path, dimensions=1)
        if len(labels) != len(images):
            many = f"{len(images)} images of {images_path.name}"
            raise DataError(f"{labels_path}: {len(labels)} labels for the {many}")
        if arrays and arrays[0].shape[1:3] != images.shape[1:]:
            raise DataError(
                f"{images_path}: images of shape {images.shape[1:]}, those for "
                f"training are {arrays[0].shape[1:3]}"
            )
        _check_labels(labels, labels_path)
        arrays += [images[..., None], labels]
    return tuple(arrays)


def _find_idx(data_dir: Path, name: str) -> Path:
    for folder in (data_dir, data_dir / "mnist"):
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise DataError(f"{data_dir / name}[.gz]: no such file")


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Reads unsigned bytes in IDX: magic number, big-endian shape, values."""
    content = _read(path)
    header = 4 * (1 + dimensions)
    if content[:4] != bytes([0, 0, 8, dimensions]):
        raise DataError(
            f"{path}: not an IDX file of bytes with {dimensions} axes (it starts with "
            f"0x{content[:4].hex()})"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:header].ljust(header - 4, b"\0"))
    size = len(content) - header
    if size != math.prod(shape) or size == 0:
        raise DataError(
            f"{path}: truncated or damaged, its header promises the shape {shape} but "
            f"{max(size, 0)} bytes follow"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        # Browsers unpack some downloads and keep the name: trust the content.
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _cifar10(data_dir: Path) -> tuple[np.ndarray, ...]:
    batches = _cifar10_files(data_dir)
    train = sorted(name for name in batches if "data_batch_" in name)
    test = [name for name in batches if name.endswith("test_batch.bin")]
    for found, wanted in ((train, "data_batch_1.bin"), (test, "test_batch.bin")):
        if not found:
            path = data_dir / "cifar-10-batches-bin" / wanted
            raise DataError(f"{path}: no such file, nor in a cifar-10-binary.tar.gz")
    parts = [_cifar10_rows(name, batches[name]) for name in train]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return images, labels, *_cifar10_rows(test[0], batches[test[0]])


def _cifar10_files(data_dir: Path) -> dict[str, bytes]:
    """The contents of the batches by name, from a folder, else from the archive."""
    for folder in (data_dir, data_dir / "cifar10"):
        for extracted in (folder, folder / "cifar-10-batches-bin"):
            paths = [*extracted.glob("data_batch_*.bin"), extracted / "test_batch.bin"]
            files = {str(path): _read(path) for path in paths if path.is_file()}
            if files:
                return files
        archive = folder / "cifar-10-binary.tar.gz"
        if archive.is_file():
            return _unpack(archive)
    return {}


def _unpack(archive: Path) -> dict[str, bytes]:
    try:
        with tarfile.open(fileobj=io.BytesIO(_read(archive)), mode="r:") as tar:
            return {
                f"{archive}/{member.name}": tar.extractfile(member).read()
                for member in tar
                if member.isfile() and fnmatch(Path(member.name).name, "*_batch*.bin")
            }
    except tarfile.TarError as error:
        raise DataError(
            f"{archive}: not a tar archive, or truncated ({error})"
        ) from error


def _cifar10_rows(name: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one label and 3 x 32 x 32 pixels, channels first in the file."""
    if not content or len(content) % 3073:
        size = f"{len(content)} bytes are not rows of 3073"
        raise DataError(f"{name}: truncated or damaged, {size}")
    rows = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    _check_labels(rows[:, 0], name)
    return rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]


def _check_labels(labels: np.ndarray, name: str | Path) -> None:
    if labels.max() >= CLASSES:
        raise DataError(f"{name}: a label is {labels.max()}, above 9")
