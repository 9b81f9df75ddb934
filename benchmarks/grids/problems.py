"""The problems of this study: parameters on a grid, most with neighbours."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
import scipy.sparse.linalg
from matplotlib import cbook
from sklearn import datasets

import bma_optax as bma


@dataclasses.dataclass(frozen=True)
class Problem:
    """A loss of an array and data, and the solvers that suit it."""

    name: str
    title: str
    make: Callable[[int], tuple[Any, Any]]  # Seed -> start, data; seed 0 is reported.
    loss: Callable[..., jax.Array]
    diagonal: Callable[..., jax.Array]  # Of the Hessian, for Jacobi: params, data.
    partition: bma.Rule
    update_interval: int = 10_000  # A constant curvature needs one refresh.
    quadratic: bool = True
    matrix: Callable[[Any], tuple[Any, np.ndarray]] | None = None
    # Data -> what is timed; assembling the system is not.
    direct: Callable[[Any], Callable[[], np.ndarray]] | None = None
    direct_label: str = "sparse LU"
    picture: Callable[[Any], np.ndarray] | None = np.asarray  # From parameters.


def dirichlet(u: jax.Array, axes: int) -> jax.Array:
    """Half the squared differences of neighbours."""
    parts = [jnp.sum(jnp.square(jnp.diff(u, axis=axis))) for axis in range(axes)]
    return sum(parts[1:], parts[0]) / 2


def laplacian(shape: tuple[int, ...]) -> scipy.sparse.csr_array:
    """The Hessian of ``dirichlet``."""
    total = 0
    for axis, n in enumerate(shape):
        ends = np.full(n, 2.0)
        ends[[0, -1]] = 1.0
        part = scipy.sparse.diags_array(
            [ends, -1.0, -1.0], offsets=[0, 1, -1], shape=(n, n)
        )
        before = scipy.sparse.eye_array(int(np.prod(shape[:axis])))
        after = scipy.sparse.eye_array(int(np.prod(shape[axis + 1 :])))
        total = total + scipy.sparse.kron(before, scipy.sparse.kron(part, after))
    return scipy.sparse.csr_array(total)


def laplacian_diagonal(shape: tuple[int, ...]) -> np.ndarray:
    return laplacian(shape).diagonal().reshape(shape)


def sparse_lu(matrix, rhs: np.ndarray) -> Callable[[], np.ndarray]:
    """One factorisation for all right hand sides, in the order for symmetric ones."""
    csc = scipy.sparse.csc_matrix(matrix)

    order = {"permc_spec": "MMD_AT_PLUS_A", "options": {"SymmetricMode": True}}
    splu = scipy.sparse.linalg.splu
    return lambda: splu(csc, diag_pivot_thresh=0.0, **order).solve(rhs)


def seen_pixels(shape, count: int, rng) -> np.ndarray:
    mask = np.zeros(shape)
    mask.flat[rng.choice(mask.size, count, replace=False)] = 1
    return mask


def paint_loss(u, data) -> jax.Array:
    """Smoothness, and the squared errors where ``mask`` is 1."""
    mask, y = data
    return dirichlet(u, mask.ndim) + jnp.sum(_over(mask, u) * jnp.square(u - y)) / 2


def _over(mask, u):
    return mask.reshape(mask.shape + (1,) * (u.ndim - mask.ndim))


def paint_matrix(data):
    mask, y = (np.asarray(x) for x in data)
    matrix = laplacian(mask.shape) + scipy.sparse.diags_array(mask.ravel())
    return matrix, (_over(mask, y) * y).reshape(mask.size, -1)


def paint_diagonal(u, data) -> jax.Array:
    mask = data[0]
    diagonal = laplacian_diagonal(mask.shape) + mask
    return jnp.broadcast_to(_over(diagonal, u), u.shape)


def inpainting(name: str, title: str, make, rule, **more: Any) -> Problem:
    def direct(data):
        return sparse_lu(*paint_matrix(data))

    more = {"matrix": paint_matrix, "direct": direct} | more
    return Problem(name, title, make, paint_loss, paint_diagonal, rule, **more)


def paint(n: int, dimensions: int = 2, count: int = 40) -> Problem:
    """A field from few observed values."""
    shape = (n,) * dimensions

    def make(seed: int):
        rng = np.random.default_rng(seed)
        mask = seen_pixels(shape, count, rng)
        return np.zeros(shape), (mask, mask * rng.standard_normal(shape))

    size = " x ".join(map(str, shape))
    kind, tile = ("paint", (4, 4)) if dimensions == 2 else ("volume", (4, 4, 4))
    title = f"{size} in-painting, {count} seen"
    # In three dimensions a factorisation fills up.
    more = {"direct": None} if dimensions > 2 else {}
    return inpainting(f"{kind}_{n}", title, make, bma.per_tile(tile, reach=1), **more)


def terrain(shape=(344, 403)) -> Problem:
    """Elevations of the Jacksboro fault, Tennessee, at scattered points."""

    def make(seed: int):
        with cbook.get_sample_data("jacksboro_fault_dem.npz") as file:
            heights = file["elevation"].astype(float)[: shape[0], : shape[1]]
        # Another instance: other points on the map turned upside down.
        heights = (heights - heights.mean()) / heights.std()
        heights = heights[::-1, ::-1] if seed % 2 else heights
        rng = np.random.default_rng(seed)
        mask = seen_pixels(heights.shape, heights.size // 50, rng)
        return np.zeros(heights.shape), (mask, mask * heights)

    title = f"gridding {shape[0]} x {shape[1]} elevations, 2 % seen"
    rule = bma.per_tile((4, 4), reach=1)
    return inpainting("terrain", title, make, rule)


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
        mask = seen_pixels(image.shape[:2], image[..., 0].size // 20, rng)
        return np.zeros(image.shape), (mask, mask[..., None] * image)

    title = f"5 % of a photograph's pixels, {427 // stride} x {640 // stride} x 3"
    rule = bma.per_tile((4, 4, 1), reach=(1, 1, 0))
    shown = {"picture": lambda u: np.clip((np.asarray(u) + 1) / 2, 0, 1)}
    return inpainting("photo", title, make, rule, **shown)


def plasma(n: int = 128) -> Problem:
    """The Poisson-Boltzmann equation as an energy: charges screened by ions."""
    area = 1 / n**2

    def make(seed: int):
        rng = np.random.default_rng(seed)
        charges = seen_pixels((n, n), 30, rng) * rng.normal(1, 2, (n, n))
        return np.zeros((n, n)), (charges + 20 * area,)

    def loss(u, data):
        return dirichlet(u, 2) + jnp.sum(area * jnp.cosh(u) - data[0] * u)

    def diagonal(u, data):
        return laplacian_diagonal(u.shape) + area * jnp.cosh(u)

    title = f"Poisson-Boltzmann equation, {n} x {n}"
    rule = bma.per_tile((4, 4), reach=1)
    return Problem("plasma", title, make, loss, diagonal, rule, 5, quadratic=False)
