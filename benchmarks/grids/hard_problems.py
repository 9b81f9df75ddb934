"""Problems of this study that Newton-BMA, or any iteration, does not suit."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.sparse

import bma_optax as bma
from benchmarks.grids.problems import (
    Problem,
    dirichlet,
    grey,
    laplacian,
    laplacian_diagonal,
    seen_pixels,
)


def total_variation(n: int = 128, weight: float = 0.1, width: float = 0.01) -> Problem:
    """Charbonnier's smoothed total variation, half of the pixels seen, noisy."""

    def make(seed: int):
        rng = np.random.default_rng(seed)
        image = grey(seed, n)
        mask = seen_pixels(image.shape, image.size // 2, rng)
        noisy = image + 0.05 * rng.standard_normal(image.shape)
        return np.zeros(image.shape), (mask, mask * noisy)

    def slopes(u):
        down, right = jnp.diff(u, axis=0), jnp.diff(u, axis=1)
        down, right = jnp.pad(down, ((0, 1), (0, 0))), jnp.pad(right, ((0, 0), (0, 1)))
        return down, right, jnp.sqrt(down**2 + right**2 + width**2)

    def loss(u, data):
        mask, y = data
        return jnp.sum(mask * (u - y) ** 2) / 2 + weight * jnp.sum(slopes(u)[2])

    def diagonal(u, data):
        a, b, size = slopes(u)
        inside = np.ones(u.shape)
        has_down, has_right = inside.copy(), inside.copy()
        has_down[-1], has_right[:, -1] = 0, 0
        # Second derivatives of sqrt(a² + b² + w²) by a and b.
        aa, bb = (b**2 + width**2) / size**3, (a**2 + width**2) / size**3
        ab = -a * b / size**3 * has_down * has_right
        aa, bb = aa * has_down, bb * has_right
        from_above = jnp.pad(aa[:-1], ((1, 0), (0, 0)))
        from_left = jnp.pad(bb[:, :-1], ((0, 0), (1, 0)))
        return data[0] + weight * (aa + bb + 2 * ab + from_above + from_left)

    name, title = "total_variation", f"total variation, {n} x {n}, half seen"
    rule = bma.per_tile((4, 4), reach=1)
    return Problem(name, title, make, loss, diagonal, rule, 5, quadratic=False)


def deblur(n: int = 128, sigma: float = 2.0, weight: float = 1e-3) -> Problem:
    """Deconvolution of a Gaussian kernel around a periodic image."""
    frequency = np.minimum(np.arange(n), n - np.arange(n))
    kernel = np.exp(-((frequency / sigma) ** 2) / 2)
    spectrum = np.fft.fft(kernel / kernel.sum()).real
    blur = np.outer(spectrum, spectrum)
    waves = 2 - 2 * np.cos(2 * np.pi * np.arange(n) / n)
    smoothness = weight * (waves[:, None] + waves)
    half = n // 2 + 1

    def blurred(u, fft):
        return fft.irfft2(fft.rfft2(u) * blur[:, :half], (n, n))

    def make(seed: int):
        rng = np.random.default_rng(seed)
        y = blurred(grey(seed, n), np.fft) + 0.01 * rng.standard_normal((n, n))
        return np.zeros((n, n)), (y,)

    def loss(u, data):
        steps = [u - jnp.roll(u, 1, axis) for axis in (0, 1)]
        prior = weight * sum(jnp.sum(step**2) for step in steps)
        return (jnp.sum((blurred(u, jnp.fft) - data[0]) ** 2) + prior) / 2

    def diagonal(u, data):
        return jnp.full(u.shape, (blur**2 + smoothness).mean())

    def direct(data):
        y = np.asarray(data[0])
        gain = (blur / (blur**2 + smoothness))[:, :half]
        return lambda: np.fft.irfft2(np.fft.rfft2(y) * gain, (n, n))

    title, rule = f"deblurring, {n} x {n}", bma.per_tile((n // 8, n // 8))
    more = {"direct": direct, "direct_label": "FFT"}
    return Problem("deblur", title, make, loss, diagonal, rule, **more)


def tomography(n: int = 48, rays: int = 1000, weight: float = 0.1) -> Problem:
    """An image from its sums along random rays: every pixel meets every other."""

    def make(seed: int):
        rng = np.random.default_rng(seed)
        ends = rng.uniform(0, n - 1, (2, rays, 2))
        side = rng.integers(2, size=rays), rng.integers(2, size=rays)
        for end, axis, value in zip(ends, side, (0, n - 1), strict=True):
            end[np.arange(rays), axis] = value
        t = np.linspace(0, 1, 2 * n)[:, None, None]
        row, column = np.rint(ends[0] + t * (ends[1] - ends[0])).astype(int).T
        A = np.zeros((rays, n * n))
        ray = np.broadcast_to(np.arange(rays)[:, None], row.shape)
        np.add.at(A, (ray, row * n + column), 0.5)
        A /= n**0.5
        y = A @ grey(seed, n).ravel() + 0.01 * rng.standard_normal(rays)
        return np.zeros((n, n)), (A, y)

    def loss(u, data):
        A, y = data
        return jnp.sum((A @ u.ravel() - y) ** 2) / 2 + weight * dirichlet(u, 2)

    def diagonal(u, data):
        squares = jnp.sum(data[0] ** 2, axis=0).reshape(u.shape)
        return squares + weight * laplacian_diagonal(u.shape)

    def direct(data):
        A, y = (np.asarray(x) for x in data)
        G = A.T @ A + weight * laplacian((n, n)).toarray()
        b = A.T @ y
        return lambda: scipy.linalg.cho_solve(scipy.linalg.cho_factor(G), b)

    title, rule = f"tomography, {n} x {n} from {rays} rays", bma.per_tile((4, 4))
    more = {"direct": direct, "direct_label": "dense Cholesky", "picture": None}
    return Problem("tomography", title, make, loss, diagonal, rule, **more)


def heat(n: int = 32, experiments: int = 4, steps: int = 60) -> Problem:
    """The conductivity of a plate from temperatures at a few points and two times."""
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

    def diagonal(u, data):
        return weight / noise * laplacian_diagonal(u.shape)

    title = f"conductivity of a plate, {n} x {n}, through the heat equation"
    rule = bma.per_tile((4, 4))
    return Problem("heat", title, make, loss, diagonal, rule, 10, quadratic=False)


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

    def direct(data):
        mask, y = (np.asarray(x) for x in data)
        bands = np.zeros((3, n))
        for k in range(3):
            bands[k, : n - k] = prior.diagonal(k)
        bands[0] += mask
        return lambda: scipy.linalg.solveh_banded(bands, mask * y, lower=True)

    def diagonal(u, data):
        return prior.diagonal() + data[0]

    title = f"smoothing spline, {n} points, a quarter seen"
    rule = bma.per_tile((4,), reach=2)
    more = {"direct": direct, "direct_label": "banded Cholesky"}
    return Problem("spline", title, make, loss, diagonal, rule, **more)
