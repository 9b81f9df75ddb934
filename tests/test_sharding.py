"""What an update costs on many devices: the collectives of the compiled program."""

import contextlib
import functools
import math
import os
import re
import socket
import subprocess
import sys
import textwrap
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType
from reference import compiled

import bma_optax as bma
from benchmarks.harness import hlo

COLLECTIVE = re.compile(
    r"= (.+?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)"
    r"(?:-start)?\("
)
SHAPES = {"a": (16, 8), "b": (8,), "c": (8, 4), "d": (4,), "e": ()}
MESHES = {
    "FSDP": ((4,), ("data",), {"a": ("data",), "b": ("data",), "c": ("data",)}),
    "2-D": (
        (2, 2),
        ("data", "model"),
        {"a": ("data", "model"), "b": ("model",), "c": (None, "model"), "d": ("data",)},
    ),
}
METHODS = {
    "left": bma.scale_by_bma(),
    "symmetric": bma.scale_by_bma(form="symmetric"),
    "adam": bma.scale_by_adam_bma(),
}


def gradients(seed):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(np.asarray(rng.standard_normal(shape)), jnp.float32)
        for name, shape in SHAPES.items()
    }


@functools.cache
def second_update(name):
    """On one device."""
    tx = METHODS[name]
    update, state = jax.jit(tx.update), jax.jit(tx.init)(gradients(0))
    for seed in range(2):
        updates, state = update(gradients(seed), state)
    return jax.device_get(updates)


@pytest.mark.parametrize(
    ("name", "layout", "kind"),
    [
        ("left", "FSDP", AxisType.Auto),
        ("left", "FSDP", AxisType.Explicit),
        ("left", "2-D", AxisType.Auto),
        ("left", "2-D", AxisType.Explicit),
        ("symmetric", "2-D", AxisType.Explicit),
        ("adam", "FSDP", AxisType.Auto),
        ("adam", "2-D", AxisType.Explicit),
    ],
    ids=str,
)
def test_an_update_sums_once_along_each_axis_of_the_mesh(name, layout, kind):
    tx = METHODS[name]
    shape, axes, specs = MESHES[layout]
    mesh = jax.make_mesh(shape, axes, axis_types=(kind,) * len(axes))
    shardings = {
        key: jax.NamedSharding(mesh, jax.P(*specs.get(key, ()))) for key in SHAPES
    }
    with jax.set_mesh(mesh):
        first = jax.device_put(gradients(0), shardings)
        state = jax.jit(tx.init)(first)
        update = jax.jit(tx.update).lower(first, state).compile()
        found = COLLECTIVE.findall(update.as_text())
        assert {kind for _, kind in found} == {"all-reduce"}
        assert len(found) <= len(axes)
        for shapes, _ in found:
            dimensions = re.findall(r"\w+\[([\d,]*)\]", shapes)
            numbers = sum(
                math.prod(map(int, re.findall(r"\d+", x))) for x in dimensions
            )
            assert numbers <= 3 * len(SHAPES)
        updates, state = update(first, state)
        updates, state = update(jax.device_put(gradients(1), shardings), state)
    for key, wanted in second_update(name).items():
        np.testing.assert_allclose(updates[key], wanted, rtol=1e-4, atol=1e-6)


SHARDS = r"elements along axis \d, and tiles of \d do not divide"


def optional_warning(message):
    if message is None:
        return contextlib.nullcontext()
    return pytest.warns(UserWarning, match=message)


def springs(fields):
    """Neighbours hold each other, along every axis, and fields their like."""
    total = 0.0
    for u in fields.values():
        for axis in range(u.ndim):
            first = jax.lax.broadcasted_iota(jnp.int32, u.shape, axis) == 0
            total += jnp.sum(jnp.where(first, 0, u - jnp.roll(u, 1, axis)) ** 2)
    a, *others = fields.values()
    total = total + jnp.sum(jnp.cosh(a - 0.5))
    return total + sum(jnp.sum((a - b) ** 2) for b in others)


