"""AdaGrad-BMA in float64 NumPy, with every d x d matrix built from its entries.

Independent of the library: a label for each element says which block it is in.
"""

import numpy as np

import bma_optax as bma


def by_tile(path, index):
    return path, tuple(i // 2 for i in index)


# rule -> the name of the block of an element, None for plain AdaGrad
RULES = {
    bma.per_leaf: lambda path, index: path,
    bma.per_layer: lambda path, index: path[:-1],
    bma.per_unit: lambda path, index: (path, index[-1] if len(index) > 1 else 0),
    bma.per_element: lambda path, index: (path, index),
    bma.per_tile((2, 2)): by_tile,
    bma.by_path({"bias": None, "b/": bma.per_tile((2, 2))}): lambda path, index: (
        None if "bias" in path else by_tile(path, index) if path[0] == "b" else path
    ),
}


class DenseAdaGradBMA:
    """F entry by entry from U and v, its inverse root from a d x d decomposition."""

    def __init__(self, labels, groups, *, initial=0.0, eps=1e-7, floor=1e-2, form):
        self.labels = np.asarray(labels)  # (d,), -1 where there is no block
        self.groups = groups  # label -> group
        self.initial, self.eps, self.floor, self.form = initial, eps, floor, form
        self.h = np.full(len(labels), initial)
        self.U = {}

    def update(self, g):
        g = np.asarray(g, np.float64)
        d, labels = len(g), self.labels
        self.h = self.h + g**2
        z = np.sqrt(np.where(self.h > 0, self.h + self.eps, 0))
        inverse_z = np.where(self.h > 0, 1 / np.sqrt(self.h + self.eps), 0)
        blocks = [b for b in np.unique(labels) if b >= 0]
        u = {b: g[labels == b].sum() for b in blocks}
        v = {b: z[labels == b].sum() for b in blocks}
        s = {b: (labels == b).sum() for b in blocks}
        F = np.eye(d)
        for i in blocks:
            for j in blocks:
                self.U[i, j] = self.U.get((i, j), 0.0) + u[i] * u[j]
                if i == j or self.groups[i] != self.groups[j] or v[i] * v[j] == 0:
                    continue
                entry = self.U[i, j] / (v[i] * v[j]) / np.sqrt(s[i] * s[j])
                F[np.ix_(labels == i, labels == j)] = entry
        values, vectors = np.linalg.eigh(F)
        root = (vectors * np.maximum(values, self.floor) ** -0.5) @ vectors.T
        diagonal = inverse_z * g
        if self.form == "left":
            result = root @ diagonal
        else:
            result = np.sqrt(inverse_z) * (root @ (np.sqrt(inverse_z) * g))
        return np.where(self.h > self.initial, result, diagonal)
