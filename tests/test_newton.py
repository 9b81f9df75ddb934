"""Newton-BMA and its parts against float64 NumPy that builds the d x d matrices."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from reference import RULES, newton_inverse

import bma_optax as bma

pytestmark = pytest.mark.usefixtures("x64")

PARAMS = {
    "a": {"bias": np.zeros(4), "kernel": np.zeros((3, 4))},
    "b": {"kernel": np.zeros((4, 2))},
}
D = 24


def tree_of(vector):
    return ravel_pytree(jax.tree.map(jnp.asarray, PARAMS))[1](jnp.asarray(vector))


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


def positive_definite(seed, d=D):
    """A correlated matrix whose diagonal entries have very different sizes."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((d, d)) + 1
    scale = 10 ** rng.uniform(-1, 1, d)
    return (A @ A.T / d + np.eye(d)) * np.outer(scale, scale)


def indefinite(seed, d=D):
    A = np.random.default_rng(seed).standard_normal((d, d))
    return A + A.T


def quadratic(G, b=None):
    b = np.zeros(len(G)) if b is None else b

    def f(params):
        x = ravel_pytree(params)[0]
        return x @ jnp.asarray(G) @ x / 2 - jnp.asarray(b) @ x

    return f


def elements():
    for keys, leaf in jax.tree_util.tree_leaves_with_path(PARAMS):
        path = tuple(key.key for key in keys)
        for index in itertools.product(*map(range, leaf.shape)):
            yield path, index


def dense_inverse(G, rule, *, damping=0.0, couple="all"):
    names = [RULES[rule](path, index) for path, index in elements()]
    blocks = sorted({n for n in names if n is not None}, key=str)
    labels = [-1 if n is None else blocks.index(n) for n in names]
    groups = None
    if couple == "layer":
        layers = {
            label: str(path[:-1])
            for label, (path, _) in zip(labels, elements(), strict=True)
        }
        groups = [layers[label] for label in range(len(blocks))]
    return newton_inverse(G, labels, groups, damping)


@functools.cache
def operator_of(rule):
    """C(G, damping) of one step, by columns; an array whose gradient is 0 stays."""
    params = tree_of(np.zeros(D))

    @jax.jit
    def matrix(G, damping):
        tx = bma.scale_by_newton_bma(rule, damping=damping, update_interval=1)
        update = functools.partial(tx.update, value_fn=quadratic(G))
        state = tx.init(params)

        def apply(vector):
            updates, new = update(tree_of_jax(vector), state, params)
            return ravel_pytree(updates)[0], new.floored

        images, floored = jax.vmap(apply)(1 + jnp.eye(D + 1, D))
        return (images[:D] - images[D:]).T, floored[0]

    return lambda G, damping=0.0: jax.device_get(matrix(G, damping))


def one_update(tx, params, f, grads=None):
    """The updates and the state after one jitted step from ``params``."""

    @jax.jit
    def step(params):
        g = jax.grad(f)(params) if grads is None else grads
        return tx.update(g, tx.init(params), params, value_fn=f)

    return step(params)


def trained(tx, f, params, steps):
    """The parameters after so many steps, in one program."""

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(f)(params), state, params, value_fn=f)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0]

    return run(params)


def tree_of_jax(vector):
    return ravel_pytree(jax.tree.map(jnp.asarray, PARAMS))[1](vector)


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


def fields(params):
    """A local quadratic of two fields on one grid, strongly coupled, and a scalar."""
    u, v, shift = (params[name] for name in ("u", "v", "shift"))
    smooth = sum(jnp.sum(jnp.diff(x) ** 2) + jnp.sum(x**2) / 10 for x in (u, v))
    return smooth + jnp.sum((u - v) ** 2 + (u - 1) ** 2) + jnp.sum((u + shift) ** 2)


