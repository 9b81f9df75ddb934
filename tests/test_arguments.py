"""Numbers, keys and what users' functions return: each works, or an error names it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bma_optax as bma

X = jnp.array([3.0, -2.0, 5.0])
TREE = {"a": jnp.ones(3), "b": jnp.ones((2, 2))}


def loss(p):
    return sum(jnp.sum((x - 1) ** 2) for x in jax.tree.leaves(p))


# Numbers ------------------------------------------------------------------------------

MAKERS = {
    "eps": lambda x: bma.scale_by_bma(eps=x),
    "min_eigenvalue": lambda x: bma.adagrad_bma(0.1, min_eigenvalue=x),
    "b1": lambda x: bma.adam_bma(0.1, x),
    "b2": lambda x: bma.natural_bma(bma.Hessian(), b2=x),
    "b3": lambda x: bma.scale_by_mini_bma(b3=x),
    "eps_root": lambda x: bma.scale_by_adam_bma(eps_root=x),
    "damping": lambda x: bma.newton_bma(damping=x),
    "max_norm": lambda x: bma.newton_bma(learning_rate=0.1, max_norm=x),
    "update_interval": lambda x: bma.scale_by_newton_bma(update_interval=x),
    "learning_rate": lambda x: bma.adagrad_bma(x),
    "weight_decay": lambda x: bma.adam_bma(0.1, weight_decay=x),
}


@pytest.mark.parametrize("name", MAKERS)
def test_numbers(name):
    make, whole = MAKERS[name], name == "update_interval"
    for good in (
        (1, np.int64(1), np.int32(1))
        if whole
        else (
            *(0.5, np.float32(0.5), np.float64(0.5), np.asarray(0.5), jnp.asarray(0.5)),
        )
    ):
        make(good)
    jax.eval_shape(lambda x: make(x) and None, jnp.asarray(1 if whole else 2.0))
    for bad in (
        *(np.nan, np.inf, np.float32(np.nan), np.asarray(np.nan), jnp.asarray(np.nan)),
        *(-1, np.float32(-1), jnp.asarray(-1.0)),
        *((1.5, 0) if whole else ()),
    ):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            make(bad)
    kinds = (
        "0.1",
        True,
        np.bool_(True),
        1j,
        [1.0],
        jnp.ones(2),
        np.ones(2),
        X[0].astype(complex),
    )
    for bad in kinds:
        with pytest.raises(TypeError, match=f"`{name}` must be"):
            make(bad)
    with pytest.raises(TypeError, match=f"`{name}`.*partition=bma.per_unit"):
        make(bma.per_unit)
    if name in ("learning_rate", "weight_decay"):
        make(jnp.bfloat16(0.1))
        make(optax.constant_schedule(0.1))
    elif not whole:
        for narrow in (jnp.bfloat16(0.5), np.float16(0.5)):
            with pytest.raises(TypeError, match=f"`{name}` has dtype .*float16"):
                make(narrow)


@pytest.mark.usefixtures("x64")
def test_numbers_of_numpy_do_not_decide_dtypes():
    """NumPy's float64 and int64 do not widen a float32 state where x64 is on."""
    params = jnp.linspace(-1, 1, 16, dtype=jnp.float32)
    kwargs = {
        "partition": bma.per_tile(np.int64(4), reach=np.int64(1)),
        "curvature": bma.Hessian(num_probes=np.int64(4)),
        "update_interval": np.int64(2),
        "b2": np.float64(0.5),
        "max_norm": np.float64(1.0),
    }
    make = {
        bma.newton_bma: kwargs,
        bma.adam_bma: {
            "learning_rate": np.float64(0.1),
            "b1": np.float64(0.9),
            "weight_decay": np.float64(0.1),
            "update_interval": np.int64(2),
        },
    }
    for factory, given in make.items():
        tx = factory(**given)
        state = jax.eval_shape(tx.init, params)
        updates, new = jax.eval_shape(
            lambda g, s, p, tx=tx: tx.update(g, s, p, value_fn=loss),
            params,
            state,
            params,
        )
        assert updates.dtype == params.dtype
        assert [x.dtype for x in jax.tree.leaves(new)] == [
            x.dtype for x in jax.tree.leaves(state)
        ]


# Random keys --------------------------------------------------------------------------


def test_keys_of_every_kind():
    def data(key):
        state = bma.scale_by_newton_bma(key=key).init(X)
        assert state.key.shape == (2,) and state.key.dtype == jnp.uint32
        return state.key.tolist()

    seeds = 3, np.int64(3), np.uint8(3), np.asarray(3), jnp.asarray(3)
    keys = jax.random.key(3), jax.random.PRNGKey(3), np.asarray(jax.random.PRNGKey(3))
    others = [jax.random.key(3, impl=impl) for impl in ("rbg", "unsafe_rbg")]
    assert len({tuple(data(key)) for key in seeds}) == 1
    assert len({tuple(data(key)) for key in keys}) == 1
    different = 0, -1, 3, keys[0], jax.random.key(4), others[0]
    assert len({tuple(data(key)) for key in different}) == len(different)
    assert data(others[0]) == data(jax.random.key_data(others[0]))
    for key in (jnp.asarray(3), *keys[:2], *others):
        traced = jax.jit(lambda k: bma.scale_by_newton_bma(key=k).init(X).key)(key)
        assert traced.tolist() == data(key)


