"""The methods in float64 NumPy, with every matrix built from its entries; and helpers.

Independent of the library: a label for each element says which block it is in.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

import bma_optax as bma


def by_tile(path, index):
    return path, tuple(i // 2 for i in index)


def by_rows_of_fields(path, index):
    """Tiles of two along the first axis; the others count fields."""
    return path, (index[0] // 2, *index[1:]) if index else ()


# rule -> the name of the block of an element, None for plain AdaGrad
RULES = {
    bma.per_leaf: lambda path, index: path,
    bma.per_layer: lambda path, index: path[:-1],
    bma.per_unit: lambda path, index: (path, index[-1] if len(index) > 1 else 0),
    bma.per_element: lambda path, index: (path, index),
    bma.per_tile((2,)): by_rows_of_fields,
    bma.by_path({"bias": None, "b/": bma.per_tile((2, 2))}): lambda path, index: (
        None if "bias" in path else by_tile(path, index) if path[0] == "b" else path
    ),
}


class DenseAdaGradBMA:
    """F from the d x L matrix E, U and v, its inverse root from a d x d decomposition.

    Each of ``matrices`` holds the positions of elements, units x inputs, whose units
    share learned weights. All other weights are 1.
    """

    def __init__(
        self,
        labels,
        groups,
        *,
        initial=0.0,
        eps=1e-7,
        floor=0.3,
        form="left",
        estimator="report",
        interval=1,
        matrices=(),
    ):
        self.matrices = matrices
        self.directions = [
            np.full(m.shape[1], 1 / np.sqrt(m.shape[1])) for m in matrices
        ]
        self.labels = np.asarray(labels)  # (d,), -1 where there is no block
        blocks = np.unique(self.labels[self.labels >= 0])
        self.E = 1.0 * (self.labels[:, None] == blocks)  # (d, blocks)
        same = [groups[i] == groups[j] for i in blocks for j in blocks]
        self.coupled = np.reshape(same, (len(blocks),) * 2).astype(bool)
        self.initial, self.eps, self.floor, self.form = initial, eps, floor, form
        self.estimator, self.interval, self.steps = estimator, interval, 0
        self.h = np.full(len(labels), initial)
        self.U = np.zeros(self.coupled.shape)

    def weights(self):
        """A weight for each element, of mean square 1 in each block."""
        weights = np.ones(len(self.labels))
        for matrix, y in zip(self.matrices, self.directions, strict=True):
            weights[matrix] = np.sqrt(len(y)) * y / np.linalg.norm(y)
        return weights

    def turn(self, r):
        """Moves each shared direction by a step of power iteration on the rows of r."""
        for k, (matrix, y) in enumerate(
            zip(self.matrices, self.directions, strict=True)
        ):
            q = y / np.linalg.norm(y)
            target = sum(np.outer(row, row) for row in r[matrix]) @ q
            if np.any(target):
                target = target / np.linalg.norm(target)
                self.directions[k] = 0.95 * y + 0.05 * target

    def add(self, g, old=1.0, new=1.0):
        self.h = old * self.h + new * g**2
        u = self.E.T @ (self.weights() * g)
        self.U = old * self.U + new * np.outer(u, u)

    def root_of_this_step(self, *args):
        step = self.steps + 1
        young = step < self.interval and step in {2**i for i in range(30)}
        if self.steps % self.interval == 0 or young:
            self.M = self.small_matrix(*args)
        self.steps += 1
        self.root = self.inverse_root()
        return self.root

    def small_matrix(self, eps, shift=0.0, correction=1.0):
        s = self.E.sum(axis=0)
        v = self.E.T @ (self.weights() ** 2 * np.sqrt(self.h / correction))
        v = np.hypot(v, s * np.sqrt(eps)) + s * shift
        known = self.coupled & (np.outer(v, v) != 0)
        M = self.U / correction / np.where(known, np.outer(v, v), np.inf)
        if self.estimator == "projection":
            return np.where(known, np.sqrt(np.outer(s, s)) * M, np.eye(len(M)))
        return M - np.diag(np.diag(M)) + np.eye(len(M))

    def inverse_root(self):
        E = self.weights()[:, None] * self.E
        E = E / np.linalg.norm(E, axis=0)
        F = np.eye(len(E)) + E @ (self.M - np.eye(len(self.M))) @ E.T
        values, vectors = np.linalg.eigh(F)
        return (vectors * np.maximum(values, self.floor) ** -0.5) @ vectors.T

    def update(self, g):
        g = np.asarray(g, np.float64)
        self.add(g)
        inverse_z = np.where(self.h > 0, 1 / np.sqrt(self.h + self.eps), 0)
        root = self.root_of_this_step(self.eps)
        diagonal = inverse_z * g
        if self.form == "left":
            result = root @ diagonal
        else:
            result = np.sqrt(inverse_z) * (root @ (np.sqrt(inverse_z) * g))
        self.turn(diagonal if self.form == "left" else np.sqrt(inverse_z) * g)
        return np.where(self.h > self.initial, result, diagonal)


class DenseAdamBMA(DenseAdaGradBMA):
    """As ``DenseAdaGradBMA``, with decayed averages in the place of sums."""

    def __init__(self, labels, groups, *, b1=0.9, b2=0.999, eps_root=0.0, **kwargs):
        super().__init__(labels, groups, **kwargs)
        self.eps_root = eps_root
        self.b1, self.b2 = b1, b2
        self.mu, self.count = np.zeros(len(labels)), 0

    def update(self, g):
        g = np.asarray(g, np.float64)
        self.count += 1
        self.add(g, self.b2, 1 - self.b2)
        self.mu = self.b1 * self.mu + (1 - self.b1) * g
        correction = 1 - self.b2**self.count
        z = np.sqrt(self.h / correction + self.eps_root) + self.eps
        m = self.mu / (1 - self.b1**self.count)
        root = self.root_of_this_step(self.eps_root, self.eps, correction)
        self.turn(m / z)
        return root @ (m / z)


class DenseMiniBMA:
    """mini-BMA of one matrix, units x inputs. Each unit has its own s x s matrix."""

    def __init__(self, shape, *, b1=0.9, b2=0.99, b3=0.95):
        self.b1, self.b2, self.b3, self.count = b1, b2, b3, 0
        units, s = shape
        self.y = np.full(s, 1 / np.sqrt(s))
        self.mu, self.H, self.U = np.zeros(shape), np.zeros(shape), np.zeros(units)

    def update(self, G):
        self.count += 1
        units, s = G.shape
        q = self.y / np.linalg.norm(self.y)
        m = self.mu = self.b1 * self.mu + (1 - self.b1) * G
        m = m / (1 - self.b1**self.count)
        self.H = self.b2 * self.H + (1 - self.b2) * G**2
        # The matrix of rank one with the row sums and the column sums of diag H.
        h = np.outer(self.H.sum(axis=1), self.H.sum(axis=0)) / self.H.sum()
        correction = 1 - self.b2**self.count
        update, X, self.M = np.zeros_like(G), np.zeros_like(G), np.zeros(units)
        for i in range(units):
            W = np.sqrt(s) * q
            self.U[i] = self.b2 * self.U[i] + (1 - self.b2) * (W @ G[i]) ** 2
            z = np.sqrt(h[i])
            self.M[i] = s * self.U[i] / (W @ np.diag(z) @ W) ** 2
            F = np.eye(s) + (max(self.M[i], 1) - 1) * np.outer(q, q)
            values, vectors = np.linalg.eigh(F)
            X[i] = np.diag(1 / np.sqrt(h[i] / correction)) @ m[i]
            update[i] = (vectors * values**-0.5) @ vectors.T @ X[i]
        target = sum(np.outer(row, row) for row in X) @ q
        target = target / np.linalg.norm(target)
        self.y = self.b3 * self.y + (1 - self.b3) * target
        return update


def newton_inverse(G, labels, groups=None, damping=0.0, positions=None):
    """The inverse C that Newton-BMA applies, for a curvature G of d x d.

    It takes the absolute diagonal of G, floors Λ, and takes absolute eigenvalues of M.
    ``labels`` names the block of each element, -1 where it has none. ``groups`` names
    the group of each label; blocks of two groups do not see each other. With
    ``positions``, d x axes, a block has all linear functions of them for columns.
    """
    labels, d = np.asarray(labels), len(G)
    z = np.sqrt(np.abs(np.diag(G)))
    F = G / np.outer(z, z)
    positions = np.zeros((d, 0)) if positions is None else np.asarray(positions)
    functions = np.column_stack([np.ones(d), positions]) * z[:, None]
    E, blocks, Lambda = [np.zeros((d, 0))], [], np.ones(d)
    for block in np.unique(labels[labels >= 0]):
        own = labels == block
        left, values, _ = np.linalg.svd(functions[own], full_matrices=False)
        columns = np.zeros((d, np.sum(values > 1e-9 * values[0])))
        columns[own] = left[:, : columns.shape[1]]
        s, rank = np.sum(own), columns.shape[1]
        if s > rank:
            rest = s - np.trace(columns.T @ F @ columns)
            Lambda[own] = max(rest / (s - rank), 1e-3)
        E.append(columns)
        blocks += [block] * rank
    E = np.concatenate(E, axis=1)
    M = E.T @ F @ E
    if groups is not None:
        groups = np.asarray(groups)[blocks]
        M = M * (groups[:, None] == groups)
    values, vectors = np.linalg.eigh(M + damping * np.eye(len(M)))
    inverse_M = (vectors / np.maximum(np.abs(values), damping)) @ vectors.T
    middle = np.diag(1 / (Lambda + damping)) @ (np.eye(d) - E @ E.T)
    return (middle + E @ inverse_M @ E.T) / np.outer(z, z)


# Helpers ------------------------------------------------------------------------------

SHAPES = {"a": {"kernel": (3, 4), "bias": (4,)}, "b": {"kernel": (4, 2)}, "c": ()}
LEAVES = [("a", "bias"), ("a", "kernel"), ("b", "kernel"), ("c",)]


def random_tree(rng, dtype=np.float64):
    """Arrays of SHAPES, with a common part, so that blocks do correlate."""
    common = rng.standard_normal()
    return jax.tree.map(
        lambda s: jnp.asarray(np.asarray(rng.standard_normal(s) + common), dtype),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def flat(tree):
    """All elements in one vector."""
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def labels_and_groups(name_of, couple):
    """The block of each element of ``random_tree``, and the group of each block."""
    labels, groups, numbers = [], {}, {}
    shapes = [(4,), (3, 4), (4, 2), ()]
    for path, shape in zip(LEAVES, shapes, strict=True):
        for index in itertools.product(*map(range, shape)):
            name = name_of(path, index)
            label = -1 if name is None else numbers.setdefault(name, len(numbers))
            labels.append(label)
            merged = name == path[:-1]
            groups[label] = {
                "all": (),
                "array": path[:-1] if merged else path,
                "layer": path[:-1],
                "block": label,
            }[couple]
    return labels, groups


def check_updates(numbers, given, diagonal, full, labels):
    """The numbers of ``bma.diagnostics`` that compare updates."""
    ratio = np.linalg.norm(full - diagonal) / np.linalg.norm(diagonal)
    np.testing.assert_allclose(numbers["correction"], ratio, rtol=1e-7)
    rates = [
        np.linalg.norm(full[labels == b]) / np.linalg.norm(given[labels == b])
        for b in range(max(labels) + 1)
    ]
    found = np.sort(np.asarray(numbers["effective_rates"]))
    np.testing.assert_allclose(found, np.sort(rates), rtol=1e-7)


# An entry for each program that JAX has compiled since it was cleared.
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, _, **__: compiled.append(name) if "backend_compile" in name else None
)
