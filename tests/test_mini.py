"""Mini-BMA against an independent float64 reference."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import DenseMiniBMA

import bma_optax as bma

KEPT = 1 - 2**-30  # A direction that stays: plain means, where it starts.


def rows(*matrices):
    return [np.asarray(m) for m in matrices]


def positions(shape):
    return np.arange(np.prod(shape)).reshape(shape)


# name -> (rule, shape, the positions of the elements of each matrix, units x inputs)
CUTS = {
    "dense": (bma.per_unit, (6, 4), rows(positions((6, 4)).T)),
    "convolution": (
        bma.per_unit,
        (2, 2, 3, 4),
        rows(positions((12, 4)).T),
    ),
    "rows": (bma.per_row, (4, 3, 2), rows(positions((4, 6)))),
    "fields": (
        bma.per_tile((2,)),
        (6, 3),
        [positions((6, 3))[:, i].reshape(3, 2) for i in range(3)],
    ),
    "stacked": (bma.stacked(bma.per_unit), (2, 5, 3), [*positions((2, 5, 3)).mT]),
    "heads": (
        bma.stacked(bma.per_unit, axis=1),
        (5, 2, 3),
        [positions((5, 2, 3))[:, i].T for i in range(2)],
    ),
    "tiles": (
        bma.per_tile((2, 2)),
        (4, 6),
        rows(positions((2, 2, 3, 2)).transpose(0, 2, 1, 3).reshape(6, 4)),
    ),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("cut", CUTS)
def test_steps_equal_the_dense_reference(cut):
    rule, shape, matrices = CUTS[cut]
    rng = np.random.default_rng(0)
    common = rng.standard_normal(shape)
    tx = bma.scale_by_mini_bma(eps=0.0, partition=rule)
    dense = [DenseMiniBMA(matrix.shape) for matrix in matrices]
    update, state = jax.jit(tx.update), jax.jit(tx.init)(jnp.zeros(shape))
    for _ in range(20):
        g = rng.standard_normal(shape) + common * rng.standard_normal()
        updates, state = update(jnp.asarray(g), state)
        for matrix, reference in zip(matrices, dense, strict=True):
            expected = reference.update(g.ravel()[matrix])
            np.testing.assert_allclose(
                np.ravel(updates)[matrix], expected, rtol=1e-8, atol=1e-10
            )


@pytest.mark.usefixtures("x64")
def test_block_means_of_the_squares_are_those_of_the_second_moment():
    """Of a matrix that no product of its means equals: only the means are right."""
    rng = np.random.default_rng(3)
    squares = np.zeros((6, 4))
    tx = bma.scale_by_mini_bma(b2=0.9)
    update, state = jax.jit(tx.update), jax.jit(tx.init)(jnp.zeros((6, 4)))
    for _ in range(5):
        g = rng.standard_normal((6, 4)) * rng.exponential(size=(6, 4))
        _, state = update(jnp.asarray(g), state)
        squares = 0.9 * squares + 0.1 * g**2
    h = state.nu * state.input_nu / np.mean(state.input_nu)
    assert np.abs(h / squares - 1).max() > 0.5
    for axis in (0, 1):
        np.testing.assert_allclose(h.mean(axis), squares.mean(axis), rtol=1e-12)


ADAM = {
    "vector": jnp.ones(5),
    "scalar": jnp.ones(()),
    "one unit": jnp.ones((5, 1)),
    "one input": jnp.ones((1, 5)),
    "empty": jnp.ones((0, 3)),
    "left out": jnp.ones((3, 4)),
}


def test_what_is_no_matrix_has_adam():
    rng = np.random.default_rng(1)
    rule = bma.by_path({"left": None}, default=bma.per_unit)
    mine = bma.mini_bma(0.1, partition=rule, weight_decay=0.1)
    theirs = optax.adamw(0.1, b2=0.99, weight_decay=0.1)
    updates = [jax.jit(tx.update) for tx in (mine, theirs)]
    states = [jax.jit(mine.init)(ADAM), jax.jit(theirs.init)(ADAM)]
    for _ in range(4):
        g = jax.tree.map(
            lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), ADAM
        )
        with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes.
            (a, states[0]), (b, states[1]) = (
                update(g, state, ADAM)
                for update, state in zip(updates, states, strict=True)
            )
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)


def test_the_direction_is_found():
    """Gradients with one common direction of inputs, to which means are blind."""
    rng = np.random.default_rng(2)
    hidden = np.array([1.0, -1.0, 1.0, -1.0, 1.0, -1.0]) / np.sqrt(6)
    tx = bma.scale_by_mini_bma()
    update, state = jax.jit(tx.update), jax.jit(tx.init)(jnp.zeros((6, 8)))
    for _ in range(100):
        g = 3 * np.outer(hidden, rng.standard_normal(8))
        g += rng.standard_normal((6, 8))
        _, state = update(jnp.asarray(g, jnp.float32), state)
    q = state.direction[:, 0] / jnp.linalg.norm(state.direction)
    assert abs(q @ hidden) > 0.97


def test_bytes_of_state_and_the_report():
    """At most 1.05 numbers a parameter, as the report says before training."""
    shapes = {
        "embedding": (1000, 64),
        "layers": {"kernel": (3, 64, 64), "bias": (3, 64)},
        "head": {"kernel": (64, 1000), "bias": (1000,)},
    }
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    rule = bma.by_path(
        {
            "layers": bma.stacked(bma.per_unit),
            "": bma.per_unit,
        }
    )
    state = jax.eval_shape(bma.scale_by_mini_bma(partition=rule).init, params)
    sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(state)]
    d = sum(x.size for x in jax.tree.leaves(params))
    assert sum(sizes) <= 1.05 * 4 * d
    report = repr(bma.partition(params, bma.within("block", rule)))
    beside = sum(x.size for x in jax.tree.leaves(state[2:]))
    unused = 2 * 3  # One for each of two arrays in three trees.
    assert f"{4 * (beside - unused):,} bytes beside the momentum" in report


@pytest.mark.parametrize(
    ("rule", "shape", "spec", "nu"),
    [
        (bma.per_unit, (8, 5), ("x", None), (None, None)),
        (bma.per_row, (8, 5), ("x", None), ("x", None)),
        (bma.stacked(bma.per_unit), (8, 4, 3), ("x", None, None), ("x", None, None)),
        (bma.per_tile((2, 2)), (8, 6), ("x", None), ("x", None, None, None)),
        (bma.per_tile((4, 2)), (8, 6), ("x", None), (None,) * 4),  # A tile is cut.
    ],
    ids=str,
)
def test_statistics_are_sharded_as_their_array(rule, shape, spec, nu):
    """One rule's state is made without jit, where each operation is a program."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    local = jnp.asarray(np.random.default_rng(5).standard_normal(shape), jnp.float32)
    params = jax.device_put(local, jax.NamedSharding(mesh, jax.P(*spec)))
    for tx in (
        bma.scale_by_bma(bma.within("block", rule), weights="learned"),
        bma.scale_by_mini_bma(partition=rule),
    ):
        init, update = jax.jit(tx.init), jax.jit(tx.update)
        if rule is bma.per_row:
            state = tx.init(params)
        else:
            with jax.set_mesh(mesh):
                state = init(params)
        updates, new = update(params, state)
        assert jax.typeof(updates) == jax.typeof(params)
        for old, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True):
            assert jax.typeof(leaf) == jax.typeof(old) or not leaf.ndim
        expected, _ = update(local, init(local))
        np.testing.assert_allclose(updates, expected, rtol=1e-5, atol=1e-6)
    assert tuple(jax.typeof(state.nu).sharding.spec) == nu


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes(dtype):
    with jax.enable_x64(dtype == "float64"):
        params = {"w": jnp.ones((4, 3), dtype), "b": jnp.ones(2, dtype)}
        tx = bma.scale_by_mini_bma(mu_dtype=None if dtype != "float16" else "float32")
        updates, new = jax.eval_shape(lambda p: tx.update(p, tx.init(p)), params)
        assert updates["w"].dtype == updates["b"].dtype == dtype
        assert new.mu["w"].dtype == ("float32" if dtype == "float16" else dtype)
        statistic = "float64" if dtype == "float64" else "float32"
        for tree in new[2:]:
            assert all(x.dtype == statistic for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "params", [{}, None, {"a": None, "b": jnp.ones((2, 2))}, jnp.ones(())], ids=str
)
def test_trees_with_little_in_them(params):
    for tx in (
        bma.scale_by_mini_bma(),
        bma.scale_by_adam_bma(),
        bma.scale_by_bma(bma.units, weights="learned"),
        bma.scale_by_adam_bma(partition=bma.units, weights="learned"),
    ):
        state = jax.jit(tx.init)(params)
        updates, new = jax.jit(tx.update)(params, state)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_gradient_that_is_not_finite_hurts_only_its_unit(bad):
    rng = np.random.default_rng(6)
    params = {"w": jnp.asarray(rng.standard_normal((4, 2)), jnp.float32)}
    params["b"] = jnp.ones(2)
    tx = bma.scale_by_mini_bma()
    update = jax.jit(tx.update)
    _, state = update(params, jax.jit(tx.init)(params))
    broken = {"w": params["w"].at[1, 0].set(bad), "b": jnp.array([bad, 1.0])}
    updates, after = update(broken, state)
    expected, expected_state = update(params, state)
    np.testing.assert_array_equal(jnp.isfinite(updates["w"]).sum(0), [0, 4])
    np.testing.assert_array_equal(jnp.isfinite(updates["b"]), [False, True])
    for moment in (after.mu, after.nu):  # As after a gradient of 0.
        assert jnp.isfinite(moment["b"][0]) and abs(moment["b"][0]) < moment["b"][1]
    # Its unit and the number of its input stay as they were, the others go on.
    for field in ("mu", "nu", "mean_nu"):
        old, new, good = (
            getattr(s, field)["w"] for s in (state, after, expected_state)
        )
        np.testing.assert_array_equal(new[:, 0], old[:, 0])
        np.testing.assert_array_equal(new[:, 1], good[:, 1])
    assert after.input_nu["w"][1] == state.input_nu["w"][1]
    other = jnp.array([0, 2, 3])
    good = expected_state.input_nu["w"][other]
    np.testing.assert_array_equal(after.input_nu["w"][other], good)
    assert jnp.all(jnp.isfinite(after.direction["w"]))
    np.testing.assert_allclose(updates["w"][:, 1], expected["w"][:, 1], rtol=0.1)


def test_steps_are_long_where_squares_are_no_product():
    """As the docstring says, of a diagonal gradient."""
    n = 8
    grads = jnp.asarray(np.diag(1 / np.arange(1.0, n + 1)), "float32")
    tx = bma.scale_by_mini_bma(partition=bma.per_row)
    updates, _ = jax.jit(lambda g: tx.update(g, tx.init(g)))(grads)
    assert np.max(np.abs(updates)) > n