@pytest.mark.parametrize(
    "key",
    [
        *(None, 1.5, True, "0", [0, 1], np.float32(1), np.True_, jnp.ones(2)),
        *(jax.random.split(jax.random.key(0)), jax.random.split(jax.random.PRNGKey(0))),
        *(jnp.ones(3, "uint32"), jnp.arange(2), jax.random.key),
    ],
)
def test_no_keys(key):
    for make in (
        lambda: bma.newton_bma(key=key),
        lambda: bma.natural_bma(bma.Hessian(), key=key),
        lambda: bma.scale_by_quadratic_model(key=key),
        lambda: bma.preconditioner(lambda v: v, X, key=key),
    ):
        with pytest.raises(TypeError, match="`key` must be a seed or one random key"):
            make()
    with pytest.raises(ValueError, match="`key` must fit into 64 bits"):
        bma.newton_bma(key=2**64)


def test_curvatures_get_a_typed_key():
    seen = []

    class Mine(bma.Curvature):
        def linearize(self, params, key, value_fn, extra_args):
            seen.append(key)
            return lambda v: v

    tx = bma.newton_bma(curvature=Mine())
    jax.eval_shape(lambda: tx.update(X, tx.init(X), X, value_fn=loss))
    assert seen
    assert all(jnp.issubdtype(key.dtype, jax.dtypes.prng_key) for key in seen)


# What functions return ----------------------------------------------------------------


def traced(tx, params=TREE, **kwargs):
    return jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, **kwargs), params)


@pytest.mark.parametrize(
    ("value_fn", "match"),
    [
        (lambda p: (loss(p), 1), r"a tuple of float32\[\], a int. Pass lambda"),
        (lambda p: 1.0, "got a float"),
        (lambda p: (p["a"] - 1) ** 2, r"got float32\[3\].*mean"),
        (lambda p: jnp.sum(p["a"], keepdims=True), r"got float32\[1\]"),
        (lambda p: jnp.int32(1), r"got int32\[\]"),
        (lambda p: loss(p).astype(complex), r"got complex64\[\]"),
        (lambda p: {"loss": loss(p)}, "got a dict"),
        (lambda p: None, "got nothing"),
        (3.0, "must be the loss as a function"),
    ],
)
def test_losses(value_fn, match):
    for tx in (bma.newton_bma(), bma.scale_by_quadratic_model()):
        with pytest.raises(TypeError, match=f"`value_fn`.*{match}"):
            traced(tx, value_fn=value_fn)


def test_advice_for_a_loss_with_more_is_code_that_works():
    def value_fn(p, batch):
        return loss(p) + batch, batch

    tx = bma.newton_bma()
    with pytest.raises(TypeError, match="Pass lambda") as error:
        traced(tx, value_fn=value_fn, batch=1.0)
    advice = re.search(r"Pass (lambda .*\[0\]), without", str(error.value))[1]
    alone = eval(advice, {"value_fn": value_fn})
    traced(tx, value_fn=alone, batch=1.0)


def test_a_loss_without_a_signature():
    """Functions that are written in C may have none."""
    updates, _ = traced(bma.newton_bma(), jnp.ones(1), value_fn=max)
    assert updates.shape == (1,)


@pytest.mark.parametrize(
    ("product", "error", "match"),
    [
        (lambda v: v["a"], ValueError, r"gave float32\[3\], where nothing is needed"),
        (lambda v: (v, 1), ValueError, "At '0/a'"),
        (lambda v: {"a": v["a"]}, ValueError, r"At 'b'.*float32\[2, 2\] is needed"),
        (
            lambda v: v | {"b": v["a"]},
            ValueError,
            r"At 'b' .* gave float32\[3\], where float32\[2, 2\]",
        ),
        (lambda v: 1.0, ValueError, "gave a float"),
        (lambda v: None, ValueError, "At 'a' .*gave nothing"),
        (lambda v: v | {"a": jnp.arange(3)}, TypeError, "'a' has dtype int32"),
    ],
)
def test_products_and_diagonals(product, error, match):
    class Mine(bma.Curvature):
        def linearize(self, params, key, value_fn, extra_args):
            return product

    operator = bma.Operator(lambda p: product)
    known = bma.Operator(lambda p: lambda v: v, diagonal_fn=product)
    for name, make in {
        "product_fn": lambda: bma.preconditioner(product, TREE),
        "`product_fn": lambda: traced(bma.scale_by_newton_bma(curvature=operator)),
        "product_fn`": lambda: traced(
            bma.scale_by_quadratic_model(operator), value_fn=loss
        ),
        "Mine.linearize": lambda: traced(bma.scale_by_newton_bma(curvature=Mine())),
        "diagonal_fn": lambda: traced(bma.scale_by_newton_bma(curvature=known)),
    }.items():
        if name == "diagonal_fn" and product(TREE) is None:
            continue  # None is a diagonal that is not known.
        with pytest.raises(error, match=match) as found:
            make()
        assert name in str(found.value)
    if product(TREE) is not None:
        with pytest.raises(error, match=match) as found:
            bma.preconditioner(lambda v: v, TREE, diagonal=product(TREE))
        assert "`diagonal`" in str(found.value)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("theirs", ["float64", "bfloat16"])
