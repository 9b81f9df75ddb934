"""Each transformation does what Optax and the libraries around it ask of one.

The checks of Optax's harness for contributed optimisers (its `_common_test.py`, and the
sharding and abstract `init` tests of its development branch), then wrappers and
training loops.
"""

import collections
import functools
import inspect
import math

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from methods import (
    BY_NAME,
    DISTINCT,
    KINDS,
    every_distinct_method,
    every_kind,
    every_method,
    every_rated_method,
)
from reference import compiled

import bma_optax as bma


def parabola(dtype=jnp.float32):
    start = jnp.array([-1.0, 10.0, 1.0], dtype)
    goal = jnp.array([1.0, -1.0, 1.0], dtype)
    return start, goal, lambda x: jnp.sum((x - goal) ** 2)


def rosenbrock(dtype=jnp.float32):
    start, goal = jnp.zeros(2, dtype), jnp.ones(2, dtype)
    return start, goal, lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def matrix_parabola(dtype=jnp.float32):
    start, goal = jnp.zeros((2, 2), dtype), jnp.array([[3.0, -2.0], [1.0, 4.0]], dtype)
    return start, goal, lambda x: jnp.sum((x - goal) ** 2)


def mixed_parabola(dtype=jnp.float32):
    start = jnp.zeros(3, dtype), jnp.zeros((2, 2), dtype)
    goal = (
        jnp.array([1.0, -1.0, 2.0], dtype),
        jnp.array([[1.0, 0.0], [-1.0, 1.0]], dtype),
    )
    return (
        start,
        goal,
        lambda x: sum(jnp.sum((a - b) ** 2) for a, b in zip(x, goal, strict=True)),
    )


def with_loss(f):
    """The loss, under the two names by which rows of ``methods.py`` ask for it."""
    return {"value_fn": f, "loss_of": f}


def bowl(params):
    """A loss for parameters of any structure, in which all elements are coupled."""
    leaves = jax.tree.leaves(params)
    squares = sum(jnp.sum((x.astype("float32") - 0.3) ** 2) for x in leaves)
    return squares + 0.01 * sum(jnp.sum(x.astype("float32")) for x in leaves) ** 2


dish = jax.jit(bowl)


def make_step(tx, f, **extra):
    def step(params, state):
        updates, state = tx.update(
            jax.grad(f)(params), state, params, **with_loss(f), **extra
        )
        return optax.apply_updates(params, updates), state

    return step


PARAMS = {
    "a": {"w": -jnp.ones((2, 3)), "b": jnp.ones(3)},
    "c": {"w": jnp.ones((2, 5, 2))},
}


def params_of(method):
    """Two of the arrays where a loss is needed: each makes a long program longer."""
    return PARAMS if method.kwargs["learning_rate"] else {"a": PARAMS["a"]}


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape) + 0.5, x.dtype), tree
    )


def abstract(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.aval.weak_type), tree)


def types(tree):
    """Each leaf's dtype, shape and sharding along explicit axes."""
    return jax.tree.map(lambda x: str(jax.typeof(x)), tree)


@functools.cache
def jitted(update):
    """The jitted ``update`` of a transformation: one for all tests of this module."""
    return jax.jit(functools.partial(update, **with_loss(bowl)))


def optax_promotes():
    """Optax's own wrappers do not run under strict dtype promotion."""
    return jax.numpy_dtype_promotion("standard")


# Optax's harness ----------------------------------------------------------------------


@every_method
def test_extra_args_and_no_second_compile(method):
    tx = method.build()
    start, _, f = rosenbrock()
    traces = []

    @functools.partial(jax.jit, donate_argnames="state")
    def step(params, state):
        traces.append(1)
        return make_step(tx, f, unexpected=1)(params, state)

    params, state = start, jax.jit(tx.init)(start)
    for _ in range(3):
        params, state = step(params, state)
    assert len(traces) == 1


# Each operation is a program: one row a kind of state. With a reach: test_sharding.py.
@pytest.mark.parametrize(
    "name",
    [
        "adagrad_bma per_column symmetric",
        "adagrad_bma learned",
        "adam_bma learned",
        "mini_bma",
        "newton_bma",
        "natural_bma per_column by layer damped",
    ],
)
def test_without_jit_nothing_is_compiled_twice(name):
    """Refreshes, at steps 3 and 5, and new loss functions compile nothing again."""
    method = BY_NAME[name]
    known = inspect.signature(method.factory).parameters
    kwargs = {"update_interval": 2} if "update_interval" in known else {}
    # Arrays of one shape share the programs of their operations.
    params = dict.fromkeys("vw", PARAMS["a"]["w"])
    tx = method.factory(**method.kwargs | kwargs)
    state = jax.jit(tx.init)(params)
    for step in range(5):
        compiled.clear()
        _, state = tx.update(params, state, params, **with_loss(lambda p: dish(p)))
        assert step < 2 or not compiled


