"""Newton-BMA's direction against float64 NumPy that builds the d x d matrices."""

import functools

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from quadratics import (
    PARAMS,
    D,
    dense_inverse,
    indefinite,
    one_update,
    operator_of,
    positive_definite,
    quadratic,
    tree_of,
)
from reference import RULES, flat

import bma_optax as bma

pytestmark = pytest.mark.usefixtures("x64")


# Weights ------------------------------------------------------------------------------


@settings(max_examples=6)
@given(st.integers(0, 2**20), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_weighted_projection_is_nearest(seed, sizes):
    rng = np.random.default_rng(seed)
    d = sum(sizes)
    G = positive_definite(seed, d)
    weights = rng.uniform(0.5, 2, d) * rng.choice([-1, 1], d)
    x = rng.standard_normal(d)

    @jax.jit
    def run(G, weights, x):
        matrix = bma.BlockMeanMatrix.project(G, sizes, weights)
        solved = matrix.inverse().matvec(x, weights)
        return matrix, matrix.to_dense(weights), solved

    matrix, dense, solved = run(G, weights, x)
    E = np.repeat(np.eye(len(sizes)), sizes, axis=0) * weights[:, None]
    E /= np.linalg.norm(E, axis=0)
    M = E.T @ G @ E
    np.testing.assert_allclose(matrix.M, M, rtol=1e-9, atol=1e-9 * np.abs(M).max())
    matrix = jax.device_get(matrix)
    expected = np.diag(np.repeat(matrix.Lambda, sizes))
    expected = expected @ (np.eye(d) - E @ E.T) + E @ M @ E.T
    scale = np.abs(expected).max()
    np.testing.assert_allclose(dense, expected, atol=1e-9 * scale)
    # Orthogonal to everything of this form, hence the nearest.
    residual = G - dense
    np.testing.assert_allclose(E.T @ residual @ E, 0, atol=1e-9 * scale)
    for i, s in enumerate(sizes):
        if s > 1:
            inside = np.repeat(np.arange(len(sizes)) == i, sizes)
            rest = np.diag(inside * 1.0) - np.outer(E[:, i], E[:, i])
            np.testing.assert_allclose(np.sum(residual * rest), 0, atol=1e-9 * scale)
    # A function of it, and products.
    np.testing.assert_allclose(dense @ solved, x, rtol=1e-6, atol=1e-6)


def test_partition_owns_the_weights():
    blocks = bma.partition(PARAMS, bma.per_unit)
    w, x = (tree_of(np.random.default_rng(i).standard_normal(D)) for i in range(2))
    y = np.arange(blocks.num_blocks, dtype=float)

    @jax.jit
    def run(w, x):
        labels = blocks.expand(jnp.asarray(y), x)
        weighted, filled = (jax.tree.map(jnp.multiply, a, w) for a in (x, labels))
        return labels, blocks.block_sums(weighted), filled

    labels, sums, filled = run(w, x)
    E = (flat(labels)[:, None] == y) * flat(w)[:, None]
    np.testing.assert_allclose(sums, E.T @ flat(x))
    np.testing.assert_allclose(flat(filled), E @ y)


def test_absolute_power_and_its_derivatives():
    G = indefinite(0, 6)
    sizes = (1,) * 6
    A, B = positive_definite(1, 6), positive_definite(2, 6)

    @jax.jit
    def power(t, u):
        matrix = bma.BlockMeanMatrix.project(jnp.asarray(G) + t * A + u * B, sizes)
        return matrix.power(-1, min_eigenvalue=0.3, absolute=True).to_dense()

    values, vectors = np.linalg.eigh(G)
    expected = (vectors / np.maximum(np.abs(values), 0.3)) @ vectors.T
    np.testing.assert_allclose(power(0.0, 0.0), expected, atol=1e-12)
    h = 1e-5
    first = jax.jvp(lambda t: power(t, 0.0), (0.0,), (1.0,))[1]
    np.testing.assert_allclose(
        first, (power(h, 0.0) - power(-h, 0.0)) / (2 * h), rtol=1e-5, atol=1e-6
    )

    @jax.jit
    def slope(u):
        return jax.jvp(lambda t: power(t, u), (0.0,), (1.0,))[1]

    second = jax.jvp(slope, (0.0,), (1.0,))[1]
    np.testing.assert_allclose(
        second, (slope(h) - slope(-h)) / (2 * h), rtol=1e-4, atol=1e-4
    )


# The direction ------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_operator_equals_the_dense_reference(rule):
    """Also for indefinite curvature, and where layers do not see each other."""
    definite, not_definite = positive_definite(0), indefinite(1)
    cases = [
        (definite, "all", 0.0),
        (definite, "all", 0.3),
        (not_definite, "all", 0.0),
    ]
    # Where a layer has several blocks of several arrays.
    if rule not in (bma.per_leaf, bma.per_layer, bma.per_element):
        cases.append((definite, "layer", 0.3))
    for G, couple, damping in cases:
        within = rule if couple == "all" else bma.within(couple, rule)
        C, floored = operator_of(within)(G, damping)
        expected = dense_inverse(G, rule, damping=damping, couple=couple)
        rtol, scale = (1e-8 if G is definite else 1e-7), np.abs(C).max()
        np.testing.assert_allclose(C, expected, rtol=rtol, atol=rtol / 10 * scale)
        np.testing.assert_allclose(C, C.T, atol=1e-12 * scale)
        assert np.linalg.eigvalsh(C)[0] > 0
        if rule == bma.per_element and damping == 0:
            if G is definite:
                np.testing.assert_allclose(C @ G, np.eye(D), atol=1e-8)
            else:
                assert floored == np.sum(np.linalg.eigvalsh(G) < 0) > 0


def test_indefinite_curvature_is_shown():
    tx = bma.scale_by_newton_bma(bma.per_element)
    _, state = one_update(tx, tree_of(np.zeros(D)), quadratic(indefinite(1)))
    assert bma.diagnostics(state)["coarse_ratio"] < 0


def test_newton_solves_a_quadratic_in_one_step():
    G, b = positive_definite(3), np.random.default_rng(0).standard_normal(D)
    f = quadratic(G, b)
    params = tree_of(np.ones(D))
    tx = optax.chain(bma.scale_by_newton_bma(bma.per_element), optax.scale(-1.0))
    updates, _ = one_update(tx, params, f)
    solution = flat(optax.apply_updates(params, updates))
    np.testing.assert_allclose(solution, np.linalg.solve(G, b), rtol=1e-7)


def test_dead_parameters_and_no_curvature_at_all():
    """A zero row of G, or G = 0, gives finite steps, and none for a zero gradient."""
    tx = bma.newton_bma(bma.per_tile((2,)))

    @jax.jit
    def step(bend):
        def f(x):
            return jnp.where(bend, x[0] ** 2, x[0] + 0 * x[1])

        x = jnp.ones(4)
        updates, _ = tx.update(jax.grad(f)(x), tx.init(x), x, value_fn=f)
        return updates, f(x), f(x + updates)

    for bend in (True, False):
        updates, before, after = jax.device_get(step(bend))
        assert np.all(np.isfinite(updates))
        np.testing.assert_array_equal(updates[2:], 0)
        assert after < before


# Curvatures ---------------------------------------------------------------------------

X = np.random.default_rng(5).standard_normal((7, 3))
LABELS = np.array([0, 1, 2, 1, 0, 2, 2])


def logits(w):
    return jnp.tanh(jnp.asarray(X) @ w)


def losses(w, labels=LABELS):
    return optax.softmax_cross_entropy_with_integer_labels(logits(w), labels)


def entropy(y, labels):
    return optax.softmax_cross_entropy_with_integer_labels(y, labels).mean()


def dense_of(curvature, w, value_fn=None, extra=None):
    extra = extra or {}
    basis = jnp.eye(w.size).reshape(w.size, *w.shape)

    @jax.jit
    def columns(w):
        product = curvature.linearize(w, jax.random.key(0), value_fn, extra)
        return jax.vmap(product)(basis)

    return np.asarray(columns(w)).reshape(w.size, w.size)


def test_every_curvature_against_its_explicit_matrix():
    w = jnp.asarray(np.random.default_rng(6).standard_normal((3, 3)))
    n, d = len(X), w.size
    J = np.asarray(jax.jit(jax.jacobian(logits))(w)).reshape(n * 3, d)
    outer = jax.hessian(lambda y: entropy(y.reshape(n, 3), jnp.asarray(LABELS)))
    H = np.asarray(jax.jit(outer)(logits(w).reshape(-1)))
    rows = np.asarray(jax.jit(jax.jacobian(losses))(w)).reshape(n, d)

    def mean(w):
        return losses(w).mean()

    hessian = np.asarray(jax.jit(jax.hessian(mean))(w)).reshape(d, d)
    labels = jnp.asarray(LABELS)
    cases = [
        (bma.Hessian(), mean, {}, hessian),
        (bma.GaussNewton(logits, entropy), None, {"labels": labels}, J.T @ H @ J),
        (
            bma.Fisher(
                logits,
                lambda key, y: labels,
                optax.softmax_cross_entropy_with_integer_labels,
            ),
            None,
            {},
            rows.T @ rows / n,
        ),
        (bma.Operator(lambda w: lambda v: 3 * v), None, {}, 3 * np.eye(d)),
    ]
    for curvature, value_fn, extra, expected in cases:
        got = dense_of(curvature, w, value_fn, extra)
        np.testing.assert_allclose(got, expected, atol=1e-12, err_msg=repr(curvature))
        np.testing.assert_allclose(got, got.T, atol=1e-12)


def test_sampled_fisher_is_unbiased():
    """Its mean over keys is the Gauss-Newton matrix, within its standard error."""
    w = jnp.asarray(np.random.default_rng(6).standard_normal((3, 3)))
    fisher = bma.Fisher(
        logits,
        jax.random.categorical,
        optax.softmax_cross_entropy_with_integer_labels,
    )
    basis = jnp.eye(9).reshape(9, 3, 3)

    @jax.jit
    @jax.vmap
    def sample(key):
        return jax.vmap(fisher.linearize(w, key, None, {}))(basis).reshape(9, 9)

    samples = np.asarray(sample(jax.random.split(jax.random.key(1), 2000)))
    labels = jnp.asarray(LABELS)  # The Hessian of the cross entropy has none in it.
    exact = dense_of(bma.GaussNewton(logits, entropy), w, extra={"labels": labels})
    error = samples.std(axis=0) / np.sqrt(len(samples))
    assert np.all(np.abs(samples.mean(axis=0) - exact) < 5 * error + 1e-12)


def test_diagonal_given_exact_and_probed():
    G = positive_definite(7)
    params = tree_of(np.zeros(D))
    f = quadratic(G)

    def inverse_diagonal(curvature):
        # Without blocks, the inverse of the diagonal and nothing else.
        tx = bma.scale_by_newton_bma(bma.by_path({"": None}), curvature=curvature)
        _, state = one_update(tx, params, f)
        return flat(state.inverse_diagonal), state.products

    exact, products = inverse_diagonal(bma.Hessian(num_probes=D))
    np.testing.assert_allclose(1 / exact, np.diag(G), rtol=1e-9)
    assert products == D
    given = bma.Operator(
        lambda p: lambda v: tree_of(jnp.asarray(G) @ ravel_pytree(v)[0]),
        diagonal_fn=lambda p: tree_of(np.diag(G)),
    )
    from_user, products = inverse_diagonal(given)
    np.testing.assert_allclose(1 / from_user, np.diag(G), rtol=1e-12)
    assert products == 0
    m = 20
    probed, products = inverse_diagonal(bma.Hessian(num_probes=m))
    assert products == m
    # The documented standard error, and the floor by it.
    error = np.sqrt((np.sum(G**2, axis=1) - np.diag(G) ** 2) / m)
    assert np.all(np.abs(1 / probed - np.diag(G)) < 5 * error)
    assert np.all(1 / probed > 0.3 * error)
    # More probes, less noise.
    finer, _ = inverse_diagonal(bma.Hessian(num_probes=D - 1))
    assert np.all(np.isfinite(finer))


# Refreshes, averages, damping, failures -----------------------------------------------


def moving(x, scale):
    return scale * jnp.sum(x**2) / 2 + jnp.sum(x) ** 2 / 2


@pytest.mark.parametrize(("b2", "new"), [(0.0, False), (0.9, True)])
def test_averages_draw_new_probes_and_nothing_else_does(b2, new):
    f, params = quadratic(positive_definite(7)), tree_of(np.zeros(D))
    tx = bma.scale_by_newton_bma(
        bma.by_path({"": None}),
        curvature=bma.Hessian(num_probes=8),
        update_interval=1,
        b2=b2,
    )
    state, found = jax.jit(tx.init)(params), []
    update = jax.jit(lambda s: tx.update(jax.grad(f)(params), s, params, value_fn=f))
    for _ in range(2):
        _, state = update(state)
        found.append(flat(state.inverse_diagonal))
    assert np.allclose(*found, rtol=1e-6) != new


def test_refreshes_every_interval_and_averages():
    params = jnp.arange(4.0)
    tx = bma.scale_by_newton_bma(update_interval=2, b2=0.9)
    state = jax.jit(tx.init)(params)
    update = jax.jit(functools.partial(tx.update, value_fn=moving))
    seen = []
    for scale in (1.0, 10.0, 3.0):
        _, state = update(params, state, params, scale=scale)
        seen.append(state)
    assert [int(s.refreshes) for s in seen] == [1, 1, 2]
    first, second, third = (s.N[0][0][0] for s in seen)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, [[4 * 1 + 16]])
    # Bias-corrected: (0.9 · 0.1 · first + 0.1 · last) / (1 - 0.9²).
    weight = 0.1 / 0.19
    np.testing.assert_allclose(third, [[(1 - weight) * 20 + weight * 28]])
    z2 = (1 - weight) * 2 + weight * 4
    M = third / (4 * z2)
    Lambda = (4 - M) / 3
    np.testing.assert_allclose(seen[2].Lambda, Lambda, rtol=1e-10)
    np.testing.assert_allclose(
        seen[2].inverse_diagonal, np.full(4, 1 / (Lambda[0, 0] * z2)), rtol=1e-10
    )


