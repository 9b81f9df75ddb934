"""Every operation against float64 NumPy, which builds the d x d matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bma_optax import BlockMeanMatrix

pytestmark = pytest.mark.usefixtures("x64")


def expansion(sizes):
    """The d x L indicator of the blocks."""
    return np.repeat(np.eye(len(sizes)), sizes, axis=0)


def dense_of(Lambda, B, sizes):
    """Figure 1, entry by entry."""
    indicator = expansion(sizes)
    return np.diag(indicator @ Lambda) + indicator @ B @ indicator.T


def pair(sizes, seed=0, scale=1.0):
    """A positive definite (Λ, B) with condition numbers that grow with ``scale``."""
    rng = np.random.default_rng(seed)
    L = len(sizes)
    A = rng.standard_normal((L, L)) * scale ** -rng.uniform(0, 1, L)
    return rng.uniform(0.5, 2, L), A @ A.T


# (name, sizes, Λ, B); those of the same sizes share their programs.
MATRICES = [
    pytest.param((2, 5, 3), *pair((2, 5, 3)), id="figure 1"),
    pytest.param((1, 1, 1), *pair((1, 1, 1)), id="one-element blocks"),
    pytest.param((1, 4, 1, 2), *pair((1, 4, 1, 2)), id="some of one element"),
    pytest.param((6,), *pair((6,)), id="one block"),
    pytest.param((3, 1, 2) * 4, *pair((3, 1, 2) * 4), id="many blocks"),
    pytest.param((1, 4, 1, 2), *pair((1, 4, 1, 2), scale=1e3), id="ill conditioned"),
    pytest.param((1, 4, 1, 2), np.ones(4), np.zeros((4, 4)), id="identity"),
    pytest.param((1, 4, 1, 2), np.full(4, 2.0), np.zeros((4, 4)), id="repeated"),
]
over_matrices = pytest.mark.parametrize(("sizes", "Lambda", "B"), MATRICES)


def matrix_function(dense, f):
    values, vectors = np.linalg.eigh(dense)
    return (vectors * f(values)) @ vectors.T


OPERATIONS = {
    "inverse": (lambda m: m.inverse().to_dense(), np.linalg.inv),
    "inverse_sqrt": (
        lambda m: m.inverse_sqrt().to_dense(),
        lambda G: matrix_function(G, lambda x: x**-0.5),
    ),
    "floored": (
        lambda m: m.inverse_sqrt(min_eigenvalue=0.7).to_dense(),
        lambda G: matrix_function(G, lambda x: np.maximum(x, 0.7) ** -0.5),
    ),
    "power(0.3)": (
        lambda m: m.power(0.3).to_dense(),
        lambda G: matrix_function(G, lambda x: x**0.3),
    ),
    "power(3)": (lambda m: m.power(3).to_dense(), lambda G: G @ G @ G),
    "power(0)": (lambda m: m.power(0).to_dense(), lambda G: np.eye(len(G))),
    "power(-2)": (lambda m: m.power(-2).to_dense(), lambda G: np.linalg.inv(G @ G)),
    "eigenvalues": (lambda m: m.eigenvalues(), np.linalg.eigvalsh),
    "logdet": (lambda m: m.logdet(), lambda G: np.linalg.slogdet(G)[1]),
    "trace": (lambda m: m.trace(), np.trace),
    "matvec": (
        lambda m: m.matvec(jnp.arange(1.0, m.shape[0] + 1)),
        lambda G: G @ np.arange(1.0, len(G) + 1),
    ),
}


def check_close(got, expected, name):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        got, expected, rtol=1e-9, atol=1e-9 * scale, err_msg=name
    )


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_without_jit(name):
    operation, reference = OPERATIONS[name]
    sizes = (2, 1, 3)
    Lambda, B = pair(sizes)
    matrix = BlockMeanMatrix.from_expansions(Lambda, B, sizes)
    check_close(operation(matrix), reference(dense_of(Lambda, B, sizes)), name)


@functools.partial(jax.jit, static_argnums=0)
def expanded_and_projected(sizes, Lambda, B, dense):
    matrix = BlockMeanMatrix.from_expansions(Lambda, B, sizes)
    assert matrix.shape == (sum(sizes), sum(sizes))
    projected = BlockMeanMatrix.project(dense, sizes)
    return matrix.to_dense(), matrix.B, projected.to_dense()


@functools.partial(jax.jit, static_argnums=0)
def operations(sizes, Lambda, B):
    matrix = BlockMeanMatrix.from_expansions(Lambda, B, sizes)
    return {name: f(matrix) for name, (f, _) in OPERATIONS.items()}


@functools.partial(jax.jit, static_argnums=0)
def batches(sizes, Lambda, B, factors):
    """A batch and what its methods return, a batch of batches, and each matrix."""

    def f(factor):
        matrix = BlockMeanMatrix.from_expansions(Lambda * factor, B, sizes)
        return matrix.inverse_sqrt()

    batch = jax.vmap(f)(factors)
    methods = batch.trace(), batch.power(2).M
    ones = [(one.M, one.trace()) for one in map(f, factors)]
    return batch.M, methods, jax.vmap(jax.vmap(f))(factors[:, None]).M, ones


@over_matrices
class TestAgainstDense:
    def test_expansions_and_their_projection(self, sizes, Lambda, B):
        dense = dense_of(Lambda, B, sizes)
        got, same_B, projected = expanded_and_projected(sizes, Lambda, B, dense)
        np.testing.assert_allclose(got, dense)
        np.testing.assert_allclose(same_B, B, atol=1e-14)
        np.testing.assert_allclose(projected, dense, atol=1e-13)

    def test_operations(self, sizes, Lambda, B):
        dense = dense_of(Lambda, B, sizes)
        got = operations(sizes, Lambda, B)
        for name, (_, reference) in OPERATIONS.items():
            check_close(got[name], reference(dense), name)

    def test_vmap_and_vmap_of_vmap(self, sizes, Lambda, B):
        factors = np.array([1.0, 2.0, 3.0])
        M, (traces, squares), nested, ones = jax.device_get(
            batches(sizes, Lambda, B, factors)
        )
        for i, (one, trace) in enumerate(ones):
            np.testing.assert_allclose(M[i], one, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(nested[i, 0], one, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(traces[i], trace, rtol=1e-9)
        np.testing.assert_allclose(squares, M @ M, rtol=1e-8, atol=1e-8)


DERIVABLE = [
    lambda m: m.inverse(),
    lambda m: m.inverse_sqrt(),
    lambda m: m.inverse_sqrt(min_eigenvalue=0.3),
    lambda m: m.power(0.3),
    lambda m: m.logdet(),
    lambda m: m.trace(),
]


@functools.partial(jax.jit, static_argnums=0)
def derivatives(sizes, Lambda, B, direction, weights, t):
    """Values along a direction, first derivatives in both modes, second in all four."""

    def f(t):
        matrix = BlockMeanMatrix.from_expansions(
            Lambda + 0 * t, B + t * direction, sizes
        )
        results = [operation(matrix) for operation in DERIVABLE]
        return jnp.stack(
            [
                jnp.sum(x.M * weights) + jnp.sum(x.Lambda)
                if isinstance(x, BlockMeanMatrix)
                else x
                for x in results
            ]
        )

    def with_derivative(f):
        """The value of a function at t and its derivative, by forward mode."""
        return jax.jvp(f, (t,), (jnp.ones_like(t),))

    forward, reverse = jax.jacfwd(f), jax.jacrev(f)
    value, _ = with_derivative(f)
    first, of_forward = with_derivative(forward)
    by_reverse, of_reverse = with_derivative(reverse)
    second = of_forward, of_reverse, jax.jacrev(forward)(t), jax.jacrev(reverse)(t)
    return value, first, by_reverse, second


# One program for all four and for all t, which have one type.
@pytest.mark.parametrize(
    ("sizes", "Lambda", "B"),
    [m for m in MATRICES if m.values[0] == (1, 4, 1, 2)],
)
def test_derivatives_in_every_mode(sizes, Lambda, B):
    """grad, jvp, jvp of jvp, vjp of vjp and both mixtures against differences."""
    rng = np.random.default_rng(3)
    direction = rng.standard_normal(B.shape)
    direction = direction + direction.T
    weights = rng.standard_normal(B.shape)
    weights = weights + weights.T
    smallest = np.linalg.eigvalsh(dense_of(Lambda, B, sizes))[0]
    step = 1e-4 * smallest / np.abs(direction).max() / max(sizes)
    above, here, below = (
        derivatives(sizes, Lambda, B, direction, weights, np.float64(t))
        for t in (step, 0, -step)
    )
    first = (above[0] - below[0]) / (2 * step)
    scale = 1 + np.abs(first)
    np.testing.assert_allclose(here[1] / scale, first / scale, atol=2e-5)
    np.testing.assert_allclose(here[2] / scale, here[1] / scale, atol=1e-9)
    second = (above[1] - below[1]) / (2 * step)
    scale = 1 + np.abs(second)
    for mode in here[3]:
        np.testing.assert_allclose(mode / scale, second / scale, atol=1e-4)


def test_third_derivative_and_hessian_where_eigenvalues_repeat():
    """x^-½ at the identity: Taylor's coefficients along a direction are known."""
    A = jnp.array([[1.0, 0.5], [0.5, -1.0]])

    def f(t):
        matrix = BlockMeanMatrix(jnp.ones(2), jnp.eye(2) + t * A, (2, 2))
        return matrix.inverse_sqrt().M

    coefficients = []
    for _ in range(4):
        coefficients.append(jax.jit(f)(0.0))
        f = functools.partial(lambda f, t: jax.jvp(f, (t,), (1.0,))[1], f)
    expected = [np.eye(2), -A / 2, 3 / 4 * A @ A, -15 / 8 * A @ A @ A]
    for got, want in zip(coefficients, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)

    def total(M):
        return BlockMeanMatrix(jnp.ones(3), M, (1, 2, 3)).power(0.5).logdet()

    hessian = jax.jit(jax.hessian(total))(jnp.eye(3))
    assert jnp.all(jnp.isfinite(hessian))


