"""What Newton-BMA, or any iteration, does not suit."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.sparse

import bma_optax as bma
from benchmarks.grids.problems import (
    dirichlet,
    grey,
    laplacian_diagonal,
    quadratic,
    seen_pixels,
)
from benchmarks.harness.solver import Problem


def deblur(n: int = 128, sigma: float = 2.0, weight: float = 1e-3) -> Problem:
    """Deconvolution of a Gaussian kernel around a periodic image."""
    frequency = np.minimum(np.arange(n), n - np.arange(n))
    kernel = np.exp(-((frequency / sigma) ** 2) / 2)
    spectrum = np.fft.fft(kernel / kernel.sum()).real
    blur = np.outer(spectrum, spectrum)
    waves = 2 - 2 * np.cos(2 * np.pi * np.arange(n) / n)
    eigenvalues = blur**2 + weight * (waves[:, None] + waves)
    half = n // 2 + 1

    def filtered(u, gains, fft):
        return fft.irfft2(fft.rfft2(u) * gains[:, :half], (n, n))

    def make(seed: int):
        rng = np.random.default_rng(seed)
        y = filtered(grey(seed, n), blur, np.fft)
        return np.zeros((n, n)), y + 0.01 * rng.standard_normal((n, n))

    def loss(u, data):
        steps = [u - jnp.roll(u, 1, axis) for axis in (0, 1)]
        prior = weight * sum(jnp.sum(step**2) for step in steps)
        return (jnp.sum((filtered(u, blur, jnp.fft) - data) ** 2) + prior) / 2

    def fourier(data):
        return lambda _: filtered(data, blur / eigenvalues, np.fft)

    return quadratic(
        name="deblur",
        title=f"deblurring, {n} x {n}",
        make=make,
        loss=loss,
        diagonal=lambda u, data: jnp.full(u.shape, eigenvalues.mean()),
        partition=bma.per_tile((n // 8, n // 8)),
        experts={"direct": ("FFT", fourier)},
    )


def spline(n: int = 4096, weight: float = 1e4) -> Problem:
    """A one-dimensional smoothing spline: second differences, of order four."""
    D = scipy.sparse.diags_array([1.0, -2.0, 1.0], offsets=[0, 1, 2], shape=(n - 2, n))
    prior = weight * (D.T @ D)

    def make(seed: int):
        rng = np.random.default_rng(seed)
        x = np.linspace(0, 1, n)
        y = np.sin(20 * x**2 + seed) + 0.3 * rng.standard_normal(n)
        mask = seen_pixels((n,), n // 4, rng)
        return np.zeros(n), (mask, mask * y)

    def loss(u, data):
        mask, y = data
        bends = weight * jnp.sum(jnp.diff(u, 2) ** 2)
        return (bends + jnp.sum(mask * (u - y) ** 2)) / 2

    def banded_cholesky(data):
        mask, y = data
        bands = np.zeros((3, n))
        for k in range(3):
            bands[k, : n - k] = prior.diagonal(k)
        bands[0] += mask
        return lambda _: scipy.linalg.solveh_banded(bands, mask * y, lower=True)

    return quadratic(
        name="spline",
        title=f"smoothing spline, {n} points, a quarter seen",
        make=make,
        loss=loss,
        diagonal=lambda u, data: prior.diagonal() + data[0],
        partition=bma.per_tile((4,), reach=2, slopes=True),
        experts={"direct": ("banded Cholesky", banded_cholesky)},
    )


def heat(n: int = 32, experiments: int = 4, steps: int = 60) -> Problem:
    """The conductivity of a plate from temperatures at a few points and two times.

    Everything is felt everywhere, and a product costs two simulations.
    """
    rate, noise, weight = 0.15, 0.002, 0.1

    def temperatures(u, hot):
        conductivity = rate * jnp.exp(u)
        down = (conductivity[1:] + conductivity[:-1]) / 2
        right = (conductivity[:, 1:] + conductivity[:, :-1]) / 2

        def advance(T, _):
            flow_down = down * jnp.diff(T, axis=1)
            flow_right = right * jnp.diff(T, axis=2)
            T = T.at[:, :-1].add(flow_down).at[:, 1:].add(-flow_down)
            T = T.at[:, :, :-1].add(flow_right).at[:, :, 1:].add(-flow_right)
            return T, T

        return jax.lax.scan(advance, hot, length=steps)[1][steps // 2 - 1 :: steps // 2]

    def make(seed: int):
        rng = np.random.default_rng(seed)
        x = np.linspace(0, 1, n)
        waves = np.cos(np.pi * np.outer(np.arange(4), x))
        true = np.einsum("ij,ix,jy->xy", rng.normal(0, 0.25, (4, 4)), waves, waves)
        centers = rng.uniform(0.1, 0.9, (experiments, 2, 1))
        near = np.exp(-(((x - centers) / 0.15) ** 2))
        hot = np.einsum("kx,ky->kxy", near[:, 0], near[:, 1])
        mask = seen_pixels((n, n), n * n // 10, rng)
        seen = np.asarray(temperatures(jnp.asarray(np.minimum(true, 0.5)), hot))
        noisy = seen + noise * rng.standard_normal(seen.shape)
        return np.zeros((n, n)), (mask, mask * noisy, hot)

    def loss(u, data):
        mask, y, hot = data
        error = mask * (temperatures(u, hot) - y) / noise
        return jnp.sum(error**2) / 2 + weight / noise * dirichlet(u, 2)

    return Problem(
        name="heat",
        title=f"conductivity of a plate, {n} x {n}, through the heat equation",
        make=make,
        loss=loss,
        # Of the prior alone.
        diagonal=lambda u, data: weight / noise * laplacian_diagonal(u.shape),
        partition=bma.per_tile((4, 4)),
    )
