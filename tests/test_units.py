"""One block a unit, with constant and with learned weights, against the reference."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import DenseAdaGradBMA, DenseAdamBMA, check_updates, flat
from test_sharding import COLLECTIVE

import bma_optax as bma


class Layer(NamedTuple):
    """Blocks of an array: the positions of their elements, blocks x inputs."""

    shape: tuple[int, ...]
    blocks: np.ndarray | None = None
    share: bool = True  # whether the blocks share weights that are learned
    stacked: int = 1  # as many matrices, each with weights of its own


def layer(shape, view=None, axes=None, **kwargs):
    """The array in the shape ``view``, with its axes in another order, cut into rows.

    The last of ``axes`` counts the inputs of a row.
    """
    positions = np.arange(np.prod(shape)).reshape(view or shape)
    positions = positions.transpose(axes or range(positions.ndim))
    return Layer(shape, positions.reshape(-1, positions.shape[-1]), **kwargs)


ALONE = {
    "bias": Layer((4,)),
    "conv/kernel": layer((2, 2, 3, 2), (12, 2), (1, 0)),
    "conv/weight": layer((3, 2, 2, 2), (3, 8)),
    "embedding": layer((4, 3)),
    "kernel": layer((3, 4), axes=(1, 0)),
    "one input/kernel": layer((1, 3), (3, 1), share=False),
    "one unit/kernel": layer((5, 1), (1, 5), share=False),
    "stacked/bias": Layer((2, 3)),
    "stacked/kernel": layer((2, 4, 3), axes=(0, 2, 1), stacked=2),
    # An axis that a tile cuts is two axes: both pairs inside a tile are its inputs.
    "tiles": Layer(
        (4, 6), np.arange(24).reshape(2, 2, 3, 2).transpose(0, 2, 1, 3).reshape(6, 4)
    ),
    "whole": layer((2, 2), (1, 4), share=False),
}
ALONE_RULE = bma.by_path(
    {
        "tiles": bma.within("block", bma.per_tile((2, 2))),
        "whole": bma.within("array", bma.per_leaf),
        "stacked": bma.stacked(bma.units),
    },
    default=bma.units,
)
COUPLED = {
    "bias": layer((3,), (1, 3), share=False),
    "kernel": layer((4, 3), axes=(1, 0)),
    "w": layer((3, 2), axes=(1, 0)),
}
FEW = {k: ALONE[k] for k in ("bias", "kernel")}
CASES = {
    "alone": (ALONE, ALONE_RULE),
    "coupled": (COUPLED, bma.within("array", bma.per_unit)),
    "few": (FEW, bma.units),
}


def reference(kind, layers, learned, coupled, **kwargs):
    labels, groups, matrices, start, blocks = [], {}, [], 0, 0
    for name, (shape, rows, share, stacked) in layers.items():
        mine = np.full(np.prod(shape), -1)
        for row in [] if rows is None else rows:
            mine[row] = blocks
            groups[blocks] = name if coupled else blocks
            blocks += 1
        if rows is not None and share and learned:
            matrices += np.split(start + rows, stacked)
        labels.append(mine)
        start += mine.size
    return kind(
        np.concatenate(labels),
        groups,
        estimator="projection",
        matrices=matrices,
        **{"floor": 1.0} | kwargs,
    )


def random_gradients(rng, layers, steps, dtype=np.float64):
    """With common directions, so that blocks do pull together."""
    common = {k: 1 + rng.standard_normal(v.shape) for k, v in layers.items()}
    return [
        {
            k: jnp.asarray(
                rng.standard_normal(v.shape) + rng.standard_normal() * common[k], dtype
            )
            for k, v in layers.items()
        }
        for _ in range(steps)
    ]


ADAGRAD, ADAM = bma.scale_by_bma, bma.scale_by_adam_bma
DECAYS = {"b1": 0.8, "b2": 0.9}
LARGE_EPS = {"eps": 1.0, "eps_root": 3.0}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("factory", "case", "weights", "kwargs"),
    [
        (ADAGRAD, "few", "constant", {"eps": 0.1}),
        (ADAM, "few", "constant", {"eps": 1e-8, **DECAYS}),
        (ADAGRAD, "alone", "learned", {"eps": 1e-7}),
        (ADAGRAD, "alone", "learned", {"eps": 2.0, "interval": 2, "form": "symmetric"}),
        (ADAM, "alone", "learned", {"interval": 2, **LARGE_EPS, **DECAYS}),
        (ADAGRAD, "coupled", "learned", {"eps": 0.1, "floor": 0.3}),
        (ADAM, "coupled", "learned", {"eps": 1e-8, **DECAYS}),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_steps_equal_the_dense_reference(factory, case, weights, kwargs):
    (layers, rule), coupled = CASES[case], case == "coupled"
    kind = DenseAdaGradBMA if factory is ADAGRAD else DenseAdamBMA
    dense = reference(kind, layers, weights == "learned", coupled, **kwargs)
    mine = {k: v for k, v in kwargs.items() if k not in ("interval", "floor")}
    tx = factory(
        partition=rule,
        weights=weights,
        estimator="projection" if coupled else None,
        min_eigenvalue=kwargs.get("floor"),
        update_interval=kwargs.get("interval", 1),
        **mine,
    )
    grads = random_gradients(np.random.default_rng(0), layers, 7)
    state, update = jax.jit(tx.init)(grads[0]), jax.jit(tx.update)
    for g in grads:
        updates, state = update(g, state)
        expected = np.split(
            dense.update(flat(g)), np.cumsum([x.size for x in g.values()])[:-1]
        )
        for (name, x), y in zip(sorted(updates.items()), expected, strict=True):
            np.testing.assert_allclose(np.ravel(x), y, atol=1e-9, err_msg=name)
    assert state.failures == 0
    if weights == "learned":  # They have been learned, where the reference has them.
        sizes = {k: x.size for k, x in state.direction.items()}
        wanted = {
            k: v.blocks.shape[1] * v.stacked if v.share and v.blocks is not None else 1
            for k, v in layers.items()
        }
        assert sizes == wanted


def test_single_precision_stays_near_the_reference():
    dense = reference(DenseAdaGradBMA, FEW, True, False)
    tx = bma.scale_by_bma(bma.units, weights="learned")
    grads = random_gradients(np.random.default_rng(1), FEW, 7, np.float32)
    state, update = jax.jit(tx.init)(grads[0]), jax.jit(tx.update)
    for g in grads:
        updates, state = update(g, state)
        np.testing.assert_allclose(flat(updates), dense.update(flat(g)), atol=1e-5)


@pytest.mark.parametrize("weights", ["constant", "learned"])
def test_sharded_units_exchange_three_numbers_each(weights):
    """Of each array at once, and not of each unit."""
    tx = bma.scale_by_bma(bma.units, weights=weights)
    layers = {"a/kernel": Layer((6, 8)), "b/kernel": Layer((3, 4)), "bias": Layer((4,))}
    one, two = random_gradients(np.random.default_rng(6), layers, 2, np.float32)
    _, state = jax.jit(tx.update)(one, jax.jit(tx.init)(one))
    expected, _ = jax.jit(tx.update)(two, state)
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    units = {
        k: jax.NamedSharding(mesh, jax.P(*[None] * (x.ndim - 1), "model"))
        for k, x in one.items()
    }
    with jax.set_mesh(mesh):
        one, two = jax.device_put((one, two), (units, units))
        state = jax.jit(tx.init)(one)
        program = jax.jit(tx.update).lower(one, state).compile()
        kinds = [kind for _, kind in COLLECTIVE.findall(program.as_text())]
        assert set(kinds) <= {"all-reduce", "all-gather"}
        assert kinds.count("all-gather") <= 3 * 2
        updates, _ = jax.jit(tx.update)(two, program(one, state)[1])
    for name, x in expected.items():
        np.testing.assert_allclose(updates[name], x, rtol=1e-4, atol=1e-6)


# Properties ---------------------------------------------------------------------------

LEARNED = functools.partial(bma.scale_by_bma, bma.units, weights="learned")
ADAM_LEARNED = functools.partial(ADAM, partition=bma.units, weights="learned")
every_learner = pytest.mark.parametrize(
    "make", [LEARNED, ADAM_LEARNED], ids=["adagrad", "adam"]
)


def run(tx, grads):
    """The updates of all steps, and the last state."""

    def step(state, g):
        updates, state = tx.update(g, state)
        return state, updates

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)
    first = jax.tree.map(lambda x: x[0], stacked)
    state, updates = jax.jit(lambda g: jax.lax.scan(step, tx.init(first), g))(stacked)
    return updates, state


@every_learner
def test_weights_that_stay_constant_are_constant_weights(make):
    rng = np.random.default_rng(2)
    grads = [
        {
            "kernel": jnp.asarray(
                rng.standard_normal((1, 3)) * np.ones((5, 1)), "float32"
            )
        }
        for _ in range(6)
    ]
    learned, state = run(make(), grads)
    constant, _ = run(make(weights="constant"), grads)
    np.testing.assert_allclose(learned["kernel"], constant["kernel"], rtol=1e-5)
    np.testing.assert_allclose(state.direction["kernel"], 5**-0.5, rtol=1e-5)


def test_units_and_inputs_in_another_order():
    rng = np.random.default_rng(3)
    units, inputs = rng.permutation(3), rng.permutation(5)
    plain = [jnp.asarray(rng.standard_normal((5, 3)) + 1, "float32") for _ in range(5)]
    moved = [g[inputs][:, units] for g in plain]
    updates, state = run(LEARNED(), plain)
    others, other = run(LEARNED(), moved)
    np.testing.assert_allclose(others, updates[:, inputs][:, :, units], atol=1e-5)
    np.testing.assert_allclose(other.direction, state.direction[inputs], atol=1e-5)


def test_the_units_of_an_array_do_not_matter():
    """With eps = 0 the scale of an array's gradients does not change the updates."""
    rng = np.random.default_rng(4)
    layers = {"a/kernel": Layer((5, 3)), "b/kernel": Layer((3, 2)), "bias": Layer((2,))}
    grads = random_gradients(rng, layers, 5, np.float32)
    scaled = [g | {"a/kernel": 64 * g["a/kernel"]} for g in grads]
    found = [run(LEARNED(eps=0.0), x)[0] for x in (grads, scaled)]
    np.testing.assert_allclose(flat(found[0]), flat(found[1]), rtol=1e-5, atol=1e-6)