def test_without_jit_labels_and_preconditioners_compile_once():
    linear, losses, product = map(
        jax.jit,
        (
            lambda w: X @ w,
            optax.softmax_cross_entropy_with_integer_labels,
            lambda v: 3 * v - jnp.roll(v, 1) - jnp.roll(v, -1),
        ),
    )

    def draws():
        fisher = bma.Fisher(lambda w: linear(w), jax.random.categorical, losses)
        tx = bma.scale_by_natural_bma(fisher, update_interval=1)
        return tx.update(w, tx.init(w), w)

    def inverts():
        C = bma.preconditioner(
            lambda v: product(v),
            jnp.ones(12),
            bma.per_tile((2,)),
        )
        return C(jnp.ones(12))

    w = jnp.ones((4, 3))
    for again in (False, True):
        compiled.clear()
        draws(), inverts()
        assert not again or not compiled


@every_method
@pytest.mark.parametrize(
    "problem", [parabola, rosenbrock, matrix_parabola, mixed_parabola]
)
def test_converges(method, problem):
    tx = method.build()
    start, goal, f = problem()
    step = make_step(tx, f)

    def far(params):
        distances = jax.tree.map(lambda x, y: jnp.max(jnp.abs(x - y)), params, goal)
        return jnp.max(jnp.stack(jax.tree.leaves(distances))) > 1e-2

    @jax.jit
    def train(params, state):
        return jax.lax.while_loop(
            lambda c: (c[2] < 30_000) & far(c[0]),
            lambda c: (*step(*c[:2]), c[2] + 1),
            (params, state, 0),
        )

    state = optax.tree.map_params(tx, lambda v: v, jax.jit(tx.init)(start))
    params, state, _ = train(start, state)
    chex.assert_trees_all_close(params, goal, rtol=3e-2, atol=3e-2)


@every_method
def test_map_params_reaches_only_what_is_like_params(method):
    tx = method.build()
    params = params_of(method)
    state = jax.jit(tx.init)(params)
    doubled = optax.tree.map_params(tx, lambda v: v + 1, state)
    changed = [
        path[-1]
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(state),
            jax.tree.leaves(doubled),
            strict=True,
        )
        if not np.array_equal(a, b)
    ]
    assert len(changed) == method.trees * len(jax.tree.leaves(params))


@every_distinct_method
def test_leaves_in_another_order_are_told_by_name(method):
    """An OrderedDict, whose leaves are not sorted, gets the updates of a dict."""
    tx, params = method.build(), params_of(method)
    grads = random_like(params, 0)
    expected, _ = jitted(tx.update)(grads, jax.jit(tx.init)(params), params)
    ordered = collections.OrderedDict((k, params[k]) for k in reversed(params))
    ordered["a"] = collections.OrderedDict((k, params["a"][k]) for k in ("w", "b"))
    before = jax.jit(tx.init)(ordered)
    updates, state = jitted(tx.update)(grads, before, ordered)
    assert jax.tree.structure(state) == jax.tree.structure(before)
    for layer, arrays in expected.items():
        for name, update in arrays.items():
            np.testing.assert_allclose(
                updates[layer][name], update, rtol=1e-4, atol=1e-6
            )


@every_distinct_method
def test_an_average_of_states_is_one(method):
    """Counters and keys become floats in an average, and ``update`` takes them."""
    tx = method.build()
    params = params_of(method)
    state = jax.eval_shape(tx.init, params)

    def update(state):
        mean = jax.tree.map(lambda a, b: (a + b) / 2, state, state)
        return tx.update(params, mean, params, **with_loss(bowl))

    with optax_promotes():
        jax.eval_shape(update, state)