@pytest.mark.parametrize(
    "solver",
    [
        bma.newton_bma(),
        bma.newton_bma(bma.per_element, 1.0, damping=0.5),
        bma.newton_bma(bma.per_tile((4,), reach=1), update_interval=1000),
        bma.natural_bma(
            bma.GaussNewton(lambda p: p, fields), partition=bma.per_unit, damping=0.0
        ),
    ],
    ids=["newton", "with a rate", "with a reach", "natural"],
)
def test_frozen_arrays_stay_and_the_others_minimise(solver):
    rng = np.random.default_rng(9)
    params = {name: jnp.asarray(rng.standard_normal(16)) for name in "uv"}
    params["shift"] = jnp.asarray(0.3)
    frozen = {"u": False, "v": True, "shift": False}
    tx = optax.chain(optax.masked(optax.set_to_zero(), frozen), solver)

    found = trained(tx, fields, params, 60)
    vector, tree = ravel_pytree(params)
    free = flat(
        {name: np.full(x.shape, not frozen[name]) for name, x in params.items()}
    )
    free = free.astype(bool)
    G = np.asarray(jax.jit(jax.hessian(lambda x: fields(tree(x))))(vector))
    g = np.asarray(jax.jit(jax.grad(lambda x: fields(tree(x))))(vector))
    expected = np.asarray(vector).copy()
    expected[free] -= np.linalg.solve(G[np.ix_(free, free)], g[free])
    np.testing.assert_array_equal(flat(found)[~free], expected[~free])
    np.testing.assert_allclose(flat(found), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_masks_after_the_optimiser(dtype):
    """A mask is found at the second step, and forgotten where it ends."""

    def f(p):
        a, b = p["a"].astype("float64"), p["b"].astype("float64")
        return jnp.sum(a**2 + b**2) / 2 + 0.9 * jnp.sum(a * b) - jnp.sum(a)

    start = {"a": jnp.zeros(2, dtype), "b": jnp.asarray([1.0, 0.0], dtype)}

    @jax.jit
    def train(masks):
        def step(carry, mask):
            params, state = carry
            updates, state = solver.update(
                jax.grad(f)(params), state, params, value_fn=f
            )
            updates = jax.tree.map(
                lambda on, u: jnp.where(on, u, 0),
                dict(zip("ab", mask, strict=True)),
                updates,
            )
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (start, solver.init(start)), masks)[0][0]

    solver = bma.newton_bma(bma.per_element)
    always, never = jnp.ones(30, bool), jnp.zeros(30, bool)
    odd = jnp.arange(30) % 2 == 1
    late = jnp.arange(30) > 9
    tolerance = max(1e-6, 4 * float(jnp.finfo(dtype).eps))
    masked = train(jnp.stack([always, never], 1))
    np.testing.assert_array_equal(masked["b"], start["b"])
    np.testing.assert_allclose(masked["a"], [0.1, 1.0], atol=tolerance)
    for a, b in [(always, always), (always, late), (odd, ~odd)]:
        found = train(jnp.stack([a, b], 1))
        np.testing.assert_allclose(found["a"], 1 / 0.19, rtol=10 * tolerance)
        np.testing.assert_allclose(found["b"], -0.9 / 0.19, rtol=10 * tolerance)


def test_an_array_whose_changes_cancel_is_not_masked():
    """From equal elements, one moves up by as much as the other moves down."""

    def f(p):
        difference = p["a"][0] - p["a"][1] - 0.4
        return difference**2 + 50 * difference**4 + jnp.sum((p["b"] - 1) ** 2)

    solver = bma.newton_bma()

    start = {"a": jnp.full(2, 1.5, "float32"), "b": jnp.zeros(3, "float32")}
    found = trained(solver, f, start, 20)
    assert f(found) < 1e-10


# The names are in one order, so that both share a program.
@pytest.mark.parametrize("names", ["ab", ("grad", "value")])
def test_an_array_that_waits_for_its_gradient_is_not_masked(names):
    """Also where the steps are scaled down; the names mean nothing."""
    first, second = names

    def f(p):
        a, b = p[first], p[second]
        return (a - 1) ** 2 + (a * jnp.sum(b) - 3) ** 2 + jnp.sum((b - 1) ** 2) * a**2

    solver = optax.chain(bma.newton_bma(), optax.scale(0.2))
    start = {first: jnp.zeros((), "float32"), second: jnp.zeros(3, "float32")}
    assert f(trained(solver, f, start, 60)) < 1e-6


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
        lambda p: lambda v: tree_of_jax(jnp.asarray(G) @ ravel_pytree(v)[0]),
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


