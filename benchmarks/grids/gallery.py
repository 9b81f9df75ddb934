"""Iterations of preconditioned conjugate gradients on a gallery of operators.

    python -m benchmarks.grids.gallery

On n × n points inside a fixed boundary, from 0 to 1e-8 of the residual, for a random
right side: with tiles of 4 × 4, with slopes in these, and with the rule that
`suggest_partition` finds; where PyAMG is installed, its smoothed aggregation beside
them. In float64.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bma_optax as bma
from benchmarks.harness.peers import CG
from benchmarks.harness.results import Parser, Results, positive
from benchmarks.harness.tables import table

try:
    import pyamg
except ImportError:
    pyamg = None

TOLERANCE, MOST = 1e-8, 3000


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
OPERATORS = {
    **{f"along an axis, {x:g}": along_an_axis(x) for x in (1, 0.1, 0.01, 0.001)},
    "at pi/8, 0.01": rotated(0.01, np.pi / 8),
    "at pi/4, 0.01": rotated(0.01, np.pi / 4),
    "thin plate": THIN_PLATE,
    "elasticity, ν = 0.3": elasticity(0.3),
}


def product(stencil: np.ndarray, u):
    """The stencil at every point; beyond the boundary u is 0.

    Args:
      stencil: shape (m, m), or (fields, fields, m, m) for u of shape (n, n, fields).
    """
    m, n = stencil.shape[-1], len(u)
    padded = jnp.pad(u, [(m // 2, m // 2)] * 2 + [(0, 0)] * (u.ndim - 2))
    total = jnp.zeros_like(u)
    for i, j in itertools.product(range(m), repeat=2):
        part, weights = padded[i : i + n, j : j + n], stencil[..., i, j]
        if u.ndim == 2 and weights:
            total += float(weights) * part
        elif u.ndim > 2:
            total += jnp.einsum("ba,xya->xyb", weights, part)
    return total


@functools.partial(jax.jit, static_argnums=0)
def iterations(A, C, b):
    """Steps of conjugate gradients until the residual is small enough."""

    def step(carry):
        cg, k = carry
        return cg.step(A, C)[0], k + 1

    def going(carry):
        cg, k = carry
        return (jnp.linalg.norm(cg.r) > TOLERANCE * jnp.linalg.norm(b)) & (k < MOST)

    return jax.lax.while_loop(going, step, (CG.start(b, C), 0))[1]


def aggregation(A, stencil: np.ndarray, n: int, b) -> int:
    matrix = pyamg.gallery.stencil_grid(stencil, (n, n), format="csr")
    residuals: list[float] = []
    pyamg.smoothed_aggregation_solver(matrix).solve(
        b.ravel(), tol=TOLERANCE, maxiter=MOST, accel="cg", residuals=residuals
    )
    return len(residuals) - 1


def measure(stencil: np.ndarray, n: int) -> dict[str, int | str]:
    A = functools.partial(product, stencil)
    shape = (n, n) if stencil.ndim == 2 else (n, n, len(stencil))
    b = jnp.asarray(np.random.default_rng(0).standard_normal(shape))
    reach = stencil.shape[-1] // 2
    plain = bma.per_tile((4, 4), reach=reach)
    sloped = bma.per_tile((4, 4), reach=reach, slopes=True)
    rule = bma.suggest_partition(lambda u: jnp.vdot(u, A(u)) / 2, 0 * b, verbose=False)
    found: dict[str, int | str] = {"rule": repr(rule)}
    rules = {"tiles of 4 × 4": plain, "with slopes": sloped, "suggested": rule}
    for name, partition in rules.items():
        C = jax.jit(lambda p=partition: bma.preconditioner(A, b, p))()
        found[name] = int(iterations(A, C, b))
    if pyamg and stencil.ndim == 2:
        found["smoothed aggregation"] = aggregation(A, stencil, n, np.asarray(b))
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("benchmarks.grids.gallery", __doc__)
    parser.add_argument("--sizes", type=positive, nargs="+", default=[64, 128, 256])
    options = parser.parse(arguments)
    results = Results(options, {}, jax, optax, bma)
    with jax.enable_x64(True):
        for name, stencil in OPERATORS.items():
            for n in options.sizes:
                results.cell(lambda s=stencil, n=n: measure(s, n), name, n)
            print(name, results.content[name], flush=True)
    print(report(results.content))
    results.finish()


def report(content: dict[str, Any]) -> str:
    """A row an operator: iterations on all sizes."""
    measured = [name for name in OPERATORS if name in content]
    found = {name: list(content[name].values()) for name in measured}
    cells = itertools.chain.from_iterable(found.values())
    keys = [key for key in dict.fromkeys(itertools.chain(*cells)) if key != "rule"]
    rows = [
        (
            name,
            *(" / ".join(str(row.get(key, "-")) for row in rows) for key in keys),
            f"`{rows[-1].get('rule', '-')}`",
        )
        for name, rows in found.items()
    ]
    return table(["operator", *keys, "suggested rule"], rows)


if __name__ == "__main__":
    main()