@every_distinct_method
def test_inject_hyperparams(method):
    tx = method.build()
    injected = optax.inject_hyperparams(method.factory)(**method.kwargs)
    params = params_of(method)
    state, injected_state = jax.jit(tx.init)(params), jax.jit(injected.init)(params)
    update, injected_update = jitted(tx.update), jitted(injected.update)
    for seed in range(2):
        g = random_like(params, seed)
        updates, state = update(g, state, params)
        same, injected_state = injected_update(g, injected_state, params)
        chex.assert_trees_all_close(updates, same, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(injected_state.inner_state, state, rtol=1e-5, atol=1e-5)


@every_method
def test_dtype_is_preserved_and_multi_steps_accumulates(method):
    tx = method.build()
    params = jnp.array([1.0, 2.0], jnp.bfloat16)
    updates, _ = traced(tx, params, jax.eval_shape(tx.init, params), params)
    assert updates.dtype == params.dtype
    multi = optax.MultiSteps(tx, every_k_schedule=4)
    state, update = jax.jit(multi.init)(params), jitted(multi.update)
    for step in range(8):
        with optax_promotes():
            updates, new = update(params, state, params)
        assert abstract(updates) == abstract(params)
        assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
        numbers, state = np.asarray(updates, "float32"), new
        assert np.all(np.isfinite(numbers))
        assert np.all(numbers != 0) if step % 4 == 3 else np.all(numbers == 0)


@every_distinct_method
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_state_is_stable_under_cond(method, dtype):
    """Tracing tells all types. MultiSteps, above, runs each method under ``cond``."""
    with jax.enable_x64(dtype == "float64"):
        tx = method.build()
        start, _, f = parabola(dtype)
        step = make_step(tx, f)

        def maybe(params, state, flag):
            return jax.lax.cond(flag, step, lambda p, s: (p, s), params, state)

        state = jax.eval_shape(tx.init, start)
        params, new = jax.eval_shape(maybe, start, state, True)
        assert params.dtype == dtype
        assert typed(new) == typed(state)


def to_be_sharded(jit):
    """Two arrays; without jit one, as each operation on it is a program."""
    kernel = jnp.asarray(np.arange(16.0).reshape(2, 4, 2) / 16, "float16")
    embedding = {
        "embedding": jnp.asarray(np.arange(16.0).reshape(2, 8) / 16, "float32")
    }
    return {"kernel": kernel} | (embedding if jit else {})


@functools.cache
def first_update_on_one_device(name, jit):
    tx, params = BY_NAME[name].build(), to_be_sharded(jit)
    return jitted(tx.update)(params, jax.jit(tx.init)(params), params)[0]


# Without jit, newton_bma has a test of its own in test_sharding.py.
WAYS = {
    "jit": [m.id for m in DISTINCT],
    "jit outside the mesh": KINDS,
    "no jit": ("adagrad_bma",),
}


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, how) for name in BY_NAME for how in WAYS if name in WAYS[how]],
)
@pytest.mark.filterwarnings("ignore:'kernel'.*a device has 1 of its 2 elements")
def test_sharding_is_stable(name, how):
    """Explicit axes; a sharded array's state is sharded as it is.

    Without ``jax.jit`` the axes have one device each. An eager update is hundreds of
    programs, and XLA on CPU now and then deadlocks in one of them where devices wait
    for each other; types and errors do not depend on the number of devices.
    """
    under_mesh, jit = "outside" not in how, how != "no jit"
    shape = (2, 2) if jit else (1, 1)
    mesh = jax.make_mesh(
        shape,
        ("y", "x"),
        axis_types=(jax.sharding.AxisType.Explicit,) * 2,
        devices=jax.devices()[: math.prod(shape)],
    )
    specs = {"kernel": jax.P("y", "x", None), "embedding": jax.P(None, "x")}
    params = {
        key: jax.device_put(x, jax.NamedSharding(mesh, specs[key]))
        for key, x in to_be_sharded(jit).items()
    }

    def run(params):
        tx = BY_NAME[name].build()
        init = jax.jit(tx.init) if how == "jit" else tx.init
        update = functools.partial(tx.update, **with_loss(bowl))
        update = jax.jit(update) if jit else update
        state = init(params)
        updates, new = update(params, state, params)
        if under_mesh:  # Traced or not, the types are the same.
            traced = jax.eval_shape(init, params)
            traced = traced, jax.eval_shape(update, params, state, params)
            assert types(traced) == types((state, (updates, new)))
        for (path, old), leaf in zip(
            jax.tree_util.tree_leaves_with_path(state),
            jax.tree.leaves(new),
            strict=True,
        ):
            # A counter made outside a mesh joins it at the first step; Adam's does too,
            # and so does a random key.
            if under_mesh or str(path[-1]) not in (".count", ".key"):
                assert jax.typeof(leaf) == jax.typeof(old), path
        assert types(updates) == types(params)
        return updates

    if under_mesh:
        with jax.set_mesh(mesh):
            updates = run(params)
    else:
        updates = run(params)
    expected = first_update_on_one_device(name, jit)
    tolerances = {"kernel": (1e-2, 0), "embedding": (1e-4, 1e-7)}
    for key, update in updates.items():
        np.testing.assert_allclose(update, expected[key], *tolerances[key])