@pytest.mark.parametrize(
    ("shape", "tile", "mesh", "specs", "jit"),
    [
        ((200,), (3,), (1, 1), [(("x", "y"),)], False),
        ((6, 66), (2, 5), (2, 2), [("y", "x"), ("x",)], True),
        ((4, 4, 30), (2, 3, 4), (2, 2), [("x", None, "y")], True),
    ],
    ids=["1-D without jit", "2-D", "3-D"],
)
def test_newton_with_a_reach_on_explicit_axes(shape, tile, mesh, specs, jit):
    """Tiles and levels that do not fit the shards, fields that are sharded unlike.

    ``init`` warns where a shard is not whole tiles.
    """
    many = math.prod(mesh) > 1
    axes = ("x", "y")[: len(mesh)]
    # Without jit one device: see test_sharding_is_stable.
    mesh = jax.make_mesh(
        mesh,
        axes,
        axis_types=(AxisType.Explicit,) * len(axes),
        devices=jax.devices()[: math.prod(mesh)],
    )
    rng = np.random.default_rng(0)
    shardings = {
        name: jax.NamedSharding(mesh, jax.P(*spec))
        for name, spec in zip("ab", specs, strict=False)
    }
    local = {
        name: jnp.asarray(rng.standard_normal(shape), "float32") for name in shardings
    }
    tx = bma.newton_bma(bma.per_tile(tile, reach=1), update_interval=1)

    def run(params, loss, jit, grads):
        def update(grads, state, params):
            traces.append(1)
            return tx.update(grads, state, params, value_fn=lambda p: loss(p))

        may_jit = jax.jit if jit else lambda f: f
        with optional_warning(SHARDS if many and loss is not springs else None):
            state = may_jit(tx.init)(params)
        traces, steps = [], []
        for step in range(2 if jit else 3):
            compiled.clear()
            updates, new = may_jit(update)(grads, state, params)
            assert jax.tree.map(jax.typeof, (updates, new)) == jax.tree.map(
                jax.typeof, (params, state)
            )
            state, params = new, may_jit(optax.apply_updates)(params, updates)
            steps.append(updates)
            assert step < 2 or not compiled  # Without jit nothing is compiled twice.
        assert len(traces) == (1 if jit else 3)
        return jax.device_get(steps[:2])

    grads = jax.jit(jax.grad(springs))(local)
    expected = run(local, springs, True, grads)
    with jax.set_mesh(mesh):
        params, grads = jax.device_put((local, grads), (shardings, shardings))
        loss = jax.sharding.auto_axes(springs, out_sharding=jax.P())
        found = run(params, loss, jit, grads)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)


def test_types_without_blocks_and_beside_an_array_on_no_mesh():
    tx = bma.scale_by_newton_bma(bma.by_path({"": None}))
    mesh, sharding = meshed((4,), AxisType.Explicit)
    params = {"u": jax.device_put(jnp.ones((8, 2)), sharding), "v": jnp.ones(3)}

    def squares(params):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))

    loss = jax.sharding.auto_axes(squares, out_sharding=jax.P())
    with jax.set_mesh(mesh):
        state = jax.eval_shape(tx.init, params)
        update = functools.partial(tx.update, value_fn=loss)
        updates, new = jax.eval_shape(update, params, state, params)
    types = functools.partial(jax.tree.map, lambda x: str(jax.typeof(x)))
    assert types(new) == types(state)
    assert updates["u"].sharding.spec == jax.P("x", None)


def meshed(lengths, kind):
    axes = ("x", "y")[: len(lengths)]
    mesh = jax.make_mesh(lengths, axes, axis_types=(kind,) * len(axes))
    return mesh, jax.NamedSharding(mesh, jax.P(*axes, *[None] * (2 - len(axes))))


def loss_on(kind):
    if kind == AxisType.Auto:
        return springs
    return jax.sharding.auto_axes(springs, out_sharding=jax.P())