def test_the_first_step_of_a_unit_that_pulls_together_has_norm_one():
    """The first step of AdaGrad has the norm √s, for s inputs."""
    g = jnp.array([[3.0], [-0.1]]) * jnp.ones((2, 9))
    tx = bma.scale_by_bma(bma.within("block", bma.per_row), weights="learned")
    updates, _ = jax.jit(tx.update)(g, jax.jit(tx.init)(g))
    np.testing.assert_allclose(jnp.linalg.norm(updates, axis=1), 1, rtol=1e-5)


@every_learner
def test_gradients_of_zero_and_not_finite(make):
    """Such gradients hurt at most their own unit, and no learned direction."""
    rng = np.random.default_rng(5)
    good, last = random_gradients(
        rng, {"bias": Layer((3,)), "kernel": Layer((4, 3))}, 2, np.float32
    )
    tx = make()
    update = jax.jit(tx.update)
    _, state = update(good, jax.jit(tx.init)(good))
    zeros = jax.tree.map(jnp.zeros_like, good)
    still, after = update(zeros, jax.jit(tx.init)(good))
    np.testing.assert_array_equal(flat(still), 0)
    expected, expected_state = update(last, state)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        g = last | {"kernel": last["kernel"].at[1, 0].set(bad)}
        updates, after = update(g, state)
        finite = jnp.isfinite(updates["kernel"])
        np.testing.assert_array_equal(finite.sum(0), [3, 4, 4])
        np.testing.assert_allclose(
            updates["kernel"][:, 1:], expected["kernel"][:, 1:], rtol=1e-6
        )
        np.testing.assert_array_equal(
            after.direction["kernel"], state.direction["kernel"]
        )
        assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(after))
        np.testing.assert_allclose(after.U[1:], expected_state.U[1:], rtol=1e-6)
    np.testing.assert_array_equal(
        update(zeros, state)[1].direction["kernel"] != state.direction["kernel"],
        make is ADAM_LEARNED,  # Its momentum goes on.
    )