@every_method
def test_init_on_abstract_params(method):
    tx = method.build()
    params = params_of(method)
    shapes = jax.eval_shape(lambda: params)
    state, made = jax.eval_shape(tx.init, shapes), jax.jit(tx.init)(params)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, made)
    chex.assert_trees_all_equal(tx.init(shapes), made)


@every_kind
def test_init_under_jit_takes_shapes_and_numbers_of_numpy(method):
    """Parameters that are no arguments of the traced function, as in a closure."""
    tx, params = method.build(), params_of(method)
    made = jax.jit(tx.init)(params)
    for given in (jax.eval_shape(lambda: params), jax.tree.map(np.asarray, params)):
        state = jax.jit(lambda given=given: tx.init(given))()
        chex.assert_trees_all_equal(state, made)


@every_method
def test_learning_rate_takes_a_schedule(method):
    signature = inspect.signature(method.factory)
    annotation = signature.parameters["learning_rate"].annotation
    assert annotation in (optax.ScalarOrSchedule, optax.ScalarOrSchedule | None)
    rate = method.kwargs["learning_rate"] or 0.1
    tx, scheduled = (
        method.factory(**method.kwargs | {"learning_rate": x})
        for x in (rate, optax.constant_schedule(rate))
    )
    start, _, f = parabola()
    one, two = ((start, jax.jit(x.init)(start)) for x in (tx, scheduled))
    first, second = jax.jit(make_step(tx, f)), jax.jit(make_step(scheduled, f))
    for _ in range(3):
        one, two = first(*one), second(*two)
    np.testing.assert_allclose(one[0], two[0], rtol=1e-6)


# Dtypes -------------------------------------------------------------------------------


def traced(tx, grads, state, params):
    """The shapes and dtypes that ``update`` returns, without compiling it."""
    return jax.eval_shape(jitted(tx.update), grads, state, params)


def typed(tree):
    """Shapes, dtypes and weak types, also of arrays of NumPy and of abstract ones."""
    return jax.tree.map(lambda x: (x.shape, x.dtype, getattr(x, "weak_type", 0)), tree)


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


@every_distinct_method
@pytest.mark.usefixtures("x64")
def test_dtypes_are_those_that_init_saw(method):
    """Updates have the dtype of the gradients; the state keeps its own."""
    tx = method.build()
    pairs = [("float64", "float32"), ("float32", "float64"), ("float32", "bfloat16")]
    for mine, theirs in [*pairs, ("bfloat16", "float64"), ("float16", "bfloat16")]:
        params, grads = (cast(params_of(method), x) for x in (mine, theirs))
        state = jax.eval_shape(tx.init, params)
        updates, new = traced(tx, grads, state, params)
        assert typed(new) == typed(state)
        assert typed(updates) == typed(grads)


@every_distinct_method
def test_weak_types_and_numbers_of_python_and_numpy(method):
    tx = method.build()
    arrays = params_of(method)
    numbers = [1.0, np.ones(()), np.float64(1.0), jnp.asarray(1.0)]
    scalars = {str(i): {"b": x} for i, x in enumerate(numbers)}
    ones = jax.tree.map(lambda _: jnp.ones(()), scalars)
    expected = jax.eval_shape(tx.init, arrays | ones)

    def first_step():  # Without arguments: arrays of NumPy stay what they are.
        params = jax.tree.map(np.float64, arrays) | scalars
        state = tx.init(params)
        return state, *tx.update(params, state, params, **with_loss(bowl))

    state, updates, new = jax.eval_shape(first_step)
    assert typed(state) == typed(new) == typed(expected)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("float32")}


@every_distinct_method
@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_gradients_that_are_not_real_floats_are_refused(method, dtype):
    tx = method.build()
    params = params_of(method)
    grads = params | {"a": params["a"] | {"w": params["a"]["w"].astype(dtype)}}
    with pytest.raises(TypeError, match=f"'a/w' has dtype {dtype}. Pass"):
        traced(tx, grads, jax.eval_shape(tx.init, params), params)