def grid_step(kind):
    """A transformation with a refresh at every third step, and its whole step."""
    rule, loss = bma.per_tile((4, 4), reach=1), loss_on(kind)
    direction = bma.scale_by_newton_bma(rule, update_interval=3)
    tx = optax.chain(direction, optax.trace(0.45), optax.scale(-0.5))

    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params, value_fn=loss)
        return optax.apply_updates(params, updates), state

    return tx, step


@functools.cache
def grid_start():
    return np.random.default_rng(0).standard_normal((256, 256)).astype("float32")


@functools.cache
def ten_steps_on_one_device():
    tx, step = grid_step(AxisType.Auto)
    params = {"u": jnp.asarray(grid_start())}
    state, step = jax.jit(tx.init)(params), jax.jit(step)
    for _ in range(10):
        params, state = step(params, state)
    return np.asarray(params["u"])


@functools.cache
def grid_program(lengths, kind):
    """The mesh, a compiled step, and the parameters and the state that it starts at."""
    tx, step = grid_step(kind)
    mesh, sharding = meshed(lengths, kind)
    with jax.set_mesh(mesh):
        params = {"u": jax.device_put(grid_start(), sharding)}
        # Without jit: under it XLA may put the trace of Optax elsewhere.
        start = params, tx.init(params)
        return mesh, jax.jit(step).lower(*start).compile(), start


every_mesh = pytest.mark.parametrize(
    ("lengths", "kind"),
    [((4,), AxisType.Auto), ((2, 2), AxisType.Explicit)],
    ids=str,
)


@every_mesh
def test_a_step_on_a_grid_sends_halos_alone(lengths, kind):
    mesh, step, start = grid_program(lengths, kind)
    # No gather of a number for each block, in any branch: they are 1/16 of a grid.
    sizes = [
        4 * math.prod(map(int, re.findall(r"\d+", lengths)))
        for shapes, kind in COLLECTIVE.findall(step.as_text())
        for lengths in re.findall(r"\w+\[([\d,]*)\]", shapes)
        if kind != "collective-permute"
    ]
    assert max(sizes) < grid_start().nbytes / 16
    # Two rows of the grid and as many columns are a halo.
    halo = 2 * 256 * 4
    seldom = "refresh", "more_probes"
    sent = hlo.total(hlo.collectives(step, without=seldom))
    assert sent < 20 * halo
    # A refresh sends what its products do and a quarter: each takes one halo and gives
    # one.
    both = hlo.total(hlo.collectives(step, without=("more_probes",)))
    (grid,) = bma.partition(start[0], bma.per_tile((4, 4), reach=1)).grids
    assert both - sent < 1.25 * grid.num_products * 2 * halo
    with jax.set_mesh(mesh):
        params, state = start
        # A fourth of everything that has the size of a level is on each device.
        shares = {
            "K": state[0].K[0].smoother,
            "N": state[0].N[0],
            "Lambda": state[0].Lambda[0],
            "z": state[0].inverse_diagonal["u"],
        }
        for name, x in shares.items():
            assert x.addressable_shards[0].data.size * 4 == x.size, name
        # One compilation: a step leaves everything where it was.
        for _ in range(10):
            params, state = step(params, state)
        for x, y in zip(*map(jax.tree.leaves, (start, (params, state))), strict=True):
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
            assert jax.typeof(x) == jax.typeof(y)
    assert state[0].refreshes == 4
    np.testing.assert_allclose(
        params["u"], ten_steps_on_one_device(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["adagrad_bma", "adam_bma", "mini_bma", "newton_bma"])
def test_after_an_init_without_jit_a_step_compiles_once(name):
    tx = getattr(bma, name)(learning_rate=0.1)
    _, sharding = meshed((4,), AxisType.Auto)
    params = jax.device_put(gradients(0)["a"], sharding)
    update = jax.jit(functools.partial(tx.update, value_fn=lambda p: jnp.sum(p**2)))
    state = tx.init(params)
    for _ in range(3):
        _, state = update(params, state, params)
    assert update._cache_size() == 1


@every_mesh
def test_a_saved_step_goes_on_where_it_was(lengths, kind, tmp_path):
    mesh, step, pair = grid_program(lengths, kind)
    with jax.set_mesh(mesh), ocp.StandardCheckpointer() as checkpointer:
        pair = step(*pair)
        checkpointer.save(tmp_path / "state", pair)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(
            tmp_path / "state", jax.tree.map(ocp.utils.to_shape_dtype_struct, pair)
        )
        after, again = step(*pair), step(*restored)
    for x, y in zip(*map(jax.tree.leaves, (after, again)), strict=True):
        assert x.sharding == y.sharding
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_preconditioner_made_inside_jit_lies_where_its_vectors_do(kind):
    mesh, sharding = meshed((4,), kind)
    loss, rule = loss_on(kind), bma.per_tile((4, 4), reach=1)

    def made(x):
        def product(v):
            return jax.jvp(jax.grad(loss), ({"u": x},), ({"u": v},))[1]["u"]

        return bma.preconditioner(product, x, rule)

    with jax.set_mesh(mesh):
        x = jax.device_put(grid_start()[:96, :96], sharding)
        C = jax.jit(made)(x)
        y = jax.jit(lambda C, x: C(x))(C, x)
    for array in (C.inverse_diagonal, C.N[0], C.K[0].smoother, y):
        assert array.addressable_shards[0].data.size * 4 == array.size
    alone = jnp.asarray(grid_start()[:96, :96])
    expected = jax.jit(lambda x: made(x)(x))(alone) if kind == AxisType.Auto else y
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-6)


