"""What an update costs on many devices: the collectives of the compiled program."""

import functools
import math
import re
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from reference import compiled

import bma_optax as bma

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


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("layout", MESHES)
@pytest.mark.parametrize("name", METHODS)
def test_an_update_sums_once_along_each_axis_of_the_mesh(name, layout, kind):
    tx = METHODS[name]
    shape, axes, specs = MESHES[layout]
    mesh = jax.make_mesh(shape, axes, axis_types=(kind,) * len(axes))
    shardings = {
        key: jax.NamedSharding(mesh, jax.P(*specs.get(key, ()))) for key in SHAPES
    }
    with jax.set_mesh(mesh):
        first = jax.device_put(gradients(0), shardings)
        state = tx.init(first)
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
        ((6, 64), (2, 5), (4,), [(None, "x"), ()], True),
        ((4, 4, 18), (2, 3, 2), (2, 2), [("x", None, "y"), (None, "y", "x")], True),
    ],
    ids=["1-D without jit", "2-D", "3-D"],
)
def test_newton_with_a_reach_on_explicit_axes(shape, tile, mesh, specs, jit):
    """Tiles and levels that do not fit the shards, fields that are sharded unlike."""
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
        traces, state, steps = [], may_jit(tx.init)(params), []
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
    print(len(jax.devices()), updates["a"].sharding.spec[0], float(total))
"""


def test_two_processes_make_the_update_of_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    script = textwrap.dedent(PROCESS)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, address, str(number)],
            env={"JAX_PLATFORMS": "cpu", "PATH": ""},
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
    state, update = tx.init(grads), jax.jit(tx.update)
    for _ in range(2):
        updates, state = update(grads, state)
    for process, (printed, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
        devices, axis, total = printed.splitlines()[-1].split()
        assert (devices, axis) == ("2", "x")
        expected = np.abs(np.asarray(updates["a"])).sum()
        np.testing.assert_allclose(float(total), expected, rtol=1e-5)