@every_distinct_method
@pytest.mark.parametrize("saved", ["float32", "float64"])
def test_a_state_of_another_x64_is_refused(method, saved):
    tx = method.build()
    with jax.enable_x64(True):
        other = {"float32": "float64", "float64": "float32"}[saved]
        state = jax.eval_shape(tx.init, cast(params_of(method), saved))
        params = cast(params_of(method), other)
        with pytest.raises(ValueError, match=f"'a/b'.*{other}.*has {saved}.* Pass"):
            traced(tx, params, state, params)
        # Where there are no parameters to compare with, the state decides.
        if method.kwargs["learning_rate"] is not None:
            updates, new = jax.eval_shape(tx.update, params, state)
            assert typed(new) == typed(state) and typed(updates) == typed(params)


@every_distinct_method
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_hyperparameters_of_16_bits_are_refused(method, dtype):
    params = cast(params_of(method), dtype)
    kwargs = method.kwargs | {"learning_rate": method.kwargs["learning_rate"] or 0.1}
    with pytest.raises(TypeError, match="`hyperparam_dtype=jnp.float32`"):
        optax.inject_hyperparams(method.factory)(**kwargs).init(params)
    tx = optax.inject_hyperparams(method.factory, hyperparam_dtype=jnp.float32)(
        **kwargs
    )
    state = jax.eval_shape(tx.init, params)
    with optax_promotes():
        updates, new = traced(tx, params, state, params)
    assert typed(updates) == typed(params)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)


@every_rated_method
def test_parameters_are_not_needed_where_nothing_uses_them(method):
    tx = method.build()
    state, update = jax.jit(tx.init)(PARAMS), jitted(tx.update)
    chex.assert_trees_all_equal(update(PARAMS, state), update(PARAMS, state, PARAMS))


# Wrappers and transformations ---------------------------------------------------------


def by_name(of):
    """A value for each array by the last part of its name, as Optax's wrappers take."""
    return functools.partial(
        jax.tree_util.tree_map_with_path, lambda path, _: of[path[-1].key]
    )


FROZEN = by_name({"w": False, "b": True})


@functools.cache
def wrappers(tx):
    mine = by_name({"w": "mine", "b": "theirs"})
    freeze = optax.masked(optax.set_to_zero(), FROZEN)
    return {
        "chain": optax.chain(
            freeze, optax.clip_by_global_norm(1.0), tx, optax.ema(0.9)
        ),
        "masked": optax.masked(tx, by_name({"w": True, "b": False})),
        "partition": optax.partition({"mine": tx, "theirs": optax.sgd(0.1)}, mine),
        "apply_if_finite": optax.apply_if_finite(tx, 3),
    }


# MultiSteps: test_dtype_is_preserved_and_multi_steps_accumulates, for every method.
@every_kind
@pytest.mark.parametrize("name", wrappers(optax.identity()))
def test_wrapped(method, name):
    tx, params = wrappers(method.build())[name], params_of(method)
    state = jax.jit(tx.init)(params)
    update = jitted(tx.update)
    for seed in range(3):
        with optax_promotes():
            updates, new = update(random_like(params, seed), state, params)
        assert abstract(updates) == abstract(params)
        assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
        numbers = jax.tree.map(np.asarray, updates)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(numbers))
        if name == "chain":
            assert jax.tree.map(lambda x: not np.any(x), numbers) == FROZEN(params)
        state = new


@every_kind
def test_apply_if_finite_rejects_a_bad_step(method):
    tx = wrappers(method.build())["apply_if_finite"]
    params = params_of(method)
    state, bad = jax.jit(tx.init)(params), random_like(params, 0)
    bad["a"]["b"] = jnp.asarray([np.nan, 1.0, 1.0], "float32")
    with optax_promotes():
        updates, state = jitted(tx.update)(bad, state, params)
    assert all(jnp.all(x == 0) for x in jax.tree.leaves(updates))
    assert state.total_notfinite == 1


