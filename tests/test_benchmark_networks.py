"""The benchmark of networks: its peers, its nets, and its way to measure."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.networks import methods, peers
from benchmarks.networks import study as measuring
from benchmarks.networks import tasks as nets


@pytest.fixture(autouse=True)
def promotion_as_in_the_script():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def updates_of(tx, grads):
    """The updates for a sequence of gradients."""
    state = tx.init(grads[0])
    update = jax.jit(tx.update)
    for g in grads:
        updates, state = update(g, state, g)
        yield updates


def gradients(shape, steps, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for _ in range(steps)]


@pytest.mark.parametrize("name", ["dense", nets.EMBEDDINGS])
def test_adam_mini(x64, name):
    kernels, biases = gradients((2, 3, 4), 3), gradients((4,), 3, seed=1)
    if name == nets.EMBEDDINGS:
        kernels = [kernel.reshape(6, 4) for kernel in kernels]
    grads = [
        {name: {"kernel": k, "b": b}} for k, b in zip(kernels, biases, strict=True)
    ]
    m, v, m1, v1 = 0, {}, 0, 0
    every = updates_of(peers.scale_by_adam_mini(0.8, 0.9), grads)
    for t, updates in enumerate(every, start=1):
        kernel, bias = kernels[t - 1], biases[t - 1]
        by_unit = kernel if name == nets.EMBEDDINGS else kernel.reshape(-1, 4).T
        m = 0.8 * m + 0.2 * by_unit
        expected = np.zeros_like(by_unit)
        for unit, row in enumerate(by_unit):
            v[unit] = 0.9 * v.get(unit, 0) + 0.1 * sum(x * x for x in row) / len(row)
            root = np.sqrt(v[unit] / (1 - 0.9**t)) + 1e-8
            expected[unit] = m[unit] / (1 - 0.8**t) / root
        if name != nets.EMBEDDINGS:
            expected = expected.T.reshape(kernel.shape)
        np.testing.assert_allclose(updates[name]["kernel"], expected, rtol=1e-10)
        m1, v1 = 0.8 * m1 + 0.2 * bias, 0.9 * v1 + 0.1 * bias**2
        adam = m1 / (1 - 0.8**t) / (np.sqrt(v1 / (1 - 0.9**t)) + 1e-8)
        np.testing.assert_allclose(updates[name]["b"], adam, rtol=1e-10)


def test_soap(x64):
    """Step by step as in its paper; the square kernel makes bases unique."""
    b1, b2, eps = 0.8, 0.9, 1e-8
    kernels = gradients((2, 2, 4), 6)
    grads = [{"w": kernel, "b": kernel[0, 0]} for kernel in kernels]
    every = list(updates_of(peers.scale_by_soap(b1, b2, eps, interval=2), grads))
    assert not np.any(every[0]["w"]) and not np.any(every[0]["b"])
    g = kernels[0].reshape(4, 4)
    left, right = (1 - b2) * g @ g.T, (1 - b2) * g.T @ g
    rows, columns = np.linalg.eigh(left)[1], np.linalg.eigh(right)[1]
    m = v = 0
    for t in range(1, 6):
        g = kernels[t].reshape(4, 4)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * (rows.T @ g @ columns) ** 2
        rotated = rows.T @ m @ columns / (1 - b1**t)
        step = rows @ (rotated / (np.sqrt(v / (1 - b2**t)) + eps)) @ columns.T
        np.testing.assert_allclose(every[t]["w"].reshape(4, 4), step, atol=1e-8)
        left = b2 * left + (1 - b2) * g @ g.T
        right = b2 * right + (1 - b2) * g.T @ g
        if t % 2:  # The second step of all, the fourth, the sixth.
            first = np.argsort(-np.diag(rows.T @ left @ rows))
            second = np.argsort(-np.diag(columns.T @ right @ columns))
            v = v[first][:, second]
            rows = np.linalg.qr(left @ rows[:, first])[0]
            columns = np.linalg.qr(right @ columns[:, second])[0]
    # Arrays with one axis have Adam from the second step on.
    adam = list(updates_of(optax.scale_by_adam(b1, b2, eps), grads[1:]))
    np.testing.assert_allclose(every[-1]["b"], adam[-1]["b"], rtol=1e-10)


@pytest.mark.benchmark
def test_every_method_goes_down():
    task = nets.make("mlp_raw", None, small=True)
    params = task.init(jax.random.key(0))
    examples = jax.tree.map(lambda array: array[:20], task.train)
    grads = jax.grad(task.loss)(params, examples)
    every = {
        name: method.make(**method.variants()[0])
        for name, method in methods.METHODS.items()
    }

    @jax.jit
    def step(states):
        return {
            name: tx.update(grads, states[name], params) for name, tx in every.items()
        }

    states = {name: tx.init(params) for name, tx in every.items()}
    for _ in range(2):  # SOAP's first step stays where it is.
        found = step(states)
        states = {name: state for name, (_, state) in found.items()}
    for updates, _ in found.values():
        # A rate times a direction is subtracted.
        assert float(optax.tree.vdot(updates, grads)) > 0
    # Twice the same gradient: Adam's update is its sign.
    first = {name: updates["dense0"]["kernel"] for name, (updates, _) in found.items()}
    g = grads["dense0"]["kernel"]
    signs = np.sign(g)
    np.testing.assert_allclose(first["adam"], signs, atol=1e-2)
    shrunk, centered = signs - signs.mean(axis=0), np.sign(g - g.mean(axis=0))
    np.testing.assert_allclose(first["adam_shrunk"], shrunk, atol=1e-2)
    np.testing.assert_allclose(first["adam_centralized"], centered, atol=1e-2)


def test_muon_takes_convolutions_but_not_embeddings():
    shapes = {}
    for name in ("conv", "transformer"):
        task = nets.make(name, None, small=True)
        params = jax.eval_shape(task.init, jax.random.key(0))
        chosen = methods.muon_dimensions(params)
        for path, p in jax.tree.leaves_with_path(params):
            numbers = functools.reduce(lambda tree, key: tree[key.key], path, chosen)
            shapes[jax.tree_util.keystr(path, simple=True, separator="/")] = (
                p.ndim,
                numbers,
            )
    assert shapes["conv1/kernel"][1] == ((0, 1, 2), 3)
    assert shapes["block0_query/kernel"][1] == ((0,), 1)
    assert {name for name, (ndim, numbers) in shapes.items() if numbers is None} == {
        "embedding/token",
        "embedding/position",
        "head/kernel",
    } | {name for name, (ndim, _) in shapes.items() if ndim < 2}


def test_random_directions_stay():
    grads = [{"w": jnp.asarray(g, jnp.float32)} for g in gradients((5, 3), 40)]
    tx = methods.random_directions()
    start = state = tx.init(grads[0])
    update = jax.jit(tx.update)
    for g in grads:
        _, state = update(g, state, g)
    moved = state.direction["w"] - start.direction["w"]
    assert 1e-3 < float(jnp.linalg.norm(start.direction["w"]))
    assert float(jnp.linalg.norm(moved)) < 1e-4


def test_forward_shows_the_inputs_of_every_kernel():
    for name in ("conv_norm", "transformer", "transformer_plain", "mlp_sigmoid_norm"):
        task = nets.make(name, None, small=True)
        params = task.init(jax.random.key(0))
        norms = {"conv_norm": 2, "transformer": 5, "mlp_sigmoid_norm": 1}
        assert sum("scale" in layer for layer in params.values()) == norms.get(name, 0)
        shapes = jax.eval_shape(
            task.forward, params, jax.tree.map(lambda a: a[:2], task.train)
        )[1]
        kernels = {k: p["kernel"].shape for k, p in params.items() if "kernel" in p}
        assert {k: x.shape[-1] for k, x in shapes.items()} == {
            k: int(np.prod(shape[:-1])) for k, shape in kernels.items()
        }


def test_convolution_is_one():
    params = {"c": {"kernel": gradients((3, 3, 2, 4), 1)[0], "bias": np.zeros(4)}}
    x = gradients((2, 5, 6, 2), 1)[0]
    for stride in (1, 2):
        expected = jax.lax.conv_general_dilated(
            jnp.asarray(x, jnp.float32),
            jnp.asarray(params["c"]["kernel"], jnp.float32),
            (stride, stride),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        found = nets.convolution(params, "c", x, stride, {})
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_steps_to_a_loss():
    losses = np.array([np.linspace(20, 1, 20), np.full(20, 3.0)])
    # Over two steps the means are 19.5, 18.5, ...; the last is its own target.
    assert measuring.final(losses).tolist() == [1.5, 3.0]
    assert measuring.steps_to(losses, np.array([15.0, 2.9])) == [7, None]
    assert measuring.steps_to(losses, np.array([1.5, 3.0])) == [20, 2]
