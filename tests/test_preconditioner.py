"""``bma.preconditioner`` for conjugate gradients: units, null directions, holes."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import bma_optax as bma

pytestmark = pytest.mark.usefixtures("x64")

# A multiple of the number of colors: at the two ends of an axis they differ then, and
# the program has no second set of probes.
N = 15
TILES = bma.per_tile((4, 4))
LOCAL = bma.per_tile((4, 4), reach=1)


def neumann(u, weights=(1.0, 1.0)):
    """A Laplacian that maps constants to 0."""

    def energy(u):
        parts = [jnp.sum(jnp.diff(u, axis=k) ** 2 * w) for k, w in enumerate(weights)]
        return sum(parts) / 2

    return jax.grad(energy)(u)


def dirichlet(u):
    return neumann(jnp.pad(u, 1))[1:-1, 1:-1]


def field(seed, n=N, dtype=None):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((n, n)), dtype)


def two_fields(v):
    coupling = 0.3 * (v["u"] - v["v"])
    return {"u": dirichlet(v["u"]) + coupling, "v": dirichlet(v["v"]) - coupling}


def scaled(A, D):
    """D A D."""

    def times(v):
        return jax.tree.map(jnp.multiply, D, v)

    return lambda v: times(A(times(v)))


def iterations(A, C, b, tolerance=1e-8, most=1000):
    """Steps of conjugate gradients to a relative residual."""
    flat, unravel = ravel_pytree(b)

    def run():
        def product(f, x):
            return ravel_pytree(f(unravel(x)))[0]

        def going(carry):
            _, r, _, _, k = carry
            return (jnp.linalg.norm(r) > tolerance * jnp.linalg.norm(flat)) & (k < most)

        def step(carry):
            x, r, p, rz, k = carry
            q = product(A, p)
            a = rz / jnp.vdot(p, q)
            x, r = x + a * p, r - a * q
            z = product(C, r)
            new = jnp.vdot(r, z)
            return x, r, z + new / rz * p, new, k + 1

        z = product(C, flat)
        start = 0 * flat, flat, z, jnp.vdot(flat, z), 0
        return jax.lax.while_loop(going, step, start)[-1]

    return int(jax.jit(run)())


# Units --------------------------------------------------------------------------------

PARTITIONS = {
    "nested": {"partition": LOCAL},
    "dense": {"partition": TILES},
    "layers alone": {"partition": bma.within("array", TILES)},
    "per leaf": {},
    "per unit": {"partition": bma.per_column},
    "no blocks": {"partition": bma.by_function(lambda path, shape: None)},
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in PARTITIONS]
    + [("nested", "float64"), ("dense", "float64")],
)
def test_units_of_arrays_do_not_matter(name, dtype):
    """C(D A D) = D^-1 C(A) D^-1 for D constant on each array, up to the least numbers.

    D is a power of two, so that even rounding is the same.
    """
    ratio = 2.0 ** (17 if dtype == "float32" else 20)  # of D; of G it is the square.
    like = {"u": field(0, dtype=dtype), "v": field(1, dtype=dtype)}
    kwargs = PARTITIONS[name]

    @jax.jit
    def apply(large, x):
        D = {"u": jnp.ones((), dtype), "v": large.astype(dtype)}
        C = bma.preconditioner(
            scaled(two_fields, D),
            like,
            # Random signs see the coupling of unlike units as noise: colors or units.
            **{"num_probes": 2 * N * N} | kwargs,
        )
        return jax.tree.map(jnp.multiply, D, C(jax.tree.map(jnp.multiply, D, x)))

    expected = apply(np.float64(1.0), like)
    for large in (ratio, 1 / ratio):
        found = apply(np.float64(large), like)
        tolerance = 1e-4 if dtype == "float32" else 1e-9
        jax.tree.map(
            functools.partial(
                np.testing.assert_allclose, rtol=tolerance, atol=tolerance
            ),
            found,
            expected,
        )


@pytest.mark.parametrize("layout", ["last axis", "first axis"])
def test_units_of_fields_in_one_array_do_not_matter(layout):
    axis = -1 if layout == "last axis" else 0
    rule = LOCAL if layout == "last axis" else bma.stacked(LOCAL)

    def A(v):
        u, w = (jnp.take(v, i, axis=axis) for i in (0, 1))
        out = two_fields({"u": u, "v": w})
        return jnp.stack([out["u"], out["v"]], axis=axis)

    like = jnp.stack([field(0), field(1)], axis=axis)

    @jax.jit
    def apply(large):
        D = jnp.stack([jnp.ones((N, N)), jnp.full((N, N), large)], axis=axis)
        C = bma.preconditioner(scaled(A, D), like, rule)
        return D * C(D * like)

    np.testing.assert_allclose(apply(2.0**20), apply(1.0), rtol=1e-8, atol=1e-9)


def test_units_of_elements_cost_no_more_than_jacobi_does():
    n = 33
    rng = np.random.default_rng(0)
    D, b = jnp.asarray(10 ** rng.uniform(-3, 3, (n, n))), field(0, n)
    A = scaled(dirichlet, D)
    jacobi = iterations(A, lambda r: r / (4 * D**2), b)
    C = jax.jit(lambda: bma.preconditioner(A, b, LOCAL))()
    assert iterations(A, C, b) < 1.4 * jacobi


def test_units_of_arrays_do_not_matter_to_probes_either():
    """Two coupled arrays without a reach, whose diagonal is estimated by probes."""
    rng = np.random.default_rng(0)
    X, n = jnp.asarray(rng.standard_normal((90, 80))), 40
    like = {"u": jnp.zeros(n), "v": jnp.zeros(n)}

    def A(v, large):
        Xv = X @ jnp.concatenate([v["u"], large * v["v"]])
        back = X.T @ Xv
        return {"u": back[:n], "v": large * back[n:]}

    @jax.jit
    def diagonals(large):
        C = bma.preconditioner(lambda v: A(v, large), like)
        return C.inverse_diagonal["u"], large**2 * C.inverse_diagonal["v"]

    expected = 1 / jnp.sum(X**2, axis=0)
    for large in (1.0, 1e6, 1e-6):
        for found, exact in zip(diagonals(large), jnp.split(expected, 2), strict=True):
            assert 0.4 < jnp.min(found / exact) and jnp.max(found / exact) < 2.5


def test_long_blocks_in_float32_do_as_in_float64():
    n = 20_000

    def A(u):
        inner = jnp.diff(jnp.pad(u, 1))
        return -jnp.diff(inner)

    energies = []
    for dtype in ("float32", "float64"):
        like = jnp.zeros(n, dtype)
        C = jax.jit(
            lambda like=like: bma.preconditioner(
                A, like, bma.per_tile(n // 10), diagonal=jnp.full_like(like, 2)
            )
        )()
        energies.append(jnp.vdot(jnp.ones_like(like), C(jnp.ones_like(like))))
    np.testing.assert_allclose(*energies, rtol=1e-3)


# Null directions ----------------------------------------------------------------------


def varying(seed, dtype=None):
    rng = np.random.default_rng(seed)
    shapes = (N - 1, N), (N, N - 1)
    return tuple(jnp.asarray(10 ** rng.uniform(-1, 1, s), dtype) for s in shapes)


SINGULAR = {
    "default": {},
    "tiles": {"partition": TILES},
    "tiles, a reach": {"partition": LOCAL},
    "nested levels": {"partition": bma.per_tile((1, 2), reach=1)},
    "units": {"partition": bma.per_column},
    "units alone": {"partition": bma.within("block", bma.per_column)},
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in SINGULAR]
    + [("default", "float64"), ("nested levels", "float64")],
)
def test_a_singular_system_is_solved_to_rounding(name, dtype):
    b = field(1, dtype=dtype)
    b = b - jnp.mean(b)
    kwargs = {"num_probes": N * N} | SINGULAR[name]

    @jax.jit
    def solve(w):
        def A(u):
            return neumann(u, w)

        C = bma.preconditioner(A, b, **kwargs)
        tolerance = 2e-6 if dtype == "float32" else 1e-12
        x, _ = jax.scipy.sparse.linalg.cg(A, b, M=C, tol=tolerance, maxiter=400)
        one = jnp.ones_like(b)
        return jnp.linalg.norm(A(x) - b) / jnp.linalg.norm(b), jnp.max(jnp.abs(C(one)))

    weights = varying(0, dtype)
    for w, most in ((jax.tree.map(jnp.ones_like, weights), 10), (weights, 100)):
        residual, of_ones = solve(w)
        assert residual < (1e-5 if dtype == "float32" else 1e-11)
        # C does not amplify the null vector by more than a few times what Z^-2 does.
        assert of_ones < most


def test_newton_takes_factors_of_a_softmax_layer():
    """Weights shifted for all classes at once give the same loss: G is singular."""
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((50, 12)) + 1, rng.integers(0, 4, 50)
    params = {"w": np.zeros((12, 4)), "b": np.zeros(4)}

    def f(p):
        logits = X @ p["w"] + jnp.broadcast_to(p["b"], (50, 4))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return jnp.mean(losses)

    for rule in (bma.per_leaf, bma.per_unit, bma.per_layer):
        tx = bma.newton_bma(partition=rule, update_interval=10)

        def step(carry, _, tx=tx):
            p, s = carry
            u, s = tx.update(jax.grad(f)(p), s, p, value_fn=f)
            p = optax.apply_updates(p, u)
            return (p, s), f(p)

        @jax.jit
        def run(p, tx=tx, step=step):
            (_, s), values = jax.lax.scan(step, (p, tx.init(p)), length=25)
            return bma.diagnostics(s), f(p), values

        numbers, first, values = run(params)
        assert numbers["failures"] == 0 and numbers["refreshes"] == 3
        assert values[-1] < 0.9 * first and np.all(np.diff(values) < 1e-9)
        # No eigenvalue that is only rounding is promised to pay.
        assert numbers["coarse_ratio"] > 1e-4


# Holes, and what is not finite --------------------------------------------------------


@pytest.mark.parametrize("rule", [TILES, LOCAL], ids=str)
def test_elements_without_curvature_disturb_nothing(rule):
    """A field with holes, one as large as a block, beside a field of another unit."""
    mask = np.ones((N, N))
    mask[3:6, 3:14] = 0
    mask[8:16, 8:16] = 0

    def A(v):
        inside = mask * dirichlet(mask * v["u"])
        return {"u": 1e-9 * inside, "v": 1e9 * dirichlet(v["v"])}

    b = {"u": mask * field(0), "v": field(1)}
    C = jax.jit(lambda: bma.preconditioner(A, b, rule, num_probes=2 * N * N))()
    y = jax.jit(lambda b: C(b))(b)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(y))
    # 43 with both in one unit, where the residual is weighted otherwise.
    assert iterations(A, C, b, tolerance=1e-10) < 80


def test_a_product_that_is_not_finite_is_said():
    with pytest.raises(ValueError, match="not finite"):
        bma.preconditioner(lambda v: jnp.nan * v, jnp.ones(4))
    with pytest.warns(UserWarning, match="not finite"):
        jax.jit(lambda: bma.preconditioner(lambda v: jnp.nan * v, jnp.ones(4)))()
        jax.effects_barrier()
    # Under vmap it is said for those that it is true of; filters of other kinds of
    # warnings, or none at all, change nothing.
    preconditioners = jax.jit(
        jax.vmap(lambda x: bma.preconditioner(lambda v: x * v, jnp.ones(4)))
    )
    for kind in (DeprecationWarning, None):
        with pytest.warns(UserWarning, match="not finite") as seen:
            warnings.resetwarnings()
            if kind:
                warnings.simplefilter("ignore", kind)
            jax.block_until_ready(preconditioners(np.array([1.0, np.nan])))
            jax.effects_barrier()
        assert len(seen) == 1


def advection(weight, x):
    """A Laplacian and ``weight`` times first differences along the first axis."""
    ahead, behind = jnp.pad(x[1:], ((0, 1), (0, 0))), jnp.pad(x[:-1], ((1, 0), (0, 0)))
    return dirichlet(x) + weight * (ahead - behind) / 2


@pytest.mark.parametrize("rule", [bma.per_leaf, LOCAL])
def test_an_operator_that_is_not_symmetric_is_said_and_the_advice_works(rule):
    b = field(0, dtype="float32")
    A = jax.jit(functools.partial(advection, 0.3))
    message = "is not symmetric"
    with pytest.raises(ValueError, match=message):
        bma.preconditioner(A, b, rule)

    @jax.jit
    def preconditioned(weight, scale):
        D = jnp.where(jnp.arange(N)[:, None] < 3, scale, 1).astype(b.dtype)
        A = functools.partial(advection, weight)
        return bma.preconditioner(scaled(A, D), b, rule)(b)

    # A few elements of a far larger curvature hide nothing.
    for weight, scale in ((0.3, 1.0), (0.3, 1e4), (-0.3, 1e-4)):
        with pytest.warns(UserWarning, match=message):
            jax.block_until_ready(preconditioned(np.float32(weight), np.float32(scale)))
            jax.effects_barrier()
    for scale in (1.0, 1e4, 1e-4):  # No warning.
        jax.block_until_ready(preconditioned(np.float32(0.0), np.float32(scale)))
        jax.effects_barrier()

    def symmetric(v):
        return (A(v) + jax.linear_transpose(A, v)(v)[0]) / 2

    @jax.jit
    def solve(b):
        C = bma.preconditioner(symmetric, b, rule)
        return jax.scipy.sparse.linalg.gmres(A, b, M=C, tol=1e-5, maxiter=20)[0]

    assert np.linalg.norm(A(solve(b)) - b) < 1e-4 * np.linalg.norm(b)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_symmetric_operator_of_few_bits_is_taken_for_symmetric(dtype):
    def A(v):
        return dirichlet(v.astype(dtype)).astype(v.dtype)

    @jax.jit
    def apply(key, b):
        return bma.preconditioner(A, b, key=key)(b)

    for seed in range(8):
        assert np.all(np.isfinite(apply(np.uint32(seed), field(0, dtype="float32"))))
    jax.effects_barrier()


def test_of_no_parameters():
    assert bma.preconditioner(lambda v: v, {})({}) == {}
