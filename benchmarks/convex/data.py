"""Data of the linear models: features as they come, or standardised."""

import collections
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn import datasets


class Data(NamedTuple):
    """Rows of features, and labels 0, 1, ... or, for a regression, numbers."""

    features: np.ndarray
    targets: np.ndarray


def diabetes() -> Data:
    features, targets = datasets.load_diabetes(return_X_y=True, scaled=False)
    return Data(features, (targets - targets.mean()) / targets.std())


def text(modules: int = 8, lines: int = 20, words: int = 400) -> Data:
    """Counts of words in pieces of Python's largest modules, and which module it is."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = sorted(folder.glob("[a-z]*.py"), key=lambda p: (-p.stat().st_size, p.name))
    pieces, labels = [], []
    for label, path in enumerate(paths[:modules]):
        source = path.read_text(encoding="utf-8", errors="replace").splitlines()
        for start in range(0, len(source) - lines, lines):
            piece = " ".join(source[start : start + lines])
            pieces.append(re.findall(r"[A-Za-z_]+", piece))
            labels.append(label)
    counts = collections.Counter(word for piece in pieces for word in piece)
    columns = {word: i for i, (word, _) in enumerate(counts.most_common(words))}
    features = np.zeros((len(pieces), words))
    for row, piece in zip(features, pieces, strict=True):
        for word in piece:
            if word in columns:
                row[columns[word]] += 1
    return Data(features, np.array(labels))


def clicks(rows: int = 4000, sizes: tuple[int, ...] = (2, 5, 10, 30, 100, 300)) -> Data:
    """A synthetic log of clicks: one-hot groups whose values follow Zipf's law."""
    rng = np.random.default_rng(0)
    groups, score = [], np.full(rows, -1.0)
    for size in sizes:
        chances = 1 / np.arange(1, size + 1)
        values = rng.choice(size, rows, p=chances / chances.sum())
        score += rng.standard_normal(size)[values]
        groups.append(np.eye(size)[values])
    clicked = rng.random(rows) < 1 / (1 + np.exp(-score))
    return Data(np.concatenate(groups, axis=1), clicked.astype(int))


SOURCES: dict[str, Callable[[], tuple]] = {
    "digits": lambda: datasets.load_digits(return_X_y=True),
    "cancer": lambda: datasets.load_breast_cancer(return_X_y=True),
    "wine": lambda: datasets.load_wine(return_X_y=True),
} | {f.__name__: f for f in (diabetes, text, clicks)}


def split(name: str, standardised: bool) -> tuple[Data, Data]:
    """Four fifths to train on, and the rest."""
    features, targets = SOURCES[name]()
    order = np.random.default_rng(0).permutation(len(targets))
    test, train = np.split(order, [len(order) // 5])
    if standardised:
        std = features[train].std(axis=0)
        features = (features - features[train].mean(axis=0)) / np.where(std > 0, std, 1)
    kind = np.int32 if targets.dtype.kind == "i" else np.float32
    x, y = features.astype(np.float32), targets.astype(kind)
    return Data(x[train], y[train]), Data(x[test], y[test])