@jax.jit
def refreshes_of_a_bent_quadratic(params, bend):
    def f(params):
        x = ravel_pytree(params)[0]
        bent = bend * jnp.sum(jnp.sqrt(1 + (3 * x - 9) ** 2))
        return quadratic(positive_definite(2))(params) + bent

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(f)(params), state, params, value_fn=f)
        made, rule = state[0], state[2]
        found = made.refreshes, made.products, rule.model_error, rule.drift
        return (optax.apply_updates(params, updates), state), found

    tx = bma.newton_bma(bma.per_unit)
    return jax.lax.scan(step, (params, tx.init(params)), length=30)[1]


@pytest.mark.parametrize("bend", [0.0, 3.0])
def test_refreshes_where_the_curvature_has_changed(bend):
    """Once errors add up to a half and refreshes pay; a quadratic loss has only one."""
    refreshes, products, errors, drift = jax.device_get(
        refreshes_of_a_bent_quadratic(tree_of(np.ones(D)), bend)
    )
    expected, total = [1], errors[0]
    for k in range(1, 30):
        pays = products[k - 1] <= 4 * k or 10 * refreshes[k - 1] <= k
        stale = drift[k - 1] > 0.5 and pays
        expected.append(expected[-1] + int(stale))
        total = errors[k] + (0 if stale else total)
        np.testing.assert_allclose(drift[k], total, rtol=1e-6)
    np.testing.assert_array_equal(refreshes, expected)
    assert (refreshes[-1] == 1) == (bend == 0)