# Steps --------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [bma.per_leaf, bma.per_unit])
def test_quadratic_model_is_preconditioned_conjugate_gradients(rule):
    G, b = positive_definite(8), np.random.default_rng(1).standard_normal(D)
    f = quadratic(G, b)
    tx = bma.newton_bma(partition=rule, update_interval=100)
    params = tree_of(np.zeros(D))
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(f)(params), state, params, value_fn=f)
        return optax.apply_updates(params, updates), state

    C = dense_inverse(G, rule)
    x, r = np.zeros(D), b.copy()
    y = C @ r
    p = y.copy()
    for _ in range(8):
        params, state = step(params, state)
        a = (r @ y) / (p @ G @ p)
        x, new = x + a * p, r - a * G @ p
        p = C @ new + (new @ C @ new) / (r @ y) * p
        r, y = new, C @ new
        np.testing.assert_allclose(flat(params), x, rtol=1e-5, atol=1e-7)
    assert bma.diagnostics(state)["step_products"] == 8


def test_nonlinear_losses_converge_untuned():
    """Losses on which a fixed rate of 1 diverges: cosh, log, and a saddle."""
    rng = np.random.default_rng(0)
    A, y = rng.standard_normal((30, 8)), rng.integers(0, 2, 30) * 2.0 - 1

    def boltzmann(u):
        return jnp.sum(jnp.diff(u) ** 2) * 8 + jnp.sum(jnp.cosh(u)) - 50 * u[3]

    def logistic(w):
        return jnp.sum(jnp.logaddexp(0, -y * (A @ w))) + 1e-3 * jnp.sum(w**2)

    def barrier(x):
        return jnp.sum(x) - jnp.sum(jnp.log(x)) + 5 * jnp.sum(x) ** 2

    def saddle(x):
        return jnp.sum((x**2 - 1) ** 2) + 0.1 * jnp.sum(x)

    for f, start in [
        (boltzmann, jnp.zeros(8)),
        (logistic, jnp.zeros(8)),
        (barrier, jnp.full(8, 1e-3)),
        (saddle, jnp.full(8, 0.01)),
    ]:
        tx = bma.newton_bma(bma.per_tile((4,)))

        def step(carry, _, tx=tx, f=f):
            params, state = carry
            updates, state = tx.update(jax.grad(f)(params), state, params, value_fn=f)
            params = optax.apply_updates(params, updates)
            return (params, state), f(params)

        run = jax.jit(
            lambda p, tx=tx, step=step: jax.lax.scan(step, (p, tx.init(p)), length=60)
        )
        (params, _), values = run(start)
        grad = jax.jit(jax.grad(f))
        assert np.linalg.norm(grad(params)) < 1e-6 * np.linalg.norm(grad(start))
        assert np.all(np.diff(values) <= 1e-12 * np.abs(values[:-1]))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_loop_of_optax_for_lbfgs_takes_the_same_steps(dtype):
    """As its documentation has it, but for the solver; the first step is shortened."""

    def f(x):
        return jnp.sum(jnp.sqrt(1 + x**2)) + jnp.sum(x) ** 2 / 100

    solver = bma.newton_bma(bma.per_tile((4,)))
    value_and_grad = optax.value_and_grad_from_state(f)

    @jax.jit
    def step(params, opt_state):
        value, grad = value_and_grad(params, state=opt_state)
        updates, opt_state = solver.update(
            grad, opt_state, params, value=value, grad=grad, value_fn=f
        )
        return optax.apply_updates(params, updates), opt_state

    @jax.jit
    def plain(params, state):
        updates, state = solver.update(jax.grad(f)(params), state, params, value_fn=f)
        return optax.apply_updates(params, updates), state

    params = expected = jnp.linspace(-5, 4, 8, dtype=dtype)
    opt_state = state = jax.jit(solver.init)(params)
    evaluate, kept = jax.jit(jax.value_and_grad(f)), []
    for _ in range(6):
        (params, opt_state), (expected, state) = (
            step(params, opt_state),
            plain(expected, state),
        )
        rtol = 1e-3 if dtype == "float32" else 1e-7
        np.testing.assert_allclose(params, expected, rtol=rtol, atol=rtol / 100)
        stored, whole = opt_state[2], opt_state[2].backtracking == 1
        kept.append(bool(whole))
        assert jnp.isfinite(stored.value) == whole
        if whole:
            value, grad = evaluate(params)
            np.testing.assert_allclose(stored.value, value, rtol=1e-6)
            np.testing.assert_allclose(stored.grad, grad, rtol=1e-4, atol=1e-5)
    assert not kept[0] and kept[-1]