@functools.partial(jax.jit, static_argnums=0)
def projections(sizes, G, x, weights):
    """Projections of G; and of G + I, with products that should give x again."""
    matrix = BlockMeanMatrix.project(G, sizes)
    of_G = matrix.Lambda, matrix.B, matrix.to_dense(), matrix.eigenvalues()
    definite = G + jnp.eye(len(G))
    matrix = BlockMeanMatrix.project(definite, sizes)
    y, root = matrix.matvec(x), matrix.inverse_sqrt()
    xs = matrix.inverse().matvec(y), root.matvec(root.matvec(y))
    matrix = BlockMeanMatrix.project(definite, sizes, weights)
    dense, inverse = matrix.to_dense(weights), matrix.inverse().to_dense(weights)
    return of_G, xs, (dense, inverse, matrix.matvec(x, weights))


@st.composite
def partitions_and_matrices(draw):
    # Few partitions, so that the functions are compiled a few times.
    sizes = draw(st.sampled_from([(5,), (1, 1, 1), (3, 1, 5, 2, 2)]))
    seed = draw(st.integers(0, 2**32 - 1))
    d, rng = sum(sizes), np.random.default_rng(seed)
    A = rng.standard_normal((d, draw(st.integers(1, d))))
    G, x = A @ A.T, rng.standard_normal(d)
    weights = rng.uniform(0.5, 2, d) * rng.choice([-1, 1], d)
    found = jax.device_get(projections(sizes, G, x, weights))
    return sizes, rng, (G, x, weights), found