def test_an_exported_step_goes_on_where_it_was():
    tx, step = grid_step(AxisType.Auto)
    mesh, sharding = meshed((4,), AxisType.Auto)
    with jax.set_mesh(mesh), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # A warning at run time cannot be exported.
        params = {"u": jax.device_put(grid_start()[:96, :96], sharding)}
        state = tx.init(params)
        leaves, treedef = jax.tree.flatten((params, state))

        def flat(leaves):
            return jax.tree.leaves(step(*jax.tree.unflatten(treedef, leaves)))

        exported = jax.export.export(jax.jit(flat))(leaves).serialize()
        again = jax.export.deserialize(exported)
        expected, found = jax.jit(flat)(leaves), jax.jit(again.call)(leaves)
    assert again.nr_devices == 4
    for x, y, start in zip(found, expected, leaves, strict=True):
        assert x.sharding.is_equivalent_to(start.sharding, x.ndim)
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "tx",
    [
        bma.scale_by_bma(bma.units, weights="learned"),
        bma.scale_by_adam_bma(),
        bma.scale_by_mini_bma(),
        bma.newton_bma(),
    ],
    ids=["AdaGrad", "Adam", "mini", "Newton"],
)
def test_a_state_made_inside_jit_lies_where_the_parameters_do(tx):
    """Even though no type tells where that is: the axes are automatic."""
    mesh, sharding = meshed((4,), AxisType.Auto)
    params = {"kernel": jax.device_put(jnp.ones((16, 6), "bfloat16"), sharding)}
    state = jax.jit(tx.init)(params)
    whole = [x for x in jax.tree.leaves(state) if x.shape == (16, 6)]
    assert whole and all(x.addressable_shards[0].data.shape == (4, 6) for x in whole)


TILED = {
    "AdaGrad": bma.scale_by_bma(bma.per_tile((64, 64))),
    "Adam": bma.scale_by_adam_bma(partition=bma.per_tile((64, 64))),
    "learned": bma.scale_by_bma(
        bma.within("block", bma.per_tile((64, 32))), weights="learned"
    ),
    "mini": bma.scale_by_mini_bma(partition=bma.per_tile((64, 32))),
}