def test_refreshes_on_demand_and_every_tenth_step_with_a_rate():
    params = jnp.arange(4.0)
    tx = bma.scale_by_newton_bma(update_interval=None)
    state = jax.jit(tx.init)(params)
    update = jax.jit(functools.partial(tx.update, value_fn=moving))
    seen = []
    for scale, refresh in [(1.0, False), (10.0, False), (3.0, True)]:
        _, state = update(params, state, params, scale=scale, refresh=refresh)
        seen.append(int(state.refreshes))
    assert seen == [1, 1, 2]
    tx = bma.newton_bma(learning_rate=0.1)
    update = functools.partial(tx.update, value_fn=moving, scale=1.0)

    @jax.jit
    def eleven():
        def step(state, _):
            return update(params, state, params)[1], None

        return jax.lax.scan(step, tx.init(params), length=11)[0]

    assert eleven()[0].refreshes == 2
    tx = bma.newton_bma()  # Here the step rule asks for refreshes, and the user may.
    update = jax.jit(functools.partial(tx.update, value_fn=moving, scale=1.0))
    _, state = update(params, jax.jit(tx.init)(params), params, refresh=False)
    _, state = update(params, state, params, refresh=True)
    assert state[0].refreshes == 2 and state[2].drift == state[2].model_error