@pytest.mark.parametrize(
    "make",
    [lambda: LEARNED(eps=0.0), lambda: ADAM_LEARNED(eps=0.0)],
    ids=["adagrad", "adam"],
)
def test_the_direction_is_found(make):
    """Also a direction whose entries sum to zero, which block sums do not see."""
    rng = np.random.default_rng(6)
    hidden = np.array([1.0, -1.0, 1.0, -1.0, 1.0, -1.0]) / np.sqrt(6)
    grads = [
        jnp.asarray(
            3 * np.outer(hidden, rng.standard_normal(8)) + rng.standard_normal((6, 8)),
            "float32",
        )
        for _ in range(100)
    ]
    _, state = run(make(), grads)
    q = state.direction[:, 0] / jnp.linalg.norm(state.direction)
    assert abs(q @ hidden) > 0.95


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("factory", [ADAGRAD, ADAM])
def test_diagnostics_are_those_of_the_reference(factory):
    grads = random_gradients(np.random.default_rng(7), FEW, 4)
    kind = DenseAdaGradBMA if factory is ADAGRAD else DenseAdamBMA
    dense = reference(kind, FEW, True, False, eps=0.0)
    tx = factory(partition=bma.units, weights="learned", eps=0.0)
    _, state = run(tx, grads)
    for g in grads:
        dense.update(flat(g))
    blocks = bma.partition(grads[0], bma.units)
    numbers = jax.jit(lambda s, g: bma.diagnostics(s, blocks, g))(state, grads[-1])
    M = np.diag(dense.M)
    np.testing.assert_allclose(numbers["min_eigenvalue"], M.min())
    np.testing.assert_allclose(numbers["max_eigenvalue"], M.max())
    np.testing.assert_allclose(numbers["floored_share"], np.mean(M < 1))
    # The weights are those of the next step.
    E = dense.weights()[:, None] * (dense.labels[:, None] == np.arange(4)) / np.sqrt(3)
    given = flat(grads[-1]) if factory is ADAGRAD else dense.mu
    diagonal = given / np.sqrt(dense.h)
    full = diagonal + E @ ((np.maximum(M, 1) ** -0.5 - 1) * (E.T @ diagonal))
    check_updates(numbers, given, diagonal, full, dense.labels)