def test_products_of_another_dtype_leave_that_of_the_state(theirs):
    def product(params):
        return lambda v: jax.tree.map(lambda x: 2 * x.astype(theirs), v)

    params = jax.tree.map(lambda x: x.astype("float32"), TREE)
    tx = bma.newton_bma(curvature=bma.Operator(product))
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, value_fn=loss))
    updates, state = update(params, jax.jit(tx.init)(params), params)
    kinds = [
        [x.dtype for x in jax.tree.leaves(s)] for s in (state, jax.jit(tx.init)(params))
    ]
    assert kinds[0] == kinds[1]
    np.testing.assert_allclose(state[0].inverse_diagonal["b"], 0.5)


def test_products_in_another_order_of_the_tree():
    """A product with the names of the parameters is put into their order."""
    from collections import OrderedDict

    def product(v):
        return OrderedDict(b=3 * v["b"], a=2 * v["a"])

    result = jax.jit(lambda x: bma.preconditioner(product, TREE)(x))(TREE)
    np.testing.assert_allclose(result["a"], 1 / 2, rtol=1e-6)
    np.testing.assert_allclose(result["b"], 1 / 3, rtol=1e-6)
    assert jax.tree.structure(result) == jax.tree.structure(TREE)


# Vectors ------------------------------------------------------------------------------


def test_several_right_hand_sides_and_numpy():
    C = jax.jit(lambda: bma.preconditioner(lambda v: 4 * v + jnp.sum(v), X))()
    batch = np.arange(6.0).reshape(2, 3)
    np.testing.assert_allclose(
        jax.vmap(C)(jnp.asarray(batch)), [C(x) for x in batch], rtol=1e-6
    )
    assert C(batch[0]).dtype == jnp.float32


# Rates and decay ----------------------------------------------------------------------


@pytest.mark.parametrize("factory", [bma.adam_bma, bma.mini_bma])
def test_weight_decay(factory):
    params, grads = TREE, jax.tree.map(jnp.sin, TREE)

    def update(weight_decay, *given):
        tx = factory(0.1, weight_decay=weight_decay)
        return jax.jit(lambda: tx.update(grads, tx.init(params), *given))()

    plain, state = update(0.0)
    for wd in (0.5, np.float64(0.5), jnp.asarray(0.5), optax.constant_schedule(0.5)):
        decayed, other = update(wd, params)
        for x, y, p in zip(
            *map(jax.tree.leaves, (decayed, plain, params)), strict=True
        ):
            np.testing.assert_allclose(x, y - 0.1 * 0.5 * p, rtol=1e-6)
        if not callable(wd):  # A run goes on with another decay.
            assert jax.tree.structure(other) == jax.tree.structure(state)
        with pytest.raises(ValueError, match="needs the parameters where weights"):
            update(wd)


def test_injected_float32_is_the_cure_in_16_bits():
    params = jnp.ones((4, 3), "bfloat16")
    inject = optax.inject_hyperparams(bma.adam_bma, hyperparam_dtype=jnp.float32)
    found = []
    for tx in (bma.adam_bma(0.1, weight_decay=0.1), inject(0.1, weight_decay=0.1)):
        p, state = params, jax.jit(tx.init)(params)

        @jax.jit
        def step(p, state, tx=tx):
            updates, state = tx.update(p - jnp.bfloat16(0.3), state, p)
            return updates, optax.apply_updates(p, updates), state

        for _ in range(5):
            updates, p, state = step(p, state)
        assert updates.dtype == params.dtype
        found.append(p)
    np.testing.assert_array_equal(*found)
    assert jnp.all(found[0] < 0.7)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "make",
    [
        bma.scale_by_adam_bma,
        bma.scale_by_mini_bma,
        lambda partition: bma.scale_by_bma(bma.units, weights="learned"),
    ],
    ids=["adam", "mini", "learned"],
)
def test_gradients_are_cast_to_the_statistics(make):
    rng = np.random.default_rng(0)
    tx = make(partition=bma.per_unit)
    state = again = jax.jit(tx.init)({"w": jnp.zeros((4, 3), "float64")})
    update = jax.jit(tx.update)
    for g in rng.standard_normal((5, 4, 3)).astype("float32"):
        updates, state = update({"w": g}, state)
        wide, again = update({"w": g.astype("float64")}, again)
        same = np.asarray(wide["w"]).astype("float32")
        np.testing.assert_array_equal(updates["w"], same)
    jax.tree.map(np.testing.assert_array_equal, state, again)