@jax.jit
def floored_of_two(off, damping):
    def f(x):  # M itself: 1 - off, 1 + off.
        return x @ x / 2 + off * x[0] * x[1]

    tx, x = bma.scale_by_newton_bma(bma.per_element, damping=damping), jnp.ones(2)
    return tx.update(jax.grad(f)(x), tx.init(x), x, value_fn=f)[1].floored


@pytest.mark.parametrize(
    ("off", "damping", "floored"), [(0.8, 1.0, 0), (0.8, 0.0, 0), (1.8, 0.5, 1)]
)
def test_damping_comes_before_the_floor(off, damping, floored):
    assert floored_of_two(off, damping) == floored


def test_last_good_factor_is_kept():
    params = jnp.arange(4.0)
    tx = bma.scale_by_newton_bma(update_interval=1)
    update = jax.jit(functools.partial(tx.update, value_fn=moving))
    first, state = update(params, jax.jit(tx.init)(params), params, scale=1.0)
    second, after = update(params, state, params, scale=jnp.nan)
    np.testing.assert_array_equal(first, second)
    assert after.failures == 1 and after.refreshes == 1
    # Before there is a good one it is the identity.
    third, after = update(params, jax.jit(tx.init)(params), params, scale=jnp.nan)
    np.testing.assert_array_equal(third, params)
    np.testing.assert_array_equal(after.Lambda, 1)