@given(partitions_and_matrices())
def test_projection_is_block_means(drawn):
    sizes, _, (G, *_), ((Lambda, B, *_), *_) = drawn
    bounds = np.cumsum([0, *sizes])
    for i, s in enumerate(sizes):
        rows = slice(bounds[i], bounds[i + 1])
        block = G[rows, rows]
        off = (block.sum() - np.trace(block)) / (s * (s - 1)) if s > 1 else 0.0
        np.testing.assert_allclose(B[i, i], off, atol=1e-11)
        diagonal = np.trace(block) / s - off
        np.testing.assert_allclose(Lambda[i], diagonal, atol=1e-11)
        for j in range(len(sizes)):
            if i != j:
                mean = G[rows, bounds[j] : bounds[j + 1]].mean()
                np.testing.assert_allclose(B[i, j], mean, atol=1e-11)


@given(partitions_and_matrices())
def test_projection_is_optimal_and_keeps_definiteness(drawn):
    sizes, rng, (G, *_), ((Lambda, B, dense, eigenvalues), *_) = drawn
    best = np.linalg.norm(G - dense)
    for scale in (1e-3, 1e-1, 1.0):
        d_B = rng.standard_normal((len(sizes),) * 2) * scale
        d_Lambda = rng.standard_normal(len(sizes)) * scale
        other = dense_of(Lambda + d_Lambda, B + d_B + d_B.T, sizes)
        assert np.linalg.norm(G - other) >= best - 1e-10
    assert eigenvalues[0] >= -1e-12 * eigenvalues[-1]