def mlp(*widths):
    return {
        f"layers_{i}": {
            "kernel": jax.ShapeDtypeStruct((n, m), jnp.float32),
            "bias": jax.ShapeDtypeStruct((m,), jnp.float32),
        }
        for i, (n, m) in enumerate(itertools.pairwise(widths))
    }


def test_the_state_is_little_more_than_one_tree():
    params = mlp(784, 256, 128, 10)
    d = sum(x.size for x in jax.tree.leaves(params))
    for make, trees in ((LEARNED, 1), (ADAM_LEARNED, 2)):
        state = jax.eval_shape(make().init, params)
        assert sum(x.size for x in jax.tree.leaves(state)) <= (trees + 0.05) * d


def test_an_array_of_one_unit_has_a_block_and_one_without_inputs_has_none():
    params = {"kernel": jnp.ones((3, 1)), "bias": jnp.ones((2, 2)), "w": jnp.ones(3)}
    blocks = bma.partition(params, bma.units)
    assert blocks.names == ("kernel",) and blocks.sizes == (3,)


def test_where_nothing_can_be_learned_weights_are_constant():
    params = {
        "bias": jnp.ones(3),
        "empty": {"w": jnp.ones((0, 3))},
        "no units": {"w": jnp.ones((3, 0))},
        "one of both": {"w": jnp.ones((1, 1))},
        "one unit": {"w": jnp.ones((3, 1))},
        "scalar": jnp.ones(()),
    }
    for make in (LEARNED, ADAM_LEARNED):
        (learned, state), (constant, _) = (
            jax.jit(tx.update)(params, jax.jit(tx.init)(params))
            for tx in (make(), make(weights="constant"))
        )
        jax.tree.map(np.testing.assert_array_equal, learned, constant)
        assert all(x.size == 1 for x in jax.tree.leaves(state.direction))


def test_a_unit_whose_sum_is_too_large_to_square_moves_as_in_adagrad():
    """The bound that docs/troubles.md names, for float32 and units of 32 weights."""
    tx = bma.scale_by_bma(bma.units)
    params = {"kernel": jnp.zeros((32, 2), jnp.float32)}
    state, update = tx.init(params), jax.jit(tx.update)
    for size, expected in ((1e17, 32**-0.5), (1e18, 1.0), (1.7e19, 1.0), (2e19, 0.0)):
        updates, _ = update({"kernel": params["kernel"] + np.float32(size)}, state)
        np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-5)