def test_damped_operator_needs_no_new_product():
    params, f = tree_of(np.zeros(D)), quadratic(positive_definite(0))

    @jax.jit
    def products(damping):
        tx = bma.scale_by_newton_bma(damping=damping)
        return tx.update(params, tx.init(params), params, value_fn=f)[1].products

    for damping in (0.0, 1.0):
        assert products(damping) == 3 + 4 + D


# Preconditioner -----------------------------------------------------------------------


def stiff():
    """Two stiff blocks, weakly tied: the coarse space has much to correct."""
    G = np.eye(D) * 1e-2 + np.kron(np.eye(2), np.ones((12, 12)))
    return G + 0.1 * np.ones((D, D))


def test_preconditioner_for_conjugate_gradients_on_pytrees():
    G = stiff()
    b = tree_of(np.random.default_rng(0).standard_normal(D))

    def product(v):
        return tree_of(jnp.asarray(G) @ ravel_pytree(v)[0])

    def matrix_of(**kwargs):
        def columns():
            C = bma.preconditioner(product, b, bma.per_layer, **kwargs)
            return jax.vmap(lambda e: ravel_pytree(C(tree_of(e)))[0])(jnp.eye(D))

        return np.asarray(jax.jit(columns)()).T

    C = jax.jit(lambda: bma.preconditioner(product, b, bma.per_layer))()
    x, _ = jax.jit(
        lambda C: jax.scipy.sparse.linalg.cg(product, b, M=C, tol=1e-10, maxiter=8)
    )(C)
    np.testing.assert_allclose(G @ flat(x), flat(b), atol=1e-8)
    exact = matrix_of(num_probes=D)
    expected = dense_inverse(G, bma.per_layer)
    for matrix in (exact, matrix_of(diagonal=tree_of(np.diag(G)))):
        np.testing.assert_allclose(matrix, expected, atol=1e-8 * np.abs(expected).max())
        np.testing.assert_allclose(matrix, matrix.T, atol=1e-12 * np.abs(matrix).max())
    assert np.linalg.eigvalsh(exact)[0] > 0