@given(partitions_and_matrices())
def test_inverse_is_an_inverse(drawn):
    _, _, (_, x, _), (_, found, _) = drawn
    for same in found:
        np.testing.assert_allclose(same, x, atol=1e-9)


@given(partitions_and_matrices())
def test_weighted_block_means(drawn):
    """E's columns are the weights of each block, scaled to unit length."""
    sizes, _, (G, x, weights), (_, _, (found, inverse, product)) = drawn
    definite = G + np.eye(len(G))
    E = expansion(sizes) * weights[:, None]
    E = E / np.linalg.norm(E, axis=0)
    M = E.T @ definite @ E
    traces = expansion(sizes).T @ np.diag(definite)
    s = np.asarray(sizes)
    Lambda = np.where(s > 1, (traces - np.diag(M)) / np.maximum(s - 1, 1), 1.0)
    dense = np.diag(np.repeat(Lambda, sizes)) @ (np.eye(len(G)) - E @ E.T)
    dense = dense + E @ M @ E.T
    np.testing.assert_allclose(found, dense, atol=1e-10)
    np.testing.assert_allclose(product, dense @ x, atol=1e-9)
    np.testing.assert_allclose(inverse @ dense, np.eye(len(G)), atol=1e-8)


def test_integer_powers_of_an_indefinite_matrix():
    Lambda, B = np.array([-2.0, 0.5, 1.0]), -np.ones((3, 3)) / 3
    matrix = BlockMeanMatrix.from_expansions(Lambda, B, (2, 3, 1))
    dense = dense_of(Lambda, B, (2, 3, 1))
    assert np.linalg.eigvalsh(dense)[0] < 0
    for p, expected in [(-1, np.linalg.inv(dense)), (3, dense @ dense @ dense)]:
        check_close(matrix.power(p).to_dense(), expected, p)


def test_a_batch_is_each_of_its_matrices():
    @jax.jit
    def parts(Lambda, B):
        m = BlockMeanMatrix.from_expansions(Lambda, B, sizes)
        root = m.inverse_sqrt().M
        return m.Lambda, m.M, m.B, m.correction, root, m.logdet(), m.trace()

    sizes, count = (2, 3), 3
    pairs = [pair(sizes, seed) for seed in range(count)]
    Lambda, B = (np.stack(x) for x in zip(*pairs, strict=True))
    batch = jax.device_get(parts(Lambda, B))
    for i, one in enumerate(pairs):
        for found, expected in zip(batch, parts(*one), strict=True):
            np.testing.assert_allclose(found[i], expected)


