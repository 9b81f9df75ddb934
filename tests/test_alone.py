"""Groups of one block: M is 1 by the estimator "report", a number by "projection"."""

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

ADAGRAD = (bma.scale_by_bma, optax.scale_by_rss(0.0), DenseAdaGradBMA, {"eps": 0.1})
ADAM = (
    bma.scale_by_adam_bma,
    optax.scale_by_adam(),
    DenseAdamBMA,
    {"eps": 0.1, "eps_root": 0.2, "b2": 0.9},
)
every_method = pytest.mark.parametrize("method", [ADAGRAD, ADAM], ids=["rss", "adam"])
ALONE = {
    "units": bma.within("block", bma.per_unit),
    "tiles": bma.within("block", bma.per_tile((2,))),
    "arrays": bma.within("array", bma.per_leaf),
    "layers": bma.within("layer", bma.per_layer),
}
every_rule = pytest.mark.parametrize("rule", ALONE)


@every_method
@every_rule
def test_by_the_reports_estimator_it_is_the_diagonal_method(method, rule):
    """The updates are the same to the last bit, so it is not a method of its own."""
    factory, optax_method, *_ = method
    rng = np.random.default_rng(0)
    alone = factory(partition=ALONE[rule], estimator="report")
    diagonal = factory(partition=bma.by_path({"": None}))
    transformations = alone, diagonal, optax_method
    states = [jax.jit(tx.init)(random_tree(rng, np.float32)) for tx in transformations]
    updates = [jax.jit(tx.update) for tx in transformations]
    for _ in range(5):
        g = random_tree(rng, np.float32)
        with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes.
            found = [update(g, s) for update, s in zip(updates, states, strict=True)]
        states = [state for _, state in found]
        mine, same, theirs = (flat(x) for x, _ in found)
        np.testing.assert_array_equal(mine, same)
        np.testing.assert_allclose(mine, theirs, rtol=1e-5)


@pytest.mark.usefixtures("x64")
@every_method
@every_rule
@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_unless_told_it_is_the_projection(method, rule, floor):
    factory, _, reference, kwargs = method
    rng = np.random.default_rng(1)
    tx = factory(partition=ALONE[rule], min_eigenvalue=floor, **kwargs)
    inner = ALONE[rule].rule
    couple = {"units": "block", "tiles": "block"}.get(rule, "layer")
    if rule == "arrays":
        couple = "array"
    labels, groups = labels_and_groups(RULES[inner], couple)
    dense = reference(labels, groups, floor=floor, estimator="projection", **kwargs)
    state, update = jax.jit(tx.init)(random_tree(rng)), jax.jit(tx.update)
    for _ in range(10):
        g = random_tree(rng)
        updates, state = update(g, state)
        np.testing.assert_allclose(flat(updates), dense.update(flat(g)), atol=1e-8)
    assert state.failures == 0


@every_rule
@pytest.mark.parametrize("weights", ["constant", "learned"])
def test_numbers_and_no_matrices(rule, weights):
    """The state holds three numbers a block, and the program decomposes no matrix."""
    params = {"a": {"kernel": jnp.ones((6, 4))}, "b": {"kernel": jnp.ones((4, 2))}}
    tx = bma.scale_by_bma(ALONE[rule], weights=weights)
    state = jax.eval_shape(tx.init, params)
    blocks = bma.partition(params, ALONE[rule])
    for field in (state.U, state.v, state.inverse_root):
        assert field.shape == (blocks.num_blocks,)
    numbers = jax.jit(lambda s, g: bma.diagnostics(s, blocks, g))
    for program in (
        jax.jit(tx.update).lower(params, state),
        numbers.lower(state, params),
    ):
        text = program.as_text()
        assert "syevd" not in text and "eigh" not in text


