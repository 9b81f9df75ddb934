"""Symmetric and positive definite operators on n × n points inside a fixed boundary."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


def rotated(ratio: float, angle: float) -> np.ndarray:
    """Diffusion along an angle, weaker across it, in bilinear finite elements."""
    c, s = np.cos(angle), np.sin(angle)
    D = np.array([[c, -s], [s, c]]) @ np.diag([1, ratio]) @ np.array([[c, s], [-s, c]])
    mass = np.array([1, 4, 1]) / 6
    stiff, slope = np.array([-1.0, 2, -1]), np.array([-1, 0, 1]) / 2
    along = D[0, 0] * np.outer(stiff, mass) + D[1, 1] * np.outer(mass, stiff)
    return along - 2 * D[0, 1] * np.outer(slope, slope)


def along_an_axis(ratio: float) -> np.ndarray:
    return np.array([[0, -1, 0], [-ratio, 2 + 2 * ratio, -ratio], [0, -1, 0]])


def elasticity(poisson: float) -> np.ndarray:
    """Plane strain in bilinear finite elements: two fields, shape (2, 2, 3, 3)."""
    corners = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    law = np.array(
        [[1 - poisson, poisson, 0], [poisson, 1 - poisson, 0], [0, 0, 0.5 - poisson]]
    ) / ((1 + poisson) * (1 - 2 * poisson))
    element = np.zeros((4, 2, 4, 2))
    for point in itertools.product((0.5 - 12**-0.5, 0.5 + 12**-0.5), repeat=2):
        strain = np.zeros((3, 4, 2))
        for node, corner in enumerate(corners):
            value, slope = 1 - np.abs(corner - point), 2.0 * corner - 1
            dx, dy = slope[0] * value[1], value[0] * slope[1]
            strain[:, node] = [[dx, 0], [0, dy], [dy, dx]]
        element += np.einsum("inb,ij,jma->nbma", strain, law, strain) / 4
    stencil = np.zeros((2, 2, 3, 3))
    for n, m in itertools.product(range(4), repeat=2):
        i, j = 1 + corners[m] - corners[n]
        stencil[:, :, i, j] += element[n, :, m]
    return stencil


THIN_PLATE = np.array(
    [[0, 0, 1, 0, 0], [0, 2, -8, 2, 0], [1, -8, 20, -8, 1], [0, 2, -8, 2, 0]]
    + [[0, 0, 1, 0, 0]]
)


def of_stencil(arrays, u):
    """A stencil at every point, between diagonal matrices; beyond the boundary u is 0.

    Args:
      arrays: the stencil, shape (m, m), or (fields, fields, m, m) for u of shape
        (n, n, fields), and the diagonal matrix, like u.
      u: the field.
    """
    stencil, D = arrays
    m, n = stencil.shape[-1], len(u)
    padded = jnp.pad(D * u, [(m // 2, m // 2)] * 2 + [(0, 0)] * (u.ndim - 2))
    total = jnp.zeros_like(u)
    for i, j in itertools.product(range(m), repeat=2):
        part, weights = padded[i : i + n, j : j + n], stencil[..., i, j]
        total += part * weights if u.ndim == 2 else jnp.matvec(weights, part)
    return D * total


def of_faces(arrays, u):
    """Diffusion in finite volumes.

    Args:
      arrays: the coefficients at the faces across each axis.
      u: the field.
    """
    total = jnp.zeros_like(u)
    for axis, faces in enumerate(arrays):
        edge = [(int(axis == i),) * 2 for i in range(u.ndim)]
        flux = faces * jnp.diff(jnp.pad(u, edge), axis=axis)
        total -= jnp.diff(flux, axis=axis)
    return total


class Operator(NamedTuple):
    """Symmetric and positive definite, on n × n points."""

    product: Callable[[Any, Any], Any]  # (arrays, u) -> A u.
    arrays: Any
    shape: tuple[int, ...]
    reach: int
    slow: np.ndarray | None = None  # for PyAMG: the slow vectors, one a column.
    rough: bool = False  # The solution is random, not the right side.

    def right_side(self) -> jnp.ndarray:
        random = jnp.asarray(np.random.default_rng(0).standard_normal(self.shape))
        return self.product(self.arrays, random) if self.rough else random


def stencil(
    weights: np.ndarray, slow: Callable | None = None, rough: bool = False
) -> Callable:
    def operator(n: int) -> Operator:
        shape, reach = (n, n, *weights.shape[:-2][:1]), weights.shape[-1] // 2
        arrays = weights.astype(float), np.ones(shape)
        vectors = None if slow is None else slow(n)
        return Operator(of_stencil, arrays, shape, reach, vectors, rough)

    return operator


def linear(n: int) -> np.ndarray:
    """1 and the coordinates."""
    x, y = np.indices((n, n)).reshape(2, -1)
    return np.stack([np.ones(n * n), x, y], axis=1)


def rigid(n: int) -> np.ndarray:
    """Two shifts and a rotation, for two fields last."""
    one, x, y = linear(n).T
    fields = [(one, 0 * one), (0 * one, one), (-y, x)]
    return np.stack([np.stack(u, axis=1).ravel() for u in fields], axis=1)


def jumps(coefficients: Callable[[int], np.ndarray]) -> Callable:
    """Diffusion whose coefficients at the faces are harmonic means."""

    def operator(n: int) -> Operator:
        c = coefficients(n)
        faces = []
        for axis in (0, 1):
            near, far = np.delete(c, -1, axis), np.delete(c, 0, axis)
            first, last = np.take(c, [0], axis), np.take(c, [-1], axis)
            inner = 2 * near * far / (near + far)
            faces.append(np.concatenate([first, inner, last], axis))
        return Operator(of_faces, tuple(faces), (n, n), 1)

    return operator


def checkerboard(n: int) -> np.ndarray:
    i, j = np.indices((n, n)) // 5
    return np.where((i + j) % 2, 1e4, 1.0)


def random_cells(n: int) -> np.ndarray:
    return np.where(np.random.default_rng(1).random((n, n)) < 0.5, 1e4, 1.0)


def scaled(n: int) -> Operator:
    """D A D for the Laplacian A and a random D over three decades."""
    D = 10 ** np.random.default_rng(3).uniform(-1.5, 1.5, (n, n))
    return Operator(of_stencil, (along_an_axis(1.0), D), (n, n), 1)


OPERATORS = {
    **{
        f"along an axis, {x:g}": stencil(along_an_axis(x)) for x in (1, 0.1, 0.01, 1e-3)
    },
    "at pi/8, 0.01": stencil(rotated(0.01, np.pi / 8)),
    "at pi/4, 0.01": stencil(rotated(0.01, np.pi / 4)),
    "thin plate": stencil(THIN_PLATE, linear),
    "thin plate, random solution": stencil(THIN_PLATE, linear, rough=True),
    "elasticity, ν = 0.3": stencil(elasticity(0.3), rigid),
    "checkerboard of 5, 1 and 1e4": jumps(checkerboard),
    "random cells, 1 and 1e4": jumps(random_cells),
    "D A D, random D": scaled,
}
