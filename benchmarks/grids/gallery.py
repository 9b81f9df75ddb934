"""Iterations of preconditioned conjugate gradients on a gallery of operators.

    python -m benchmarks.grids.gallery

On n × n points inside a fixed boundary, from 0 to 1e-8 of the residual, for a random
right side (in one row for a random solution, which is rougher), in float64: with tiles
of 4 × 4, with slopes in these, and with the rule that `suggest_partition` finds on the
first of the sizes. Where PyAMG is installed, its smoothed aggregation and classical
multigrid stand beside them, with their defaults; smoothed aggregation is given the
vectors that are slow by theory. Products with the operator are counted as well: ours
with those of the refresh, and a cycle of PyAMG as the products that take as many
multiplications.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse

import bma_optax as bma
from benchmarks.grids.operators import OPERATORS, Operator
from benchmarks.harness.peers import CG
from benchmarks.harness.results import Parser, Results, positive
from benchmarks.harness.tables import table

try:
    import pyamg
except ImportError:
    pyamg = None

TOLERANCE, MOST, MOST_CYCLES = 1e-8, 3000, 1000


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
    b = operator.right_side()
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
