"""The problems of this study: fields on a grid, in which neighbours meet."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from scipy.sparse.linalg import LaplacianNd, splu
from sklearn import datasets

import bma_optax as bma
from benchmarks.harness.solver import Problem

try:
    import pyamg
except ImportError:  # It has no part in what is measured here but its own row.
    pyamg = None


def quadratic(**fields: Any) -> Problem:
    return Problem(quadratic=True, update_interval=10_000, **fields)


def dirichlet(u: jax.Array, axes: int) -> jax.Array:
    """Half the squared differences of neighbours."""
    parts = [jnp.sum(jnp.square(jnp.diff(u, axis=axis))) for axis in range(axes)]
    return sum(parts[1:], parts[0]) / 2


def laplacian(shape: tuple[int, ...]) -> scipy.sparse.csr_array:
    """The Hessian of ``dirichlet``."""
    every = LaplacianNd(shape, boundary_conditions="neumann", dtype=float)
    return -scipy.sparse.csr_array(every.tosparse())


def laplacian_diagonal(shape: tuple[int, ...]) -> np.ndarray:
    return laplacian(shape).diagonal().reshape(shape)


def seen_pixels(shape, count: int, rng) -> np.ndarray:
    mask = np.zeros(shape)
    mask.flat[rng.choice(mask.size, count, replace=False)] = 1
    return mask


def extent(mask: np.ndarray) -> tuple[int, ...]:
    """The grid of a mask: a last axis of size 1 stands for colours."""
    return tuple(n for n in mask.shape if n > 1)


def paint_loss(u, data) -> jax.Array:
    """Smoothness, and the squared errors where ``mask`` is 1."""
    mask, y = data
    return dirichlet(u, len(extent(mask))) + jnp.sum(mask * jnp.square(u - y)) / 2


def paint_diagonal(u, data) -> jax.Array:
    mask = data[0]
    diagonal = laplacian_diagonal(extent(mask)).reshape(mask.shape) + mask
    return jnp.broadcast_to(diagonal, u.shape)


def paint_system(data):
    """The matrix, and the right hand sides as columns."""
    mask, y = data
    matrix = laplacian(extent(mask)) + scipy.sparse.diags_array(mask.ravel())
    return matrix, (mask * y).reshape(mask.size, -1)


def sparse_lu(matrix, rhs) -> Callable[[int], np.ndarray]:
    """One factorisation for all right hand sides, in the order for symmetric ones."""
    csc = scipy.sparse.csc_matrix(matrix)
    order = {"permc_spec": "MMD_AT_PLUS_A", "options": {"SymmetricMode": True}}
    return lambda _: splu(csc, diag_pivot_thresh=0.0, **order).solve(rhs)


def algebraic_multigrid(data) -> Callable[[int], np.ndarray]:
    """PyAMG: its set-up, and so many iterations of CG around it."""
    matrix, rhs = paint_system(data)
    matrix = scipy.sparse.csr_matrix(matrix)  # PyAMG wants this one, with 32 bits.
    matrix.indices = matrix.indices.astype(np.int32)
    matrix.indptr = matrix.indptr.astype(np.int32)

    def solve(iterations: int) -> np.ndarray:
        levels = pyamg.ruge_stuben_solver(matrix)
        options = {"tol": 1e-30, "maxiter": iterations, "accel": "cg"}
        return np.stack([levels.solve(b, **options) for b in rhs.T], axis=1)

    return solve


def inpainting(direct: bool = True, **fields: Any) -> Problem:
    # The matrix is assembled; that is not timed.
    experts = {"pyamg": ("pyamg", algebraic_multigrid)} if pyamg else {}
    if direct:
        experts["direct"] = "sparse LU", lambda data: sparse_lu(*paint_system(data))
    return quadratic(
        loss=paint_loss, diagonal=paint_diagonal, experts=experts, **fields
    )


def paint(n: int, dimensions: int = 2, count: int = 40) -> Problem:
    """A field from few observed values."""
    shape = (n,) * dimensions

    def make(seed: int):
        rng = np.random.default_rng(seed)
        mask = seen_pixels(shape, count, rng)
        return np.zeros(shape), (mask, mask * rng.standard_normal(shape))

    return inpainting(
        name=f"{'paint' if dimensions == 2 else 'volume'}_{n}",
        title=f"{' x '.join(map(str, shape))} in-painting, {count} seen",
        make=make,
        partition=bma.per_tile((4,) * dimensions, reach=1),
        direct=dimensions == 2,  # In three dimensions a factorisation fills up.
    )


def photograph(seed: int, stride: int) -> np.ndarray:
    """Scikit-learn's temple (even seeds) or flower (odd), values from -1 to 1."""
    name = "flower.jpg" if seed % 2 else "china.jpg"
    image = datasets.load_sample_image(name)[::stride, ::stride]
    return image / 127.5 - 1