def test_lineax_operator():
    G = jnp.asarray(stiff())
    b = jnp.asarray(np.random.default_rng(0).standard_normal(D))
    C = jax.jit(lambda: bma.preconditioner(lambda v: G @ v, b, bma.per_tile((12,))))()
    operator = C.as_lineax()
    A = lineax.MatrixLinearOperator(G, lineax.positive_semidefinite_tag)
    solver = lineax.CG(rtol=1e-10, atol=1e-10)

    def solve(options):
        def run(b):
            found = lineax.linear_solve(A, b, solver, options=options)
            return found.value, found.stats["num_steps"]

        return jax.jit(run)(b)

    x, steps = solve({"preconditioner": operator})
    np.testing.assert_allclose(G @ x, b, atol=1e-7)
    assert steps < solve({})[1]
    x, y = b, jnp.flip(b)

    @jax.jit
    def products(x, y):
        by_matrix, transposed = operator.as_matrix() @ x, jax.linear_transpose(C, x)(y)
        mine = operator.mv(x), operator.transpose().mv(x), operator.T.mv(y)
        return mine, (by_matrix, *transposed), (C(x), C(y))

    (mv, transpose, other), (by_matrix, transposed), (Cx, Cy) = products(x, y)
    np.testing.assert_allclose(transpose, mv)
    np.testing.assert_allclose(y @ mv, x @ other, rtol=1e-10)
    np.testing.assert_allclose(transposed, Cy, rtol=1e-10)
    np.testing.assert_allclose(by_matrix, Cx, rtol=1e-9, atol=1e-9)


# Diagnostics --------------------------------------------------------------------------


def test_diagnostics():
    G = stiff()
    f = quadratic(G)
    params = tree_of(np.ones(D))
    tx = bma.newton_bma(bma.per_layer)
    _, state = one_update(tx, params, f)
    numbers = jax.jit(bma.diagnostics)(state)
    z = np.sqrt(np.diag(G))
    E = np.repeat(np.eye(2), (16, 8), axis=0) / np.sqrt((16, 8))
    M = E.T @ (G / np.outer(z, z)) @ E
    Lambda = (np.array([16, 8]) - np.diag(M)) / np.array([15, 7])
    np.testing.assert_allclose(
        numbers["coarse_ratio"], np.linalg.eigvalsh(M)[0] / np.median(Lambda), rtol=1e-6
    )
    assert numbers["products"] == 2 + 4 + D and numbers["step_products"] == 1
    assert numbers["failures"] == 0