@every_method
def test_scan_vmap_and_shard_map_equal_a_loop(method):
    """Under each of them the types of the state are stable, as ``scan`` checks."""
    tx = method.build()
    arrays = params_of(method)
    grads = [random_like(arrays, seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *grads)

    def train(g):
        def body(state, _):
            updates, state = tx.update(g, state, params, **with_loss(bowl))
            return state, updates

        # Parameters of each device of its own, as their gradients are.
        params = jax.tree.map(lambda x, y: x + 0 * y, arrays, g)
        return jax.lax.scan(body, tx.init(params), length=3)[1]

    def on_one_device(g):
        updates = train(jax.tree.map(lambda x: x[0], g))
        return jax.tree.map(lambda x: x[None], updates)

    batched = jax.device_get(jax.jit(jax.vmap(train))(stacked))
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    placed = jax.device_put(stacked, jax.NamedSharding(mesh, jax.P("x")))
    shard = jax.jit(jax.shard_map(on_one_device, out_specs=jax.P("x")))
    with jax.set_mesh(mesh):
        # What it asks for are types. One method of each kind is run as well.
        assert typed(jax.eval_shape(shard, placed)) == typed(batched)
        run = method in [BY_NAME[name] for name in KINDS]
        shards = jax.device_get(shard(placed)) if run else None
    update = jitted(tx.update)
    for i, g in enumerate(grads):
        state = jax.jit(tx.init)(arrays)
        for step in range(3):
            updates, state = update(g, state, arrays)
            for found, rtol in ((batched, 1e-3), (shards, 1e-4)):
                if found is not None:
                    one = jax.tree.map(lambda x, i=i, step=step: x[i, step], found)
                    chex.assert_trees_all_close(one, updates, rtol=rtol, atol=1e-5)


# newton_bma, with refreshes: see test_steps.py.
@every_distinct_method
@pytest.mark.usefixtures("x64")
def test_gradient_through_steps_equals_finite_differences(method):
    """Also from the first step, where M has repeated eigenvalues."""
    tx = method.build()
    problem = mixed_parabola if method.kwargs["learning_rate"] else matrix_parabola
    start, _, f = problem(jnp.float64)

    def loss(params, t):
        return f(params) + t * sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(params))

    @jax.jit
    @jax.value_and_grad
    def after(t):
        step = make_step(tx, lambda x: loss(x, t))
        (params, _), _ = jax.lax.scan(
            lambda c, _: (step(*c), None), (start, tx.init(start)), length=2
        )
        return f(params)

    h = 1e-5
    (right, _), (left, _), (_, slope) = map(after, (0.3 + h, 0.3 - h, 0.3))
    np.testing.assert_allclose(slope, (right - left) / (2 * h), rtol=1e-6)


# Training loops -----------------------------------------------------------------------

X = jnp.asarray(np.random.default_rng(0).standard_normal((32, 4)), jnp.float32)
Y = jnp.sum(X, axis=1, keepdims=True)


def small_rate(method):
    rate = method.kwargs["learning_rate"] and 0.1
    return method.factory(**method.kwargs | {"learning_rate": rate})


def check_training(step, loss, params, state):
    step, loss = jax.jit(step), jax.jit(loss)
    first = loss(params)
    for _ in range(20):
        params, state = step(params, state)
    assert loss(params) < 0.8 * first


@every_kind
def test_trains_flax_nnx(method):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(4, use_scale=False, rngs=rngs)
            self.out = nnx.Linear(4, 1, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.tanh(self.norm(x)))

    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, small_rate(method), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def loss_of(params):
            # BatchNorm writes to ``rest``: without a copy Flax raises an error.
            copy = nnx.merge(graph, params, rest, copy=True)
            return jnp.mean((copy(X) - Y) ** 2)

        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(X) - Y) ** 2))(model)
        optimizer.update(model, grads, **with_loss(loss_of))
        return loss

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]


# Its parameters are plain dictionaries.
@pytest.mark.parametrize("name", ["adagrad_bma", "newton_bma"])
def test_trains_flax_linen(name):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(jnp.tanh(nn.Dense(3)(x)))

    model = Net()
    tx = small_rate(BY_NAME[name])

    def loss(params):
        return jnp.mean((model.apply(params, X) - Y) ** 2)

    @jax.jit
    def start():
        params = model.init(jax.random.key(0), X)
        return params, tx.init(params)

    check_training(make_step(tx, loss), loss, *start())


@every_kind
def test_trains_equinox(method):
    model = eqx.nn.MLP(4, 2, 3, 0, final_activation=jnp.tanh, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    tx = small_rate(method)

    def loss(params):
        outputs = jax.vmap(eqx.combine(params, static))(X)
        return jnp.mean((outputs - jnp.broadcast_to(Y, outputs.shape)) ** 2)

    check_training(make_step(tx, loss), loss, params, jax.jit(tx.init)(params))
