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

MNIST_SOURCE = (
    "the four idx-ubyte files come from https://yann.lecun.com/exdb/mnist or its copy "
    "https://storage.googleapis.com/cvdf-datasets/mnist"
)
CIFAR10_SOURCE = (
    "cifar-10-binary.tar.gz comes from https://www.cs.toronto.edu/~kriz/cifar.html"
)
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
    if dataset == "digits":
        return _standardise(*_digits())
    loaders = {"mnist": _mnist, "cifar10": _cifar10}
    if dataset not in loaders:
        raise DataError(f"`dataset` must be digits, mnist or cifar10, got {dataset!r}.")
    if data_dir is None:
        source = MNIST_SOURCE if dataset == "mnist" else CIFAR10_SOURCE
        raise DataError(f"{dataset} needs the folder of its files (data_dir): {source}")
    return _standardise(*loaders[dataset](Path(data_dir)))


def _standardise(
    train_images: np.ndarray,
    train_labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
) -> Dataset:
    mean = train_images.mean(axis=(0, 1, 2), dtype=np.float64).astype(np.float32)
    std = train_images.std(axis=(0, 1, 2), dtype=np.float64).astype(np.float32)
    std = np.where(std > 0, std, np.float32(1))

    def scale(images: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray((images.astype(np.float32) - mean) / std)

    return Dataset(
        scale(train_images),
        train_labels.astype(np.int32),
        scale(test_images),
        test_labels.astype(np.int32),
    )


def _digits() -> tuple[np.ndarray, ...]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = digits.images[..., None]
    order = np.random.default_rng(0).permutation(len(images))
    test, train = np.split(order, [len(images) // 5])
    return images[train], digits.target[train], images[test], digits.target[test]


def _mnist(data_dir: Path) -> tuple[np.ndarray, ...]:
    arrays = []
    for part in ("train", "t10k"):
        images_path = _find_idx(data_dir, f"{part}-images-idx3-ubyte")
        labels_path = _find_idx(data_dir, f"{part}-labels-idx1-ubyte")
        images = _read_idx(images_path, dimensions=3)
        labels = _read_idx(labels_path, dimensions=1)
        if len(labels) != len(images):
            raise DataError(
                f"{labels_path}: {len(labels)} labels for the {len(images)} images of "
                f"{images_path.name}; {MNIST_SOURCE}"
            )
        _check_labels(labels, labels_path, MNIST_SOURCE)
        arrays += [images[..., None], labels]
    train_shape, test_shape = arrays[0].shape[1:3], arrays[2].shape[1:3]
    if train_shape != test_shape:
        raise DataError(
            f"{images_path}: images of shape {test_shape}, those for training are "
            f"{train_shape}; {MNIST_SOURCE}"
        )
    return tuple(arrays)


def _find_idx(data_dir: Path, name: str) -> Path:
    for folder in (data_dir, data_dir / "mnist"):
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise DataError(f"{data_dir / name}[.gz]: no such file; {MNIST_SOURCE}")


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Reads unsigned bytes in IDX: magic number, big-endian shape, values."""
    content = _read(path, MNIST_SOURCE)
    header = 4 * (1 + dimensions)
    if content[:4] != bytes([0, 0, 8, dimensions]):
        raise DataError(
            f"{path}: not an IDX file of bytes with {dimensions} axes (it starts with "
            f"0x{content[:4].hex()}); {MNIST_SOURCE}"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:header].ljust(header - 4, b"\0"))
    size = len(content) - header
    if size != math.prod(shape) or size == 0:
        raise DataError(
            f"{path}: truncated or damaged, its header promises the shape {shape} but "
            f"{max(size, 0)} bytes follow; {MNIST_SOURCE}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read(path: Path, source: str) -> bytes:
    try:
        content = path.read_bytes()
        # Browsers unpack some downloads and keep the name: trust the content.
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); {source}") from error


def _cifar10(data_dir: Path) -> tuple[np.ndarray, ...]:
    batches = _cifar10_files(data_dir)
    names = sorted(name for name in batches if "data_batch_" in name)
    test = [name for name in batches if name.endswith("test_batch.bin")]
    for found, wanted in ((names, "data_batch_1.bin"), (test, "test_batch.bin")):
        if not found:
            raise DataError(
                f"{data_dir / 'cifar-10-batches-bin' / wanted}: no such file, nor in a "
                f"cifar-10-binary.tar.gz; {CIFAR10_SOURCE}"
            )
    parts = [_cifar10_rows(name, batches[name]) for name in names]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return images, labels, *_cifar10_rows(test[0], batches[test[0]])


def _cifar10_files(data_dir: Path) -> dict[str, bytes]:
    """The contents of the batches by name, from a folder, else from the archive."""
    for folder in (data_dir, data_dir / "cifar10"):
        for extracted in (folder, folder / "cifar-10-batches-bin"):
            paths = [*extracted.glob("data_batch_*.bin"), extracted / "test_batch.bin"]
            files = {str(p): _read(p, CIFAR10_SOURCE) for p in paths if p.is_file()}
            if files:
                return files
        archive = folder / "cifar-10-binary.tar.gz"
        if archive.is_file():
            return _unpack(archive)
    return {}


def _unpack(archive: Path) -> dict[str, bytes]:
    content = io.BytesIO(_read(archive, CIFAR10_SOURCE))
    try:
        with tarfile.open(fileobj=content, mode="r:") as tar:
            return {
                f"{archive}/{member.name}": tar.extractfile(member).read()
                for member in tar
                if member.isfile() and fnmatch(Path(member.name).name, "*_batch*.bin")
            }
    except tarfile.TarError as error:
        raise DataError(
            f"{archive}: not a tar archive, or truncated ({error}); {CIFAR10_SOURCE}"
        ) from error


def _cifar10_rows(name: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one label and 3 x 32 x 32 pixels, channels first in the file."""
    if not content or len(content) % 3073:
        raise DataError(
            f"{name}: truncated or damaged, {len(content)} bytes are not rows of 3073; "
            f"{CIFAR10_SOURCE}"
        )
    rows = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    _check_labels(rows[:, 0], name, CIFAR10_SOURCE)
    return rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]


def _check_labels(labels: np.ndarray, name: str | Path, source: str) -> None:
    if labels.max() >= CLASSES:
        raise DataError(f"{name}: a label is {labels.max()}, above 9; {source}")