def grey(seed: int, n: int) -> np.ndarray:
    stride = 426 // n
    image = photograph(seed, stride).mean(axis=-1)
    left = (image.shape[1] - n) // 2
    return image[:n, left : left + n]


def photo(stride: int = 2) -> Problem:
    def make(seed: int):
        image = photograph(seed, stride)
        rng = np.random.default_rng(seed)
        mask = seen_pixels((*image.shape[:2], 1), image[..., 0].size // 20, rng)
        return np.zeros(image.shape), (mask, mask * image)

    return inpainting(
        name="photo",
        title=f"5 % of a photograph's pixels, {427 // stride} x {640 // stride} x 3",
        make=make,
        partition=bma.per_tile((4, 4, 1), reach=(1, 1, 0)),
    )


def plasma(n: int = 128) -> Problem:
    """The Poisson-Boltzmann equation as an energy: charges screened by ions."""
    area = 1 / n**2

    def make(seed: int):
        rng = np.random.default_rng(seed)
        charges = seen_pixels((n, n), 30, rng) * rng.normal(1, 2, (n, n))
        return np.zeros((n, n)), charges + 20 * area

    def loss(u, data):
        return dirichlet(u, 2) + jnp.sum(area * jnp.cosh(u) - data * u)

    return Problem(
        name="plasma",
        title=f"Poisson-Boltzmann equation, {n} x {n}",
        make=make,
        loss=loss,
        diagonal=lambda u, data: laplacian_diagonal(u.shape) + area * jnp.cosh(u),
        partition=bma.per_tile((4, 4), reach=1),
        update_interval=5,
    )


def bending(n: int) -> scipy.sparse.csr_array:
    """The Hessian of ``bends``: squared second differences, the mixed ones twice."""
    one = scipy.sparse.eye_array(n)
    step, bend = (
        scipy.sparse.diags_array(
            row, offsets=range(len(row)), shape=(n + 1 - len(row), n)
        )
        for row in ([-1.0, 1.0], [1.0, -2.0, 1.0])
    )
    twist = 2**0.5 * scipy.sparse.kron(step, step)
    parts = [scipy.sparse.kron(bend, one), scipy.sparse.kron(one, bend), twist]
    return scipy.sparse.csr_array(sum(D.T @ D for D in parts))


def bends(u: jax.Array) -> jax.Array:
    twist = jnp.diff(jnp.diff(u, axis=0), axis=1)
    along = sum(jnp.sum(jnp.diff(u, 2, axis=axis) ** 2) for axis in (0, 1))
    return (along + 2 * jnp.sum(twist**2)) / 2


def gridding(n: int = 256, percent: float = 2.0) -> Problem:
    """A surface of minimum curvature near scattered soundings, as geophysicists do."""
    prior, count = bending(n), int(n * n * percent / 100)

    def make(seed: int):
        rng = np.random.default_rng(seed)
        x = np.linspace(0, 1, n)
        centers, heights = rng.uniform(0, 1, (2, 12, 1)), rng.standard_normal(12)
        near = np.exp(-(((x - centers) / 0.15) ** 2) / 2)
        true = np.einsum("k,kx,ky->xy", heights, *near)
        mask = seen_pixels((n, n), count, rng)
        noisy = true + 0.01 * rng.standard_normal((n, n))
        return np.zeros((n, n)), (mask, mask * noisy)

    def direct(data):
        mask, y = data
        return sparse_lu(prior + scipy.sparse.diags_array(mask.ravel()), y.ravel())

    return quadratic(
        name=f"gridding_{count}",
        title=f"minimum curvature, {n} x {n}, {count} seen ({percent:g} %)",
        make=make,
        loss=lambda u, data: bends(u) + jnp.sum(data[0] * (u - data[1]) ** 2) / 2,
        diagonal=lambda u, data: prior.diagonal().reshape(u.shape) + data[0],
        partition=bma.per_tile((4, 4), reach=2, slopes=True),
        experts={"direct": ("sparse LU", direct)},
    )
