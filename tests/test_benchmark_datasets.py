"""The loaders of the benchmarks read small files that the tests write."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness import datasets as data


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.asarray(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def write_mnist(folder: Path, zipped: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 7), ("t10k", 3)):
        images = rng.integers(0, 256, (count, 5, 4), np.uint8)
        arrays[f"{part}-images-idx3-ubyte"] = images
        arrays[f"{part}-labels-idx1-ubyte"] = np.arange(count)
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        content = idx(array)
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return arrays


def cifar_rows(count: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).integers(0, 256, (count, 3073), np.uint8)
    rows[:, 0] = np.arange(count) % 10
    return rows


CIFAR10 = {
    "data_batch_1.bin": cifar_rows(4, 0),
    "data_batch_3.bin": cifar_rows(2, 1),
    "test_batch.bin": cifar_rows(3, 2),
}


def write_cifar10(folder: Path, **replaced: bytes | None) -> None:
    folder.mkdir(exist_ok=True)
    files = {name: rows.tobytes() for name, rows in CIFAR10.items()} | replaced
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as tar:
        for name, content in files.items():
            if content is not None:
                member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def check_standardised(loaded: data.Dataset) -> None:
    for images in (loaded.train_images, loaded.test_images):
        assert images.dtype == np.float32
        assert images.flags.c_contiguous
    axes = (0, 1, 2)
    np.testing.assert_allclose(loaded.train_images.mean(axes), 0, atol=1e-5)
    np.testing.assert_allclose(loaded.train_images.std(axes), 1, atol=1e-5)


def error_of(dataset: str, folder: Path) -> str:
    with pytest.raises(data.DataError) as caught:
        data.load(dataset, folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_digits():
    loaded = data.load("digits")
    check_standardised(loaded)
    assert loaded.train_images.shape == (1438, 8, 8, 1)
    assert loaded.test_images.shape == (359, 8, 8, 1)
    np.testing.assert_array_equal(np.unique(loaded.train_labels), np.arange(10))
    np.testing.assert_array_equal(loaded.test_labels, data.load("digits").test_labels)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("folder", [".", "mnist"])
def test_mnist(tmp_path, zipped, folder):
    arrays = write_mnist(tmp_path / folder, zipped)
    loaded = data.load("mnist", tmp_path)
    check_standardised(loaded)
    images = arrays["train-images-idx3-ubyte"].astype(np.float64)
    expected = (images - images.mean()) / images.std()
    np.testing.assert_allclose(loaded.train_images[..., 0], expected, atol=1e-5)
    np.testing.assert_array_equal(loaded.test_labels, np.arange(3))


IMAGES = "train-images-idx3-ubyte"
LABELS = "t10k-labels-idx1-ubyte"
GOOD = gzip.compress(idx(np.arange(3)))
MNIST_DAMAGE = {
    "missing": (IMAGES, None, "no such file"),
    "empty": (IMAGES, b"", "not an IDX file"),
    "wrong magic": (IMAGES, idx(np.zeros((2, 2))), "not an IDX file"),
    "header cut": (IMAGES, idx(np.zeros((1, 2, 3)))[:9], "truncated"),
    "truncated": (IMAGES, idx(np.zeros((7, 5, 4)))[:-1], "truncated"),
    "too long": (IMAGES, idx(np.zeros((7, 5, 4))) + b"x", "damaged"),
    "no images": (IMAGES, idx(np.zeros((0, 5, 4))), "truncated"),
    "truncated gzip": (LABELS, GOOD[:-9], "truncated"),
    "garbage gzip": (LABELS, GOOD[:10] + b"garbage", "damaged"),
    "not gzip": (LABELS, b"<html>", "not an IDX file"),
    "label": (LABELS, idx(np.asarray([1, 2, 10])), "above 9"),
    "count": (LABELS, idx(np.asarray([1, 2])), "2 labels"),
}


@pytest.mark.parametrize("case", MNIST_DAMAGE)
def test_mnist_damaged(tmp_path, case):
    name, content, complaint = MNIST_DAMAGE[case]
    write_mnist(tmp_path, zipped=True)
    path = tmp_path / f"{name}.gz"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    message = error_of("mnist", tmp_path)
    assert name in message and complaint in message
    assert "yann.lecun.com/exdb/mnist" in message


@pytest.mark.parametrize("folder", [".", "cifar10"])
def test_cifar10(tmp_path, folder):
    write_cifar10(tmp_path / folder)
    loaded = data.load("cifar10", tmp_path)
    check_standardised(loaded)
    rows = np.concatenate([rows for n, rows in CIFAR10.items() if "data" in n])
    np.testing.assert_array_equal(loaded.train_labels, rows[:, 0])
    # The file has channels first: pixel (row 2, column 5) of channel 1.
    pixel = rows[:, 1 + 1024 + 2 * 32 + 5].astype(np.float64)
    channel = rows[:, 1 + 1024 : 1 + 2048].astype(np.float64)
    expected = (pixel - channel.mean()) / channel.std()
    np.testing.assert_allclose(loaded.train_images[:, 2, 5, 1], expected, atol=1e-5)


CIFAR10_DAMAGE = {
    "missing": ("test_batch.bin", None, "no test_batch"),
    "empty": ("test_batch.bin", b"", "no test_batch"),
    "truncated": ("data_batch_3.bin", bytes(3072), "truncated"),
    "label": ("data_batch_1.bin", b"\x0a" + bytes(3072), "above 9"),
}


@pytest.mark.parametrize("case", CIFAR10_DAMAGE)
def test_cifar10_damaged(tmp_path, case):
    name, content, complaint = CIFAR10_DAMAGE[case]
    write_cifar10(tmp_path, **{name: content})
    message = error_of("cifar10", tmp_path)
    assert "cifar-10-binary.tar.gz" in message and complaint in message
    assert "www.cs.toronto.edu/~kriz/cifar.html" in message


@pytest.mark.parametrize("damage", ["garbage", "truncated", "tar cut", "not a tar"])
def test_cifar10_damaged_archive(tmp_path, damage):
    write_cifar10(tmp_path)
    path = tmp_path / "cifar-10-binary.tar.gz"
    content = path.read_bytes()
    damaged = {
        "garbage": b"garbage",
        "truncated": content[: len(content) // 2],
        "tar cut": gzip.decompress(content)[:5000],
        "not a tar": gzip.compress(b"garbage"),
    }
    path.write_bytes(damaged[damage])
    message = error_of("cifar10", tmp_path)
    assert path.name in message and "truncated or damaged" in message


def test_no_files_at_all(tmp_path):
    assert "cifar-10-binary.tar" in error_of("cifar10", tmp_path)
    assert "data_dir" in error_of("mnist", None)
    assert "imagenet" in error_of("imagenet", tmp_path)