def test_the_loop_of_optax_with_a_mask_after_the_solver():
    """What is stored belongs to the parameters, from the first masked step on."""

    def f(p):
        return jnp.sum(jnp.cosh(p["a"] - 1)) + jnp.sum((p["a"] + p["b"]) ** 2)

    solver = bma.newton_bma()
    mask = optax.masked(optax.set_to_zero(), {"a": False, "b": True})

    @jax.jit
    def step(params, state):
        value, grad = optax.value_and_grad_from_state(f)(params, state=state)
        updates, state = solver.update(
            grad, state, params, value=value, grad=grad, value_fn=f
        )
        updates, _ = mask.update(updates, mask.init(params))
        return optax.apply_updates(params, updates), state, (value, grad)

    params = {"a": jnp.linspace(-1, 2, 3), "b": jnp.ones(3)}
    state, evaluate = jax.jit(solver.init)(params), jax.jit(jax.value_and_grad(f))
    for _ in range(5):
        expected = evaluate(params)
        params, state, used = step(params, state)
        chex.assert_trees_all_close(used, expected, rtol=1e-6, atol=1e-9)
    assert jnp.isfinite(optax.tree.get(state, "value"))


def test_value_and_gradient_are_used_as_they_are_given():
    G, x = jnp.diag(jnp.arange(1.0, 5.0)), jnp.ones(4)
    tx = bma.scale_by_quadratic_model()
    trees = {"value": x, "grad": x}  # These names are arrays here, and keywords below.

    def f(params):
        return sum(x @ G @ x / 2 for x in jax.tree.leaves(params))

    @jax.jit
    def step(factor, drop):
        value, grad = jax.value_and_grad(f)(trees)
        given = {
            "value": value - drop,
            "grad": jax.tree.map(lambda g: factor * g, grad),
        }
        direction = jax.tree.map(jnp.negative, grad)
        return tx.update(direction, tx.init(trees), trees, value_fn=f, **given)

    whole, half = step(1.0, 0.0), step(0.5, 0.0)
    np.testing.assert_allclose(half[0]["value"], whole[0]["value"] / 2)
    refused, state = step(1.0, 100.0)
    np.testing.assert_array_equal(refused["grad"], 0)
    assert state.backtracking == 0 and jnp.isinf(state.value)


def test_a_step_that_the_model_missed_is_forgotten():
    """Its product is the mean Hessian along it, which a quadratic model can trust."""

    def step(f, x):
        tx = bma.scale_by_quadratic_model()
        grad = jax.grad(f)(x)
        return tx.update(-grad, tx.init(x), x, value_fn=f)[1]

    x = jnp.array([1.0, 0.5])
    kept = jax.jit(functools.partial(step, lambda x: jnp.sum(x**2 + 0.1 * x**3)))(x)
    assert 0.01 < kept.model_error < 0.5

    def slope(x):
        return 2 * x + 0.3 * x**2

    product = slope(x + kept.previous_step) - slope(x)
    np.testing.assert_allclose(kept.previous_product, product, rtol=1e-12)
    lost = jax.jit(functools.partial(step, lambda x: jnp.sum(jnp.abs(x) ** 1.1)))(x)
    assert lost.model_error > 0.5
    np.testing.assert_array_equal(lost.previous_step, 0)
    np.testing.assert_array_equal(lost.previous_product, 0)


def test_step_norm_limit():
    f = quadratic(positive_definite(0), 100 * np.ones(D))
    params = tree_of(np.zeros(D))
    for rate in (None, 1.0):
        tx = bma.newton_bma(learning_rate=rate, max_norm=0.25)
        updates, _ = one_update(tx, params, f)
        np.testing.assert_allclose(np.linalg.norm(flat(updates)), 0.25)


def test_a_shortened_step_and_what_is_said_of_it():
    """A limit shortens both parts; too flat a model is met by backtracking."""
    G = jnp.diag(jnp.arange(1.0, 5.0))
    params, direction, previous = jax.random.normal(jax.random.key(0), (3, 4))

    def f(x):
        return x @ G @ x / 2

    def step(curvature, previous, **kwargs):
        tx = bma.scale_by_quadratic_model(curvature, **kwargs)
        state = jax.jit(tx.init)(params)._replace(
            previous_step=previous, previous_product=G @ previous
        )
        return jax.jit(functools.partial(tx.update, value_fn=f))(
            direction, state, params
        )

    free, _ = step(bma.Hessian(), previous)
    limit = jnp.linalg.norm(free) / 3
    updates, state = step(bma.Hessian(), previous, max_norm=limit)
    np.testing.assert_allclose(updates, free / 3)
    parts = state.learning_rate * direction + state.momentum * previous
    np.testing.assert_allclose(parts, updates)
    flat = bma.Operator(lambda p: lambda v: G @ v / 4)
    updates, state = step(flat, jnp.zeros(4))
    best = -(direction @ G @ params) / (direction @ G @ direction)
    np.testing.assert_allclose(updates, best * direction)
    np.testing.assert_allclose(state.backtracking, 0.25)


