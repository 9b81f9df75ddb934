"""AdaGrad-BMA against an independent float64 reference, Optax and AdaGrad-Full."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import RULES, DenseAdaGradBMA, flat, labels_and_groups, random_tree

import bma_optax as bma


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("rule", "form", "mode"),
    [(rule, form, "jit") for rule in RULES for form in ("left", "symmetric")]
    + [(bma.per_leaf, "left", "eager"), (bma.per_unit, "symmetric", "eager")],
    ids=str,
)
def test_steps_equal_the_dense_reference(rule, form, mode):
    """Fifty steps; five without jit, where a step compiles hundreds of programs."""
    rng = np.random.default_rng(0)
    tx = bma.scale_by_bma(rule, form=form, eps=0.3, min_eigenvalue=1e-3)
    update = jax.jit(tx.update) if mode == "jit" else tx.update
    labels, groups = labels_and_groups(RULES[rule], "all")
    dense = DenseAdaGradBMA(labels, groups, eps=0.3, floor=1e-3, form=form)
    state = jax.jit(tx.init)(random_tree(rng))
    steps = 50 if mode == "jit" else 5
    for _ in range(steps):
        g = random_tree(rng)
        updates, state = update(g, state)
        np.testing.assert_allclose(flat(updates), dense.update(flat(g)), atol=1e-8)
    assert state.failures == 0 and state.count == steps


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("couple", ["array", "layer"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_coupled_groups_equal_the_dense_reference(rule, couple):
    rng = np.random.default_rng(1)
    within = bma.within(couple, rule)
    tx = bma.scale_by_bma(
        within, initial_accumulator_value=0.3, eps=1e-3, estimator="report"
    )
    labels, groups = labels_and_groups(RULES[rule], couple)
    dense = DenseAdaGradBMA(labels, groups, initial=0.3, eps=1e-3, form="left")
    state = jax.jit(tx.init)(random_tree(rng))
    update = jax.jit(tx.update)
    for _ in range(10):
        g = random_tree(rng)
        updates, state = update(g, state)
        np.testing.assert_allclose(flat(updates), dense.update(flat(g)), atol=1e-8)


@pytest.mark.parametrize("initial", [0.0, 0.1])
def test_one_block_is_scale_by_rss(initial):
    rng = np.random.default_rng(2)
    params = jnp.zeros((4, 3))
    mine = bma.scale_by_bma(initial_accumulator_value=initial, eps=1e-5)
    theirs = optax.scale_by_rss(initial, eps=1e-5)
    my_state, their_state = jax.jit(mine.init)(params), jax.jit(theirs.init)(params)
    update, their_step = jax.jit(mine.update), jax.jit(theirs.update)
    for _ in range(5):
        g = jnp.asarray(rng.standard_normal((4, 3)), jnp.float32)
        my_update, my_state = update(g, my_state)
        their_update, their_state = their_step(g, their_state)
        np.testing.assert_allclose(my_update, their_update, rtol=1e-6)
    np.testing.assert_allclose(
        my_state.sum_of_squares, their_state.sum_of_squares, rtol=1e-6
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("eps", [0.0, 0.5])
@pytest.mark.parametrize("form", ["left", "symmetric"])
def test_one_element_blocks_are_full_matrix_adagrad(form, eps):
    rng = np.random.default_rng(3)
    d = 6
    tx = bma.scale_by_bma(bma.per_element, eps=eps, min_eigenvalue=0.0, form=form)
    state, update = jax.jit(tx.init)(jnp.zeros(d)), jax.jit(tx.update)
    H = eps * np.eye(d)
    for step in range(20):
        g = rng.standard_normal(d)
        H += np.outer(g, g)
        updates, state = update(jnp.asarray(g), state)
        if step < d:
            continue  # H is singular.
        z = np.sqrt(np.diag(H))
        values, vectors = np.linalg.eigh(H / np.outer(z, z))
        root = (vectors * values**-0.5) @ vectors.T
        expected = root @ (g / z)
        if form == "symmetric":
            expected = (root @ (g / np.sqrt(z))) / np.sqrt(z)
        np.testing.assert_allclose(updates, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("form", "floor", "eps"),
    [("left", 1e-2, 0.0), ("left", 1.0, 1e-7), ("symmetric", 1e-2, 1e-7)],
)
def test_derivative_at_repeated_and_floored_eigenvalues(form, floor, eps):
    """The first gradient makes every entry of M ± 1, so that eigenvalues repeat."""
    tx = bma.scale_by_bma(bma.per_element, form=form, eps=eps, min_eigenvalue=floor)
    rng = np.random.default_rng(5)
    given, along = rng.standard_normal((2, 3, 6)) * [1, 1, 1, 1, 1, 0]
    wanted = rng.standard_normal(6)

    @jax.jit
    @jax.value_and_grad
    def after(t):
        state, total = tx.init(jnp.zeros(6)), 0.0
        for g in given + t * along:
            updates, state = tx.update(g, state)
            total += jnp.vdot(updates, wanted)
        return total

    step = 1e-6
    (right, _), (left, _), (_, slope) = map(after, (step, -step, 0.0))
    expected = (right - left) / (2 * step)
    assert abs(expected) > 0.1
    np.testing.assert_allclose(slope, expected, rtol=1e-6)


@pytest.mark.parametrize("initial", [0.0, 0.5])
@pytest.mark.parametrize("form", ["left", "symmetric"])
def test_an_element_without_gradients_does_not_move(form, initial):
    """Rows of an embedding that no example has used stay where they are."""
    rng = np.random.default_rng(4)
    params = {"embed": jnp.zeros((6, 4)), "w": jnp.zeros((3, 2))}
    tx = bma.scale_by_bma(bma.per_column, form=form, initial_accumulator_value=initial)
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    used = np.array([1, 1, 0, 0, 1, 1])[:, None]
    for _ in range(5):
        g = {
            "embed": jnp.asarray((rng.standard_normal((6, 4)) + 1) * used, "float32"),
            "w": jnp.asarray(rng.standard_normal((3, 2)) + 1, "float32"),
        }
        updates, state = update(g, state)
        moved = np.asarray(updates["embed"]) != 0
        np.testing.assert_array_equal(moved, np.broadcast_to(used, (6, 4)))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("form", ["left", "symmetric"])
def test_a_gradient_that_is_not_finite_hurts_only_itself(bad, form):
    rng = np.random.default_rng(5)
    tx = bma.scale_by_bma(form=form)

    def gradient():
        return {k: np.asarray(rng.standard_normal(3) + 1, np.float32) for k in "abc"}

    state, update = jax.jit(tx.init)(gradient()), jax.jit(tx.update)
    for _ in range(3):
        _, state = update(gradient(), state)
    g = gradient()
    g["b"][1] = bad
    updates, after = update(g, state)
    finite = jax.tree.map(np.isfinite, updates)
    assert finite["a"].all() and finite["c"].all()
    np.testing.assert_array_equal(finite["b"], [True, False, True])
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(after))
    # The statistics are those of the step without that element and that block.
    old, new = jax.device_get((state, after))
    assert new.sum_of_squares["b"][1] == old.sum_of_squares["b"][1]
    assert new.U[1, 1] == old.U[1, 1] and new.U[0, 0] > old.U[0, 0]
    updates, _ = update(gradient(), after)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(updates))


@pytest.mark.parametrize("eps", [0.0, 1e-7])
def test_finite_gradients_give_finite_updates(eps):
    params = {"a": jnp.zeros((50, 4)), "b": jnp.zeros(3)}
    tx = bma.scale_by_bma(bma.per_column, eps=eps)
    update = jax.jit(tx.update)
    for magnitude in (1e-30, 1e-12, 1e15, 1e19, 1e25, 3e38):
        rng, state = np.random.default_rng(6), jax.jit(tx.init)(params)
        for _ in range(3):
            g = jax.tree.map(
                lambda p, rng=rng, magnitude=magnitude: np.asarray(
                    np.clip(rng.uniform(-1, 1, p.shape) * magnitude, -3e38, 3e38),
                    np.float32,
                ),
                params,
            )
            updates, state = update(g, state)
            assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(updates))
        assert state.failures == 0


def test_last_good_root_is_used_when_a_factorisation_fails():
    rng = np.random.default_rng(7)
    params = {"a": jnp.zeros(4), "b": jnp.zeros(4), "c": jnp.zeros(4)}
    tx = bma.scale_by_bma()
    state = jax.jit(tx.init)(params)
    g = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(4) + 1, p.dtype), params)
    update = jax.jit(tx.update)
    _, state = update(g, state)
    U = np.array(state.U)
    U[0, 1] = U[1, 0] = np.nan
    updates, after = update(g, state._replace(U=U))
    assert after.failures == 1
    np.testing.assert_array_equal(after.inverse_root, state.inverse_root)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(updates))


def test_singular_matrix_of_a_softmax_layer():
    """Its gradients sum to zero over units, so that M always has the eigenvalue 0."""
    rng = np.random.default_rng(8)
    tx = bma.scale_by_bma(bma.per_element, min_eigenvalue=0.0)
    state, update = jax.jit(tx.init)(jnp.zeros(5)), jax.jit(tx.update)
    for _ in range(30):
        g = rng.standard_normal(5)
        updates, state = update(jnp.asarray(g - g.mean(), jnp.float32), state)
        assert np.max(np.abs(updates)) < 10
    assert state.failures == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes(dtype):
    with jax.enable_x64(dtype == "float64"):
        params = {"a": jnp.ones((2, 3), dtype), "b": jnp.ones((), jnp.float32)}
        state = jax.eval_shape(bma.scale_by_bma().init, params)
        updates, new = jax.eval_shape(bma.scale_by_bma().update, params, state)
        statistic = "float64" if dtype == "float64" else "float32"
        assert updates["a"].dtype == dtype and updates["b"].dtype == jnp.float32
        assert new.sum_of_squares["a"].dtype == statistic
        assert new.sum_of_squares["b"].dtype == jnp.float32
        assert new.U.dtype == new.v.dtype == new.inverse_root.dtype == statistic
        assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)


@pytest.mark.parametrize(
    "params",
    [
        {},
        None,
        {"a": None, "b": jnp.ones(2)},
        {"a": jnp.zeros((0, 3)), "b": jnp.ones(2)},
        {"a": jnp.ones(()), "b": optax.MaskedNode()},
        jnp.ones(()),
    ],
    ids=str,
)
def test_trees_with_little_in_them(params):
    tx = bma.scale_by_bma()
    state = jax.jit(tx.init)(params)
    updates, new = jax.jit(tx.update)(params, state)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(updates))


def test_dead_blocks():
    tx = bma.scale_by_bma()
    params = {"a": jnp.ones(3), "dead": jnp.ones(2), "c": jnp.ones(2)}
    g = params | {"dead": jnp.zeros(2)}
    update = jax.jit(tx.update)
    updates, state = update(g, jax.jit(tx.init)(params))
    assert jnp.all(updates["dead"] == 0) and jnp.all(updates["a"] != 0)
    without = {"a": g["a"], "c": g["c"]}
    expected, _ = update(without, jax.jit(tx.init)(without))
    np.testing.assert_allclose(updates["a"], expected["a"], rtol=1e-6)


def test_complex_parameters_by_optax_wrapper():
    tx = optax.contrib.split_real_and_imaginary(bma.scale_by_bma())
    params = {"a": jnp.array([1 + 2j, 3 - 1j]), "b": jnp.ones(2)}
    with jax.numpy_dtype_promotion("standard"):  # Optax's wrapper multiplies by 1j.
        updates, _ = jax.jit(tx.update)(params, jax.jit(tx.init)(params))
    assert updates["a"].dtype == params["a"].dtype
    assert np.all(np.isfinite(updates["a"]))


PARAMS = {"layer": {"w": jnp.ones((2, 2))}}


def test_a_shared_counter_keeps_the_branch_under_vmap():
    tx = bma.scale_by_bma(bma.per_element, update_interval=3)
    grads = jnp.asarray(np.random.default_rng(0).standard_normal((4, 2, 3)))
    states = [jax.jit(tx.init)(grads[0, 0]) for _ in range(2)]
    axes = bma.ScaleByBMAState(*[None, *[0] * 5])
    together = jax.tree.map(
        lambda axis, *x: x[0] if axis is None else jnp.stack(x),
        axes,
        *states,
        is_leaf=lambda x: x is None,
    )
    batched = jax.vmap(tx.update, (0, axes), (0, axes))
    branches = [
        str(jax.make_jaxpr(f)(*arguments)).count(" cond[")
        for f, arguments in (
            (batched, (grads[0], together)),
            (tx.update, (grads[0, 0], states[0])),
        )
    ]
    assert branches[0] == branches[1] > 0
    update, updates_of_both = jax.jit(tx.update), jax.jit(batched)
    for g in grads:
        updates, together = updates_of_both(g, together)
        for i in range(2):
            alone, states[i] = update(g[i], states[i])
            np.testing.assert_allclose(updates[i], alone, rtol=1e-5)
