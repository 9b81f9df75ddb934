"""Iterations of preconditioned conjugate gradients on a gallery of operators.

    python -m benchmarks.grids.gallery

On n × n points inside a fixed boundary, from 0 to 1e-8 of the residual, for a random
right side, in float64: with tiles of 4 × 4, with slopes in these, and with the rule
that `suggest_partition` finds on the first of the sizes. Where PyAMG is installed, its
smoothed aggregation and classical multigrid stand beside them, with their defaults;
smoothed aggregation is given the vectors that are slow by theory. Products with the
operator are counted as well: ours with those of the refresh, and a cycle of PyAMG as
the products that take as many multiplications.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse

import bma_optax as bma
from benchmarks.harness.peers import CG
from benchmarks.harness.results import Parser, Results, positive
from benchmarks.harness.tables import table

try:
    import pyamg
except ImportError:
    pyamg = None

TOLERANCE, MOST, MOST_CYCLES = 1e-8, 3000, 1000


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


def stencil(weights: np.ndarray, slow: Callable | None = None) -> Callable:
    def operator(n: int) -> Operator:
        shape = (n, n, *weights.shape[:-2][:1])
        arrays = weights.astype(float), np.ones(shape)
        vectors = None if slow is None else slow(n)
        return Operator(of_stencil, arrays, shape, weights.shape[-1] // 2, vectors)

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
    "elasticity, ν = 0.3": stencil(elasticity(0.3), rigid),
    "checkerboard of 5, 1 and 1e4": jumps(checkerboard),
    "random cells, 1 and 1e4": jumps(random_cells),
    "D A D, random D": scaled,
}


# What tells operators of one kind apart are arrays, so that they share programs.
@functools.partial(jax.jit, static_argnums=(0, 3))
def refreshed(product, arrays, b, rule):
    return bma.preconditioner(functools.partial(product, arrays), b, rule)


@functools.partial(jax.jit, static_argnums=0)
def iterations(product, arrays, C, b):
    """Steps of conjugate gradients until the residual is small enough."""
    A = functools.partial(product, arrays)

    def step(carry):
        cg, k = carry
        return cg.step(A, C)[0], k + 1

    def going(carry):
        cg, k = carry
        return (jnp.linalg.norm(cg.r) > TOLERANCE * jnp.linalg.norm(b)) & (k < MOST)

    return jax.lax.while_loop(going, step, (CG.start(b, C), 0))[1]


def matrix(operator: Operator) -> scipy.sparse.csr_array:
    """The operator as a sparse matrix, from products with a color of points each."""
    shape, m = operator.shape, 2 * operator.reach + 1
    rows = np.arange(math.prod(shape)).reshape(shape)
    product, parts = jax.jit(operator.product), []
    for color in np.ndindex(m, m, *shape[2:]):
        x = np.zeros(shape)
        x[(*(slice(c, None, m) for c in color[:2]), *color[2:])] = 1
        y = np.asarray(product(operator.arrays, x))
        # The point of this color that is within the reach of each row.
        near = [
            np.clip(c + (np.arange(n) - c + operator.reach) // m * m, 0, n - 1)
            for c, n in zip(color[:2], shape[:2], strict=True)
        ]
        columns = rows[(*np.ix_(*near), *color[2:])]
        columns = columns.reshape(columns.shape + (1,) * len(shape[2:])) + 0 * rows
        some = y != 0
        parts.append((y[some], rows[some], columns[some]))
    values, i, j = (np.concatenate(x) for x in zip(*parts, strict=True))
    return scipy.sparse.csr_array((values, (i, j)), shape=(rows.size,) * 2)


def pyamg_counts(operator: Operator, b) -> dict[str, dict[str, int]]:
    A = scipy.sparse.csr_matrix(matrix(operator))
    block = scipy.sparse.bsr_matrix(A, blocksize=(operator.shape[2:] or (1,)) * 2)
    found = {}
    for name, solver in {
        "smoothed aggregation": pyamg.smoothed_aggregation_solver(
            block, B=operator.slow
        ),
        "Ruge and Stüben": pyamg.ruge_stuben_solver(A),
    }.items():
        residuals: list[float] = []
        solver.solve(
            b.ravel(),
            tol=TOLERANCE,
            maxiter=MOST_CYCLES,
            accel="cg",
            residuals=residuals,
        )
        count = len(residuals) - 1
        products = round(count * (1 + solver.cycle_complexity()))
        found[name] = {"iterations": count, "products": products}
    return found


def measure(operator: Operator, rule: bma.Rule) -> dict[str, Any]:
    A, arrays, reach = operator.product, operator.arrays, operator.reach
    b = jnp.asarray(np.random.default_rng(0).standard_normal(operator.shape))
    found: dict[str, Any] = {"rule": repr(rule)}
    rules = {
        "tiles of 4 × 4": bma.per_tile((4, 4), reach=reach),
        "with slopes": bma.per_tile((4, 4), reach=reach, slopes=True),
        "suggested": rule,
    }
    for name, partition in rules.items():
        steps = int(iterations(A, arrays, refreshed(A, arrays, b, partition), b))
        grids = bma.partition(b, partition).grids
        products = steps + sum(grid.num_products for grid in grids)
        found[name] = {"iterations": steps, "products": products}
    return found | (pyamg_counts(operator, np.asarray(b)) if pyamg else {})


@functools.cache
def suggestion(name: str, n: int) -> bma.Rule:
    operator = OPERATORS[name](n)
    A, arrays = operator.product, operator.arrays
    return bma.suggest_partition(
        lambda u: jnp.vdot(u, A(arrays, u)) / 2,
        jnp.zeros(operator.shape),
        verbose=False,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("benchmarks.grids.gallery", __doc__)
    parser.add_argument("--sizes", type=positive, nargs="+", default=[64, 128, 256])
    options = parser.parse(arguments)
    results = Results(options, {}, jax, optax, bma)
    with jax.enable_x64(True):
        for n, name in itertools.product(options.sizes, OPERATORS):

            def cell(name=name, n=n):
                found = measure(OPERATORS[name](n), suggestion(name, options.sizes[0]))
                print(n, name, found, flush=True)
                return found

            results.cell(cell, name, n)
    print(report(results.content))
    results.finish()


def report(content: dict[str, Any]) -> str:
    """A row an operator: iterations on all sizes, and products on the last one."""
    measured = {
        name: list(content[name].values()) for name in OPERATORS if name in content
    }
    cells = itertools.chain.from_iterable(measured.values())
    keys = [key for key in dict.fromkeys(itertools.chain(*cells)) if key != "rule"]

    def cell(found, key):
        if not all(key in x for x in found):
            return "-"
        counts = [x[key]["iterations"] for x in found]
        shown = (f"> {k}" if k in (MOST, MOST_CYCLES) else str(k) for k in counts)
        return f"{' / '.join(shown)} ({found[-1][key]['products']})"

    rows = [
        (name, *(cell(found, key) for key in keys), f"`{found[-1]['rule']}`")
        for name, found in measured.items()
    ]
    return table(["operator", *keys, "suggested rule"], rows)


if __name__ == "__main__":
    main()
