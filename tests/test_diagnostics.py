"""``bma.diagnostics`` against dense matrices, and for every transformation."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from methods import BY_NAME, every_method
from reference import (
    RULES,
    DenseAdaGradBMA,
    DenseAdamBMA,
    DenseMiniBMA,
    check_updates,
    flat,
    labels_and_groups,
    random_tree,
)

import bma_optax as bma

ADDRESS = re.compile(" at 0x[0-9a-f]+")  # of a function, in a printed program
KEPT = 1 - 2**-30  # A direction that stays.


def check_matrix(numbers, M, floor, names, labels_of_names):
    """Eigenvalues, and the strongest pairs by name."""
    values = np.linalg.eigvalsh(M)
    np.testing.assert_allclose(numbers["min_eigenvalue"], values[0], atol=1e-9)
    np.testing.assert_allclose(numbers["max_eigenvalue"], values[-1], atol=1e-9)
    share = np.mean(values < floor)
    np.testing.assert_allclose(numbers["floored_share"], share)
    root = np.sqrt(np.diag(M))
    C = M / np.outer(root, root)
    off = np.sort(np.abs(C[np.triu_indices(len(C), 1)]))[::-1]
    found = np.asarray(numbers["correlations"])
    assert len(found) == min(10, len(off))
    np.testing.assert_allclose(np.abs(found), off[: len(found)], atol=1e-12)
    for (i, j), x in zip(numbers["correlated_pairs"], found, strict=True):
        a, b = labels_of_names[names[i]], labels_of_names[names[j]]
        np.testing.assert_allclose(C[a, b], x, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("estimator", ["report", "projection"])
@pytest.mark.parametrize("decayed", [False, True])
def test_small_matrices_of_gradients(decayed, estimator):
    rng = np.random.default_rng(0)
    labels, groups = labels_and_groups(RULES[bma.per_unit], "all")
    options = {"floor": 0.7, "estimator": estimator}
    if decayed:
        dense = DenseAdamBMA(labels, groups, b2=0.9, eps=0.0, **options)
        tx = bma.scale_by_adam_bma(
            b2=0.9, partition=bma.per_unit, estimator=estimator, min_eigenvalue=0.7
        )
    else:
        dense = DenseAdaGradBMA(labels, groups, eps=0.0, **options)
        tx = bma.scale_by_bma(
            bma.per_unit, eps=0.0, estimator=estimator, min_eigenvalue=0.7
        )
    params = random_tree(rng)
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    for _ in range(5):
        grads = random_tree(rng)
        _, state = update(grads, state)
        dense.update(flat(grads))
    blocks = bma.partition(params, bma.per_unit)
    numbers = jax.jit(
        lambda state, grads: bma.diagnostics(state, blocks, grads, estimator=estimator)
    )(state, grads)
    order = list(blocks.names)
    assert len(order) == max(labels) + 1
    # Labels count in the order of elements, names in that of blocks.
    elements = blocks.expand(jnp.arange(float(len(order))), params)
    positions = flat(elements).astype(int)
    label_of = {order[p]: label for p, label in zip(positions, labels, strict=True)}
    check_matrix(numbers, dense.M, 0.7, order, label_of)
    assert 0 < numbers["floored_share"] < 1 and numbers["count"] == 5
    given = dense.mu if decayed else flat(grads)
    diagonal = given / np.sqrt(dense.h)
    check_updates(numbers, given, diagonal, dense.root @ diagonal, np.asarray(labels))


@pytest.mark.usefixtures("x64")
def test_two_numbers_a_unit():
    rng = np.random.default_rng(1)
    common = rng.standard_normal((4, 6))
    dense = DenseMiniBMA((6, 4), b3=KEPT)
    tx = bma.scale_by_mini_bma(eps=0.0, b3=KEPT)
    params = {"bias": jnp.zeros(3), "kernel": jnp.zeros((4, 6))}
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    for _ in range(4):
        kernel = common + rng.standard_normal((4, 6))
        grads = {"bias": rng.standard_normal(3), "kernel": kernel}
        updates, state = update(jax.tree.map(jnp.asarray, grads), state)
        dense.update(kernel.T)
    blocks = bma.partition(params, bma.within("block", bma.per_unit))
    numbers = jax.jit(lambda state: bma.diagnostics(state, blocks))(state)
    np.testing.assert_allclose(numbers["min_eigenvalue"], dense.M.min(), rtol=1e-6)
    np.testing.assert_allclose(numbers["max_eigenvalue"], dense.M.max(), rtol=1e-6)
    np.testing.assert_allclose(numbers["floored_share"], np.mean(dense.M < 1))
    start = (1 - 0.9**4) / np.sqrt(1 - 0.99**4)
    full, mu = start * flat(jax.device_get(updates)), flat(state.mu)
    h = np.outer(dense.H.sum(axis=1), dense.H.sum(axis=0)) / dense.H.sum()
    second_moment = np.concatenate([state.nu["bias"], h.T.ravel()])
    labels = np.concatenate([[0, 0, 0], np.tile(np.arange(1, 7), 4)])
    check_updates(numbers, mu, mu / np.sqrt(second_moment), full, labels)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("reach", [None, 1])
def test_curvature(reach):
    def f(u):
        return jnp.sum(jnp.diff(u) ** 2) / 2 + jnp.sum(jnp.cosh(u)) / 50

    u = jnp.asarray(np.random.default_rng(2).standard_normal(32))
    rule = bma.per_tile((4,), reach=reach)
    tx = bma.scale_by_newton_bma(rule, damping=0.01)
    blocks = bma.partition(u, rule)

    @jax.jit
    def run(u):
        g = jax.grad(f)(u)
        update, state = tx.update(g, tx.init(u), u, value_fn=f)
        return g, update, bma.diagnostics(state, blocks, g)

    g, update, numbers = jax.device_get(run(u))
    G = np.asarray(jax.jit(jax.hessian(f))(u))
    z = np.sqrt(np.diag(G))
    E = np.repeat(np.eye(8), 4, axis=0) * z[:, None]
    E /= np.linalg.norm(E, axis=0)
    M = E.T @ (G / np.outer(z, z)) @ E
    labels = np.repeat(np.arange(8), 4)
    Lambda = ((4 - np.diag(M)) / 3 + 0.01)[labels]
    check_updates(numbers, g, g / (Lambda * z**2), update, labels)
    if reach is None:
        names = {name: i for i, name in enumerate(blocks.names)}
        check_matrix(numbers, M, 0.0, blocks.names, names)
    else:
        assert "correlations" not in numbers


def test_dense_groups_beside_a_grid():
    """Dense groups have the numbers that they have without a grid beside them."""
    params = {"u": jnp.ones(12), "w": jnp.array([[1.0, 2.0], [3.0, 5.0]])}

    def f(p):
        far = jnp.sum(jnp.diff(p["u"]) ** 2) + jnp.sum(p["u"] ** 2) if "u" in p else 0
        return far + jnp.sum(jnp.cosh(p["w"])) + jnp.sum(p["w"]) ** 2

    rule = bma.by_path({"u": bma.per_tile((2,), reach=1)}, default=bma.per_column)
    found = []
    for p, r in ((params, rule), ({"w": params["w"]}, bma.per_column)):
        tx, blocks = bma.scale_by_newton_bma(r), bma.partition(p, r)

        @jax.jit
        def run(p, tx=tx, blocks=blocks):
            _, state = tx.update(p, tx.init(p), p, value_fn=f)
            return bma.diagnostics(state, blocks)

        found.append(run(p))
    both, alone = found
    for name in ("min_eigenvalue", "max_eigenvalue", "correlations"):
        np.testing.assert_allclose(both[name], alone[name], rtol=1e-5)
    assert "floored_share" in alone and "floored_share" not in both


def options_of(method):
    kwargs = method.kwargs
    mini = method.factory is bma.mini_bma
    rule = kwargs.get("partition", bma.per_unit if mini else bma.per_leaf)
    chosen = {k: kwargs[k] for k in ("estimator",) if k in kwargs}
    return bma.within("block", rule) if mini else rule, chosen


MINE = (
    bma.ScaleByBMAState,
    bma.ScaleByAdamBMAState,
    bma.ScaleByMiniBMAState,
    bma.ScaleByNewtonBMAState,
    bma.ScaleByQuadraticModelState,
)


def is_mine(x):
    return isinstance(x, MINE)


def wrappers(method, params):
    """States of the method inside each wrapper of Optax and of Flax."""
    tx, whole = method.build(), params | {"c": jnp.ones(3)}
    keep = {"kernel": True, "bias": True, "c": False}
    labels = {"kernel": "mine", "bias": "mine", "c": "other"}
    injected = optax.inject_hyperparams(method.factory)(**method.kwargs)
    around = {
        "chain": (
            optax.chain(optax.clip(1.0), optax.chain(tx), optax.ema(0.9)),
            params,
        ),
        "masked": (optax.masked(tx, keep), whole),
        "partition": (
            optax.partition({"mine": tx, "other": optax.sgd(0.1)}, labels),
            whole,
        ),
        "MultiSteps": (optax.MultiSteps(tx, 2), params),
        "apply_if_finite": (optax.apply_if_finite(tx, 3), params),
        "conditionally_mask": (
            optax.conditionally_mask(tx, lambda step, **extra: step < 3),
            params,
        ),
        "inject_hyperparams": (injected, params),
        "named_chain": (optax.named_chain(("x", tx), ("y", optax.sgd(0.1))), params),
    }
    with jax.numpy_dtype_promotion("standard"):  # inject_hyperparams needs it.
        states = {name: tx.init(params) for name, (tx, params) in around.items()}
    states["TrainState"] = TrainState.create(apply_fn=None, params=params, tx=tx)
    return states


def boxed(method, params, grads, state):
    """The state, the parameters and the gradients as Flax's nnx has them."""

    class Net(nnx.Module):
        def __init__(self):
            for name, array in params.items():
                setattr(self, name, nnx.Param(array))

    def make():
        model = Net()
        return model, nnx.Optimizer(model, method.build(), wrt=nnx.Param)

    model, optimizer = nnx.eval_shape(make)
    there = nnx.state(model, nnx.Param)
    return (
        jax.tree.unflatten(
            jax.tree.structure(optimizer.opt_state), jax.tree.leaves(state)
        ),
        there,
        jax.tree.unflatten(jax.tree.structure(there), jax.tree.leaves(grads)),
    )


