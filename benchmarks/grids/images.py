"""Energies of images and volumes: flow, blending, registration, denoising."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage
import scipy.sparse
from scipy.sparse.linalg import spsolve

import bma_optax as bma
from benchmarks.grids.problems import dirichlet, grey, laplacian, photograph, quadratic
from benchmarks.harness.solver import Problem

TWO_LAST = bma.per_tile((4, 4, 1), reach=(1, 1, 1))  # Two fields that meet, as pairs.
COLOURS = bma.per_tile((4, 4, 1), reach=(1, 1, 0))


def warped(image, u):
    """The image at places moved by `u`, between pixels by lines, beyond it its edge."""
    place = jnp.stack(jnp.indices(image.shape)).astype(u.dtype) + jnp.moveaxis(u, -1, 0)
    return jax.scipy.ndimage.map_coordinates(image, list(place), 1, mode="nearest")


def two_images(seed: int, n: int, size: float) -> tuple[np.ndarray, np.ndarray]:
    """A photograph, smoothed, and the same moved by a smooth random displacement."""
    rng = np.random.default_rng(seed)
    image = scipy.ndimage.gaussian_filter(grey(seed, n), 1.5, mode="nearest")
    moves = scipy.ndimage.gaussian_filter(rng.standard_normal((2, n, n)), (0, 12, 12))
    place = np.indices((n, n)) + size * moves / np.abs(moves).max()
    return image, scipy.ndimage.map_coordinates(image, place, order=1, mode="nearest")


def flow(n: int = 128, weight: float = 1e-3) -> Problem:
    """Optical flow of Horn and Schunck: brightness moves, and its motion is smooth."""

    def make(seed: int):
        first, second = two_images(seed, n, 1.0)
        down, right = np.gradient((first + second) / 2)
        return np.zeros((n, n, 2)), (down, right, second - first)

    def loss(u, data):
        down, right, change = data
        error = down * u[..., 0] + right * u[..., 1] + change
        return jnp.sum(error**2) / 2 + weight * dirichlet(u, 2)

    def sparse_lu(data):
        down, right, change = (x.ravel() for x in data)
        A = scipy.sparse.hstack([scipy.sparse.diags_array(x) for x in (down, right)])
        smooth = scipy.sparse.block_diag([laplacian((n, n))] * 2)
        matrix = scipy.sparse.csc_matrix(A.T @ A + weight * smooth)
        rhs = -A.T @ change
        return lambda _: np.moveaxis(spsolve(matrix, rhs).reshape(2, n, n), 0, -1)

    return quadratic(
        name="flow",
        title=f"optical flow, {n} x {n} x 2",
        make=make,
        loss=loss,
        diagonal=lambda u, data: (
            jnp.stack([data[0] ** 2, data[1] ** 2], -1)
            + weight * laplacian((n, n)).diagonal().reshape(n, n, 1)
        ),
        partition=TWO_LAST,
        experts={"direct": ("sparse LU", sparse_lu)},
    )


def disc(n: int) -> np.ndarray:
    """Which pixels lie in it, with an axis for colours."""
    x = (np.arange(n) + 0.5) / n - 0.5
    return (x[:, None] ** 2 + x**2 < 0.4**2)[..., None]


def blend(n: int = 128) -> Problem:
    """Blending of Perez et al.: the slopes of one picture within a disc of another."""
    inside = disc(n)

    def make(seed: int):
        stride = 426 // n
        source, target = (photograph(seed + k, stride)[:n, :n] for k in (0, 1))
        return np.zeros((n, n, 3)), (source, target)

    def loss(u, data):
        source, target = data
        return dirichlet(jnp.where(inside, u, target) - source, 2)

    def sparse_lu(data):
        source, target = (x.reshape(-1, 3) for x in data)
        matrix, within = scipy.sparse.csc_matrix(laplacian((n, n))), inside.ravel()
        rhs = (matrix @ (source - np.where(within[:, None], 0, target)))[within]
        system = matrix[within][:, within]

        def solve(_):
            u = np.zeros((n * n, 3))
            u[within] = spsolve(system, rhs)
            return u

        return solve

    ones = laplacian((n, n)).diagonal().reshape(n, n, 1)
    return quadratic(
        name="blend",
        title=f"blending within a disc, {n} x {n} x 3",
        make=make,
        loss=loss,
        diagonal=lambda u, data: jnp.broadcast_to(jnp.asarray(ones), u.shape),
        partition=COLOURS,
        experts={"direct": ("sparse LU", sparse_lu)},
    )


def registration(n: int = 128, weight: float = 2e-3) -> Problem:
    """One image deformed into another by a displacement whose slopes are small."""

    def make(seed: int):
        first, second = two_images(seed, n, 4.0)
        return np.zeros((n, n, 2)), (first, second)

    def loss(u, data):
        first, second = data
        error = warped(first, u) - second
        return jnp.sum(error**2) / 2 + weight * dirichlet(u, 2)

    return Problem(
        name="registration",
        title=f"deformable registration, {n} x {n} x 2",
        make=make,
        loss=loss,
        partition=TWO_LAST,
    )


def denoise(n: int = 48, weight: float = 0.3, edge: float = 0.05) -> Problem:
    """A volume of balls under noise, smoothed with Huber's penalty of its slopes."""

    def make(seed: int):
        rng = np.random.default_rng(seed)
        x = np.indices((n, n, n)) / n
        volume = np.zeros((n, n, n))
        for _ in range(8):
            centre = rng.uniform(0.2, 0.8, (3, 1, 1, 1))
            ball = np.sum((x - centre) ** 2, 0) < rng.uniform(0.1, 0.25) ** 2
            volume[ball] = rng.uniform(0.3, 1)
        noisy = volume + 0.1 * rng.standard_normal((n, n, n))
        return noisy, noisy

    def loss(u, data):
        steps = [jnp.diff(u, axis=axis) for axis in range(3)]
        rough = sum(jnp.sum(jnp.sqrt(step**2 + edge**2) - edge) for step in steps)
        return jnp.sum((u - data) ** 2) / 2 + weight * rough

    return Problem(
        name="denoise",
        title=f"denoising, {n} x {n} x {n}",
        make=make,
        loss=loss,
        partition=bma.per_tile((4, 4, 4), reach=1),
    )
