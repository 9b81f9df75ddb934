"""How far Newton-BMA goes along a direction: step rule, masks, loops, derivatives."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from quadratics import (
    D,
    dense_inverse,
    one_update,
    positive_definite,
    quadratic,
    trained,
    tree_of,
)
from reference import flat

import bma_optax as bma

pytestmark = pytest.mark.usefixtures("x64")


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
    stays, state = step(1.0, float("nan"))
    np.testing.assert_array_equal(stays["grad"], 0)
    assert state.backtracking == 0


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


# Arrays that stay ---------------------------------------------------------------------


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
