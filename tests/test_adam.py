"""Adam-BMA against an independent float64 reference and Optax."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import (
    RULES,
    DenseAdaGradBMA,
    DenseAdamBMA,
    flat,
    labels_and_groups,
    random_tree,
)

import bma_optax as bma

SOME_RULES = [bma.per_layer, bma.per_unit, list(RULES)[-1]]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("estimator", ["report", "projection"])
@pytest.mark.parametrize("rule", SOME_RULES, ids=str)
def test_steps_equal_the_dense_reference(rule, estimator):
    rng = np.random.default_rng(0)
    decays = {"b1": 0.8, "b2": 0.95}
    tx = bma.scale_by_adam_bma(
        **decays,
        eps=0.1,
        eps_root=0.3,
        partition=rule,
        estimator=estimator,
        min_eigenvalue=1e-3,
    )
    update = jax.jit(tx.update)
    labels, groups = labels_and_groups(RULES[rule], "all")
    dense = DenseAdamBMA(
        labels,
        groups,
        **decays,
        eps=0.1,
        eps_root=0.3,
        floor=1e-3,
        estimator=estimator,
    )
    state = jax.jit(tx.init)(random_tree(rng))
    for _ in range(30):
        g = random_tree(rng)
        updates, state = update(g, state)
        np.testing.assert_allclose(flat(updates), dense.update(flat(g)), atol=1e-8)
    assert state.failures == 0 and state.count == 30


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["adagrad", "adam"])
def test_the_root_of_every_third_step_equals_the_dense_reference(name):
    rng = np.random.default_rng(3)
    factory, reference = {
        "adagrad": (bma.scale_by_bma, DenseAdaGradBMA),
        "adam": (bma.scale_by_adam_bma, DenseAdamBMA),
    }[name]
    tx = factory(partition=bma.per_unit, update_interval=3)
    labels, groups = labels_and_groups(RULES[bma.per_unit], "all")
    dense = reference(
        labels, groups, interval=3, eps=1e-7 if name == "adagrad" else 1e-8
    )

    def step(state, g):
        updates, state = tx.update(g, state)
        return state, updates

    trees = [random_tree(rng) for _ in range(8)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *trees)
    _, updates = jax.jit(lambda *args: jax.lax.scan(step, *args))(
        jax.jit(tx.init)(trees[0]), stacked
    )
    for i, g in enumerate(trees):
        update = jax.tree.map(lambda x, i=i: x[i], updates)
        np.testing.assert_allclose(flat(update), dense.update(flat(g)), atol=1e-8)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("couple", ["all", "layer", "block"])
@pytest.mark.parametrize("form", ["left", "symmetric"])
def test_projection_in_adagrad_equals_the_dense_reference(form, couple):
    rng = np.random.default_rng(1)
    tx = bma.scale_by_bma(
        bma.per_unit if couple == "all" else bma.within(couple, bma.per_unit),
        form=form,
        estimator="projection",
    )
    update = jax.jit(tx.update)
    labels, groups = labels_and_groups(RULES[bma.per_unit], couple)
    dense = DenseAdaGradBMA(
        labels, groups, form=form, estimator="projection", floor=1.0
    )
    state = jax.jit(tx.init)(random_tree(rng))
    for _ in range(10):
        g = random_tree(rng)
        updates, state = update(g, state)
        np.testing.assert_allclose(flat(updates), dense.update(flat(g)), atol=1e-8)


@pytest.mark.parametrize(
    ("rule", "kwargs"),
    [
        (bma.per_leaf, {}),
        (bma.by_path({"": None}), {"eps_root": 1e-3, "b2": 0.9}),
        (bma.per_leaf, {"mu_dtype": jnp.bfloat16, "b1": 0.5}),
    ],
    ids=["one block", "no blocks", "mu_dtype"],
)
def test_one_block_is_adamw(rule, kwargs):
    rng = np.random.default_rng(2)
    params = {"w": jnp.ones((4, 3))}
    both = kwargs | {"weight_decay": 0.1}
    mine = bma.adam_bma(0.1, **both, partition=rule, weight_decay_mask={"w": True})
    theirs = optax.adamw(0.1, **both)
    states = [jax.jit(mine.init)(params), jax.jit(theirs.init)(params)]
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes the dtypes of moments.
        updates = [jax.jit(tx.update) for tx in (mine, theirs)]
        for _ in range(5):
            g = {"w": jnp.asarray(rng.standard_normal((4, 3)), jnp.float32)}
            (a, states[0]), (b, states[1]) = (
                update(g, state, params)
                for update, state in zip(updates, states, strict=True)
            )
            np.testing.assert_allclose(a["w"], b["w"], rtol=1e-6, atol=1e-8)
    assert states[0][0].mu["w"].dtype == states[1][0].mu["w"].dtype
    np.testing.assert_allclose(states[0][0].nu["w"], states[1][0].nu["w"], rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_one_element_blocks_whiten_by_the_whole_matrix():
    """F^-½ with one block an element is the inverse root of the whole matrix."""
    rng = np.random.default_rng(3)
    b2, d = 0.9, 4
    tx = bma.scale_by_adam_bma(
        0.0, b2, 0.0, partition=bma.per_element, min_eigenvalue=0.0
    )
    update = jax.jit(tx.update)
    state, H = jax.jit(tx.init)(jnp.zeros(d)), np.zeros((d, d))
    steps = 20
    for _ in range(steps):
        g = rng.standard_normal(d)
        H = b2 * H + (1 - b2) * np.outer(g, g)
        updates, state = update(jnp.asarray(g), state)
    full = H / (1 - b2**steps)
    z = np.sqrt(np.diag(full))
    values, vectors = np.linalg.eigh(full / np.outer(z, z))
    expected = (vectors * values**-0.5) @ vectors.T @ (g / z)
    np.testing.assert_allclose(updates, expected, rtol=1e-7)


def test_block_means_can_only_shrink_at_floor_one():
    rng = np.random.default_rng(4)
    params = {"a": jnp.zeros((5, 3)), "b": jnp.zeros((3, 2))}
    kwargs = {"partition": bma.per_column, "estimator": "projection"}
    tx = bma.scale_by_adam_bma(**kwargs, min_eigenvalue=1.0)
    adam = bma.scale_by_adam_bma(partition=bma.by_path({"": None}))
    blocks = bma.partition(params, bma.per_column)
    state, adam_state = jax.jit(tx.init)(params), jax.jit(adam.init)(params)
    root_sizes = np.sqrt(blocks.sizes)
    update, adam_update = jax.jit(tx.update), jax.jit(adam.update)
    block_sums = jax.jit(blocks.block_sums)
    for _ in range(10):
        g = jax.tree.map(
            lambda p: jnp.asarray(rng.standard_normal(p.shape) + 1, p.dtype), params
        )
        updates, state = update(g, state)
        plain, adam_state = adam_update(g, adam_state)
        norms = [
            np.linalg.norm(np.asarray(block_sums(x)) / root_sizes)
            for x in (updates, plain)
        ]
        assert norms[0] <= norms[1] * 1.001


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_gradient_that_is_not_finite_hurts_only_itself(bad):
    params = {k: jnp.ones(3) for k in "abc"}
    tx = bma.scale_by_adam_bma()
    update = jax.jit(tx.update)
    _, state = update(params, jax.jit(tx.init)(params))
    updates, after = update(params | {"b": jnp.array([1.0, bad, 1.0])}, state)
    np.testing.assert_array_equal(jnp.isfinite(updates["b"]), [True, False, True])
    assert jnp.all(jnp.isfinite(updates["a"])) and after.U[1, 1] < after.U[0, 0]
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(after))
    zeroed, expected = update(params | {"b": jnp.array([1.0, 0.0, 1.0])}, state)
    np.testing.assert_array_equal(after.mu["b"], expected.mu["b"])
    np.testing.assert_array_equal(after.nu["b"], expected.nu["b"])


@pytest.mark.parametrize(
    "tx",
    [
        bma.scale_by_adam_bma(partition=bma.per_unit, estimator="projection"),
        bma.scale_by_mini_bma(),
    ],
    ids=["adam", "mini"],
)
def test_finite_gradients_give_finite_updates(tx):
    params = {"w": jnp.zeros((9, 4)), "b": jnp.zeros(3)}
    init, update = jax.jit(tx.init), jax.jit(tx.update)
    for magnitude in (1e-25, 1e-12, 1e15, 1e25, 1e38):
        rng, state = np.random.default_rng(5), init(params)
        for _ in range(3):
            g = {
                name: np.float32(rng.uniform(-1, 1, p.shape) * magnitude)
                for name, p in params.items()
            }
            updates, state = update(g, state)
            assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(updates))


@pytest.mark.parametrize(
    ("mine", "theirs", "names"),
    [
        (bma.scale_by_bma, optax.scale_by_rss, {"eps"}),
        (bma.adagrad_bma, optax.adagrad, {"eps"}),
        (bma.scale_by_adam_bma, optax.scale_by_adam, {"b1", "b2", "eps", "eps_root"}),
        (bma.adam_bma, optax.adam, {"b1", "b2", "eps", "eps_root", "mu_dtype"}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_defaults_are_those_of_optax(mine, theirs, names):
    mine, theirs = (inspect.signature(f).parameters for f in (mine, theirs))
    for name in names:
        assert mine[name].default == theirs[name].default


def test_weights_decay_only_if_asked():
    for factory in (bma.adam_bma, bma.mini_bma):
        tx, params = factory(1.0), jnp.ones((2, 2))
        updates, _ = jax.jit(tx.update)(jnp.zeros((2, 2)), tx.init(params), params)
        np.testing.assert_array_equal(updates, 0)