# Those with a reach or learned weights hold other arrays; natural gradients have the
# state of Newton-BMA.
EACH_STATE = (
    "adagrad_bma",
    "adagrad_bma learned",
    "adam_bma learned",
    "mini_bma",
    "newton_bma",
    "newton_bma with a reach",
)


@every_method
def test_every_transformation(method):
    """One method of each kind of state is also tried inside all wrappers."""
    arrays = {"kernel": jnp.ones((6, 4)), "bias": jnp.full(4, 2.0, jnp.bfloat16)}
    params = arrays | {"c": optax.MaskedNode()}

    def loss(p):
        a, b = p["kernel"], p["bias"].astype("float32")
        return jnp.sum(jnp.tanh(a) ** 2) + jnp.sum(b**2) + jnp.sum(a[0] - b) ** 2

    grads = jax.jit(jax.grad(loss))(params)
    tx, (rule, chosen) = method.build(), options_of(method)
    blocks = bma.partition(params, rule)
    extra = {"value_fn": loss, "loss_of": loss}

    @jax.jit
    def run(grads, params):
        _, state = tx.update(grads, tx.init(params), params, **extra)
        return state, bma.diagnostics(state, blocks, grads, **chosen)

    state, numbers = run(grads, params)
    assert numbers["count"] == 1
    assert numbers["effective_rates"].shape == (blocks.num_blocks,)
    assert all(np.all(np.isfinite(x)) for x in numbers.values())

    if method not in [BY_NAME[name] for name in EACH_STATE]:
        return

    def same(found):
        assert set(found) == set(numbers)
        for name, x in numbers.items():
            np.testing.assert_allclose(found[name], x, rtol=1e-3, atol=1e-6)

    def program(around):
        """What is traced of the state in the place of that of a wrapper."""

        def run(state, grads):
            mine = (x for x in jax.tree.leaves(state, is_leaf=is_mine) if is_mine(x))
            wrapped = jax.tree.map(
                lambda x: next(mine) if is_mine(x) else np.zeros(x.shape, x.dtype),
                around,
                is_leaf=is_mine,
            )
            return bma.diagnostics(wrapped, blocks, grads, **chosen)

        traced, shapes = jax.make_jaxpr(run, return_shape=True)(state, grads)
        return ADDRESS.sub("", str(traced)), shapes

    # The programs are one, so that none but that of the bare state needs to run.
    around = jax.eval_shape(lambda: wrappers(method, arrays))
    expected = program(jax.eval_shape(lambda: state))
    for name, wrapped in around.items():
        assert program(wrapped) == expected, name
    state, there, grads = boxed(method, arrays, grads, state)
    blocks = bma.partition(there, rule)
    same(jax.jit(lambda s, g: bma.diagnostics(s, blocks, g, **chosen))(state, grads))