@pytest.mark.parametrize("taken", [1.0, 1e-1, 1e-11, 0.0])
def test_twelve_trials_where_the_loss_has_an_edge(taken):
    """Beyond it the loss is not a number, so that each trial is a tenth of the last."""
    edge = 1.5 * (taken or 1e-12)

    def f(x):
        return jnp.sum(jnp.where(1 - x <= edge, x, jnp.nan))

    params = jnp.ones(1)
    tx = bma.scale_by_quadratic_model(bma.Operator(lambda p: lambda v: v))
    updates, state = one_update(tx, params, f, -params)
    np.testing.assert_allclose(updates, -taken)
    np.testing.assert_allclose(state.backtracking, taken)


def test_refuses_a_step_that_never_descends():
    """The loss is finite only where it starts: the step is zero."""

    def f(x):
        return jnp.where(jnp.sum(x) == 3, jnp.sum(x), jnp.nan)

    params = jnp.ones(3)
    tx = bma.scale_by_quadratic_model(bma.Operator(lambda p: lambda v: v))
    updates, state = one_update(tx, params, f, -params)
    np.testing.assert_array_equal(updates, 0)
    assert state.backtracking == 0


@pytest.mark.parametrize(
    "rule",
    [
        optax.chain(optax.trace(0.4), optax.scale(-0.5)),
        optax.chain(optax.scale(-1.0), optax.scale_by_backtracking_linesearch(20)),
        optax.chain(optax.scale(-1.0), optax.scale_by_zoom_linesearch(20)),
        optax.scale_by_learning_rate(optax.exponential_decay(0.7, 50, 0.9)),
    ],
    ids=["heavy ball", "backtracking", "zoom", "schedule"],
)
def test_composes_with_optax(rule):
    G, b = positive_definite(9), np.random.default_rng(1).standard_normal(D)
    f = quadratic(G, b)
    tx = optax.chain(bma.scale_by_newton_bma(bma.per_element), rule)
    params = tree_of(np.zeros(D))
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params, state):
        value, grad = jax.value_and_grad(f)(params)
        updates, state = tx.update(
            grad, state, params, value=value, grad=grad, value_fn=f
        )
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):
        for _ in range(20):
            params, state = step(params, state)
    optimum = -b @ np.linalg.solve(G, b) / 2
    assert f(params) - optimum < 1e-3 * -optimum


def test_gradient_through_steps_equals_differences():
    """Derivatives pass refreshes, probes, absolute eigenvalues and the step rule."""
    G, b = positive_definite(10, 10), np.ones(10)

    def after(log_scale):
        def f(params):
            x = ravel_pytree(params)[0]
            bend = jnp.exp(log_scale) * jnp.sum(jnp.log1p(x**2))
            return quadratic(G, b)(params) + bend

        tx = bma.newton_bma(update_interval=2)
        params = {"bias": jnp.zeros(4), "kernel": jnp.zeros((2, 3))}

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(f)(params), state, params, value_fn=f)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=3)
        return f(params)

    h = 1e-5
    (right, _), (left, _), (_, slope) = map(
        jax.jit(jax.value_and_grad(after)), (0.5 + h, 0.5 - h, 0.5)
    )
    np.testing.assert_allclose(slope, (right - left) / (2 * h), rtol=1e-5)


# Preconditioner -----------------------------------------------------------------------


def stiff():
    """Two stiff blocks, weakly tied: the coarse space has much to correct."""
    G = np.eye(D) * 1e-2 + np.kron(np.eye(2), np.ones((12, 12)))
    return G + 0.1 * np.ones((D, D))


def test_preconditioner_for_conjugate_gradients_on_pytrees():
    G = stiff()
    b = tree_of(np.random.default_rng(0).standard_normal(D))

    def product(v):
        return tree_of_jax(jnp.asarray(G) @ ravel_pytree(v)[0])

    def matrix_of(**kwargs):
        def columns():
            C = bma.preconditioner(product, b, bma.per_layer, **kwargs)
            return jax.vmap(lambda e: ravel_pytree(C(tree_of_jax(e)))[0])(jnp.eye(D))

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