def test_no_method_builds_a_dense_matrix():
    sizes = (300_000, 200_000, 1)
    matrix = BlockMeanMatrix.from_expansions(
        jnp.array([1.0, 2.0, 3.0]), jnp.full((3, 3), 0.1), sizes
    )
    d = sum(sizes)

    def everything(m, x):
        y = m.inverse().matvec(m.inverse_sqrt().matvec(m.power(0.3).matvec(x)))
        return y.sum() + m.eigenvalues().sum() + m.logdet() + m.trace() + m.B.sum()

    jaxpr = jax.make_jaxpr(everything)(matrix, jnp.ones(d))
    shapes = [v.aval.shape for eqn in jaxpr.eqns for v in eqn.outvars]
    assert max(int(np.prod(shape)) for shape in shapes) <= 2 * d
    # XLA would fold running sums of constants: half a minute of compilation here.
    product = jax.make_jaxpr(lambda m, x: m.matvec(x))(matrix, jnp.ones(d))
    assert "cumsum" not in str(product)
    assert jnp.isfinite(jax.jit(everything)(matrix, jnp.ones(d)))


def test_float32_floor_is_what_eigh_resolves():
    """Eigenvalues of singular matrices are floored at what float32 resolves."""
    rng = np.random.default_rng(0)
    for L in (2, 5, 40, 200):
        A = rng.standard_normal((L, max(L // 2, 1))).astype(np.float32)

        @jax.jit
        def run(M):
            matrix = BlockMeanMatrix(jnp.ones(len(M), M.dtype), M, (2,) * len(M))
            root = matrix.inverse_sqrt(min_eigenvalue=0.0)
            return jnp.linalg.eigvalsh(M)[-1], jnp.linalg.eigvalsh(root.M)[-1]

        largest, found = run(np.float32(1e4) * A @ A.T)
        floor = 4 * np.sqrt(L) * np.finfo(np.float32).eps * float(largest)
        np.testing.assert_allclose(found, floor**-0.5, rtol=1e-2)


def test_determinant_sign():
    negative = BlockMeanMatrix(jnp.ones(2), jnp.diag(jnp.array([1.0, -1.0])), (2, 2))
    assert jnp.isnan(negative.logdet())
    singular = BlockMeanMatrix(jnp.zeros(2), jnp.eye(2), (1, 1))
    assert singular.logdet() == 0  # Λ does not matter in one-element blocks.


def test_one_element_block_with_zero_entry():
    @jax.jit
    def root(G):
        return BlockMeanMatrix.project(G, (1, 1)).power(0.5).to_dense()

    np.testing.assert_array_equal(root(np.diag([0.0, 4.0])), np.diag([0.0, 2.0]))


def test_one_matrix_at_a_time():
    batch = BlockMeanMatrix(
        jnp.ones((2, 2)), jnp.ones((2, 1, 1)) * jnp.eye(2)[None], (1, 2)
    )
    for call in (lambda m: m.matvec(jnp.ones(3)), lambda m: m.eigenvalues()):
        found = jax.jit(jax.vmap(call))(batch)
        np.testing.assert_array_equal(found, np.ones((2, 3)))


def test_leaves_may_be_other_things_than_arrays():
    matrix = BlockMeanMatrix.project(jnp.eye(3), (2, 1))
    dtypes = jax.tree.map(lambda x: x.dtype.name, matrix)
    assert jax.tree.leaves(dtypes) == ["float64", "float64"]


def test_a_derivative_is_linear_in_its_direction():
    rng = np.random.default_rng(0)
    M, A, B = rng.standard_normal((3, 3, 3))
    M, A, B = M @ M.T + np.eye(3), A + A.T, B + B.T

    @jax.jit
    def along(A):
        def root(M):
            return BlockMeanMatrix(jnp.ones(3), M, (2, 2, 2)).power(0.5).M

        return jax.jvp(root, (jnp.asarray(M),), (A,))[1]

    _, derivative = jax.jvp(along, (jnp.asarray(A),), (jnp.asarray(B),))
    np.testing.assert_allclose(derivative, along(jnp.asarray(B)), atol=1e-12)


def test_is_a_pytree_with_static_sizes():
    matrix = BlockMeanMatrix.project(jnp.eye(3), [1, 2])
    leaves, treedef = jax.tree.flatten(matrix)
    assert len(leaves) == 2
    assert treedef.unflatten(leaves).sizes == (1, 2)
    doubled = jax.tree.map(lambda x: 2 * x, matrix)
    np.testing.assert_allclose(doubled.to_dense(), 2 * np.eye(3))