def test_several_states():
    """Each name starts with the path of its state; blocks go to the state they fit."""
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    tx = optax.partition(
        {"x": bma.scale_by_newton_bma(), "y": bma.scale_by_newton_bma()},
        {"a": "x", "b": "y"},
    )
    seen = {"a": params["a"], "b": optax.MaskedNode()}
    state = jax.jit(tx.init)(params)
    numbers = jax.eval_shape(
        lambda state: bma.diagnostics(state, bma.partition(seen), seen), state
    )
    assert sum(name.endswith("damping") for name in numbers) == 2
    (rates,) = [name for name in numbers if name.endswith("effective_rates")]
    assert "/x/" in rates
    with pytest.raises(ValueError, match=r"MaskedNode in the place of others\.$"):
        bma.diagnostics(state, bma.partition(params))
    adagrad = bma.adagrad_bma(0.1).init(params)
    assert bma.diagnostics(adagrad)["failures"] == 0


def test_gradients_are_told_by_name():
    params = collections.OrderedDict(w=jnp.ones(3), a=jnp.ones(3))
    grads = {"w": jnp.arange(1.0, 4), "a": 100 * jnp.ones(3)}
    tx = bma.scale_by_bma()
    start = jax.jit(tx.init)(params)
    _, state = jax.jit(tx.update)(collections.OrderedDict(grads), start)
    blocks = bma.partition(params)
    numbers = jax.jit(lambda state, grads: bma.diagnostics(state, blocks, grads))
    rates = [
        numbers(state, kind(grads))["effective_rates"]
        for kind in (collections.OrderedDict, dict)
    ]
    np.testing.assert_array_equal(*rates)


@pytest.mark.parametrize(
    "factory",
    [
        bma.scale_by_bma,
        lambda rule: bma.scale_by_adam_bma(partition=rule),
        lambda rule: bma.scale_by_mini_bma(partition=rule),
        bma.scale_by_newton_bma,
    ],
    ids=["adagrad", "adam", "mini", "newton"],
)
def test_without_blocks_it_is_the_diagonal_method(factory):
    params, rule = {"w": jnp.ones((2, 3)), "b": jnp.ones(2)}, bma.by_path({"": None})
    tx = factory(rule)

    def loss(p):
        return sum(jnp.sum(x**4) for x in jax.tree.leaves(p))

    blocks = bma.partition(params, rule)

    @jax.jit
    def run(params):
        _, state = tx.update(params, tx.init(params), params, value_fn=loss)
        with_grads = bma.diagnostics(state, blocks, params)
        return with_grads, bma.diagnostics(state, blocks)

    found = run(params)
    assert "correction" in found[0]
    for numbers in found:
        assert numbers["count"] == 1 and "min_eigenvalue" not in numbers
        assert numbers.get("correction", 0) == 0