@pytest.mark.parametrize("name", TILED)
def test_tiles_on_explicit_axes_gather_block_sums_alone(name):
    tx = TILED[name]
    mesh, sharding = meshed((4,), AxisType.Explicit)
    grads = {"u": jnp.asarray(grid_start())}
    expected = jax.jit(lambda grads: tx.update(grads, tx.init(grads)))(grads)
    with jax.set_mesh(mesh):
        grads = jax.device_put(grads, sharding)
        state = jax.jit(tx.init)(grads)
        update = jax.jit(tx.update).lower(grads, state).compile()
        updates, new = update(grads, state)
    gathers = [x for x in hlo.collectives(update) if x.kind == "all-gather"]
    assert max((x.bytes for x in gathers), default=0) <= 4 * 32
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
    for x, y in zip(*map(jax.tree.leaves, ((updates, new), expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


PROCESS = """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    import bma_optax as bma

    address, number = sys.argv[1], int(sys.argv[2])
    jax.distributed.initialize(address, 2, number, initialization_timeout=60)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    whole = np.arange(8, dtype=np.float32).reshape(4, 2) - 2
    grads = {
        "a": jax.make_array_from_callback(whole.shape, sharding, lambda i: whole[i]),
        "b": jax.make_array_from_callback((4,), sharding, lambda i: whole[i[0], 0]),
    }
    tx = bma.scale_by_bma()
    state = jax.jit(tx.init)(grads)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(grads, state)
    total = jax.jit(lambda x: jnp.sum(jnp.abs(x)))(updates["a"])

    # A field on a grid, on explicit axes.
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    whole = np.sin(np.arange(576, dtype=np.float32)).reshape(24, 24)

    def loss(u):
        squares = [(u - jnp.roll(u, 1, axis)) ** 2 for axis in (0, 1)]
        return jnp.sum(sum(squares) + u**2)

    f = jax.sharding.auto_axes(loss, out_sharding=jax.P())
    tx = bma.scale_by_newton_bma(bma.per_tile((2, 2), reach=1))
    with jax.set_mesh(mesh):
        u = jax.make_array_from_callback(whole.shape, sharding, lambda i: whole[i])
        state = jax.jit(tx.init)(u)
        update = jax.jit(lambda u, s: tx.update(jax.grad(f)(u), s, u, value_fn=f))
        direction, new = update(u, state)
        same = jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
        norm = jax.jit(lambda x: jnp.sum(jnp.abs(x)))(direction)
    print(
        len(jax.devices()),
        updates["a"].sharding.spec[0],
        float(total),
        same,
        jax.typeof(direction).sharding.spec[0],
        float(norm),
    )
"""


def test_two_processes_make_the_update_of_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    script = textwrap.dedent(PROCESS)
    flags = re.sub("device_count=[0-9]+", "device_count=1", os.environ["XLA_FLAGS"])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, address, str(number)],
            env={"JAX_PLATFORMS": "cpu", "PATH": "", "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    whole = np.arange(8, dtype=np.float32).reshape(4, 2) - 2
    grads = {"a": jnp.asarray(whole), "b": jnp.asarray(whole[:, 0])}
    tx = bma.scale_by_bma()
    state, update = jax.jit(tx.init)(grads), jax.jit(tx.update)
    for _ in range(2):
        updates, state = update(grads, state)
    u = np.sin(np.arange(576, dtype="float32")).reshape(24, 24)

    def loss(u):
        squares = [(u - jnp.roll(u, 1, axis)) ** 2 for axis in (0, 1)]
        return jnp.sum(sum(squares) + u**2)

    newton = bma.scale_by_newton_bma(bma.per_tile((2, 2), reach=1))

    @jax.jit
    def first(u):
        return newton.update(jax.grad(loss)(u), newton.init(u), u, value_fn=loss)

    direction, _ = first(u)
    for process, (printed, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
        devices, *found = printed.splitlines()[-1].split()
        axis, total, same, grid_axis, norm = found
        assert (devices, axis, same, grid_axis) == ("2", "x", "True", "x")
        expected = np.abs(np.asarray(updates["a"])).sum()
        np.testing.assert_allclose(float(total), expected, rtol=1e-5)
        np.testing.assert_allclose(float(norm), np.abs(direction).sum(), rtol=1e-4)