@pytest.mark.parametrize(
    ("rule", "params"),
    [
        (bma.per_leaf, {"w": jnp.ones((3, 2))}),
        (bma.within("array", bma.per_unit), {"kernel": jnp.ones((3, 2))}),
    ],
    ids=["one block of all", "several of an array"],
)
def test_blocks_that_may_see_others_have_the_reports(rule, params):
    rng = np.random.default_rng(2)
    grads = [
        jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape) + 1), params)
        for _ in range(3)
    ]
    found = []
    for estimator in (None, "report", "projection"):
        tx = bma.scale_by_bma(rule, estimator=estimator)
        state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
        for g in grads:
            updates, state = update(g, state)
        found.append(flat(updates))
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 1e-3


@pytest.mark.parametrize("factory", [bma.scale_by_bma, bma.scale_by_adam_bma])
def test_each_group_has_its_own_estimator(factory):
    """Units keep the projection where other blocks, which see each other, join them."""
    rng = np.random.default_rng(3)
    shapes = {"a/kernel": (5, 3), "b/kernel": (3, 2), "x/bias": (3,), "y/bias": (2,)}
    grads = [
        {k: jnp.asarray(rng.standard_normal(s) + 1) for k, s in shapes.items()}
        for _ in range(4)
    ]

    def run(rule, kind):
        mine = [{k: x for k, x in g.items() if kind in k} for g in grads]
        tx = factory(partition=rule)
        state, update = jax.jit(tx.init)(mine[0]), jax.jit(tx.update)
        for g in mine:
            updates, state = update(g, state)
        blocks = bma.partition(mine[0], rule)
        numbers = jax.jit(lambda state: bma.diagnostics(state, blocks))(state)
        return updates, numbers["min_eigenvalue"]

    together, least = run(bma.by_path({"bias": bma.per_leaf}, default=bma.units), "")
    units, of_units = run(bma.units, "kernel")
    biases, of_biases = run(bma.per_leaf, "bias")
    for name, x in (units | biases).items():
        np.testing.assert_allclose(together[name], x, rtol=1e-5)
    np.testing.assert_allclose(least, min(of_units, of_biases), rtol=1e-5)


def test_a_block_whose_sums_are_zero_stays_at_the_diagonal():
    tx = bma.scale_by_bma(ALONE["units"], min_eigenvalue=0.0)
    g = {"kernel": jnp.array([[1.0, 1.0], [-1.0, 2.0]])}
    updates, state = jax.jit(tx.update)(g, jax.jit(tx.init)(g))
    np.testing.assert_allclose(updates["kernel"][:, 0], [1, -1], rtol=1e-6)
    assert jnp.all(jnp.isfinite(state.inverse_root))


def test_an_array_of_one_block_that_has_no_bounds_is_alone_too():
    """Biases with ``per_leaf`` beside units do not change what the units do."""
    params = {"bias": jnp.zeros(2), "kernel": jnp.zeros((3, 2))}
    grads = {"bias": jnp.array([1.0, -2.0]), "kernel": jnp.arange(1.0, 7).reshape(3, 2)}
    units = bma.within("block", bma.per_unit)
    mixed = bma.by_path({"bias": bma.per_leaf}, default=units)
    found = [
        jax.jit(tx.update)(grads, jax.jit(tx.init)(params))[0]
        for tx in map(bma.scale_by_bma, (units, mixed))
    ]
    np.testing.assert_array_equal(found[0]["kernel"], found[1]["kernel"])
    assert jnp.all(found[0]["kernel"] < 0.6)  # With "report" they are 1.


def test_a_floor_that_is_not_a_number_is_a_failure_of_each_block():
    """A traced floor cannot be refused: the last root stays, failures are counted."""
    params = {"kernel": jnp.ones((3, 2))}

    @jax.jit
    def step(floor):
        rule = bma.within("block", bma.per_unit)
        tx = bma.scale_by_bma(rule, min_eigenvalue=floor)
        return tx.update(params, tx.init(params))[1]

    state = step(jnp.nan)
    assert state.failures == 2
    np.testing.assert_array_equal(state.inverse_root, 1)
