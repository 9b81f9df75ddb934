"""The benchmark of networks: its peers, its nets, and its way to measure."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_benchmark_datasets import write_mnist

import bma_optax as bma
from benchmarks.networks import __main__ as networks
from benchmarks.networks import methods, peers, report
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


@pytest.mark.parametrize("name", ["kernel", nets.EMBEDDING])
def test_scale_along_direction(x64, name):
    """Against a loop over units; an embedding has a unit a row."""
    embedding = name == nets.EMBEDDING
    kernels = gradients((6, 4) if embedding else (2, 3, 4), 4)
    grads = [{name: x, "bias": x.ravel()[:4]} for x in kernels]
    y = np.full(4 if embedding else 6, 1.0)
    y /= np.linalg.norm(y)
    for x, updates in zip(
        kernels, updates_of(peers.scale_along_direction(0.3, 0.8), grads), strict=True
    ):
        units = x if embedding else x.reshape(6, 4).T
        q = y / np.linalg.norm(y)
        expected = np.array([unit + (0.3 - 1) * (unit @ q) * q for unit in units])
        found = updates[name]
        found = found if embedding else found.reshape(6, 4).T
        np.testing.assert_allclose(found, expected, rtol=1e-10)
        np.testing.assert_array_equal(updates["bias"], x.ravel()[:4])
        target = sum((unit @ q) * unit for unit in units)
        y = 0.8 * y + 0.2 * target / np.linalg.norm(target)
    nothing = {name: 0 * kernels[0]}
    tx = peers.scale_along_direction(0.0)
    updates, state = tx.update(nothing, tx.init(nothing))
    assert not np.any(updates[name]) and np.all(np.isfinite(state.direction[name]))


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
    # Arrays with one axis have Adam from the second step on, and where all is too long.
    adam = list(updates_of(optax.scale_by_adam(b1, b2, eps), grads[1:]))
    np.testing.assert_allclose(every[-1]["b"], adam[-1]["b"], rtol=1e-10)
    plain = list(updates_of(peers.scale_by_soap(b1, b2, eps, 2, longest=3), grads))
    np.testing.assert_allclose(plain[-1]["w"], adam[-1]["w"], rtol=1e-10)


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
    signs = np.sign(grads["dense0"]["kernel"])
    np.testing.assert_allclose(first["adam"], signs, atol=1e-2)
    # Its second step has the rate 1 / √2.
    np.testing.assert_allclose(first["adam_decayed"], signs / np.sqrt(2), atol=1e-2)
    # One block alone, or c = 1, would be the diagonal method.
    for name in ("adagrad_bma", "units_constant", "units_learned", "units_report"):
        assert np.abs(first[name] - first["adagrad"]).max() > 1e-5


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
        "token/embedding",
        "position/embedding",
        "head/kernel",
    } | {name for name, (ndim, _) in shapes.items() if ndim < 2}


def test_units_of_the_library_are_those_of_the_nets():
    """``bma.units`` and the peers find the same axis of units by names."""
    for name in ("conv_norm", "transformer"):
        params = nets.make(name, None, small=True).init(jax.random.key(0))
        arrays = bma.partition(params, bma.units).arrays
        leaves = jax.tree.leaves_with_path(params)
        for array, (path, p) in zip(arrays, leaves, strict=True):
            units = p.shape[peers.axes(path, p)[1]] if p.ndim > 1 else 0
            assert array.num_blocks == units


def test_files(tmp_path):
    write_mnist(tmp_path, zipped=True)
    task = nets.make("mnist", tmp_path, small=True)
    params = task.init(jax.random.key(0))
    assert params["conv1"]["kernel"].shape == (3, 3, 4, 4)
    assert params["dense0"]["kernel"].shape == (3 * 2 * 4, 10)
    assert len(task.train[0]) == 7 and task.loss(params, task.test) > 0
    parse = networks.parse
    assert parse(["--data-dir", "x"]).tasks == nets.FILES == ("mnist", "cifar10")
    assert parse([]).tasks == nets.TASKS and parse(["--tasks", "conv"]).tasks == [
        "conv"
    ]


def test_tuning_takes_the_mean_over_its_seeds():
    """A rate that diverges on one seed is not chosen for what it does on others."""
    calls = []

    class Trainer:
        method = methods.METHODS["adagrad"]

        def __call__(self, seeds, rates, settings):
            calls.append(set(zip(seeds.tolist(), np.log2(rates).tolist(), strict=True)))
            losses = np.abs(np.log2(rates) + 5)  # Best at 2^-5, but
            losses[(seeds == 100) & (np.log2(rates) == -5)] = np.nan
            losses[(seeds == 200) & (np.log2(rates) == -6)] = 0.5
            return (np.repeat(losses[:, None], 20, axis=1),)

    tuned = measuring.tune(Trainer())
    assert calls == [set(itertools.product((0, 100, 200), range(-8, -2)))]
    assert tuned["rate"] == 2.0**-6 and tuned["interior"]


def test_summary():
    def row(losses):
        return {"train_loss": losses}

    task = {"methods": {"adam": row([4.0, 4.0]), "soap": row([0.0, 4.0])}}
    task["methods"] |= {"units_learned": row([3.0, 3.5]), "muon_rms": row([1, None])}
    lines = report.summary({"conv": task}).splitlines()[3:]
    cells = [line.split("|")[2].strip() for line in lines[2:]]
    # The mean is bold where both seeds are below Adam.
    assert cells == ["4", "**3.25**", "2", "diverged", "38%"]


def test_nets_have_the_layers_that_their_names_say():
    for name, norms in {"conv": 0, "conv_norm": 2, "transformer": 5}.items():
        task = nets.make(name, None, small=True)
        params = jax.eval_shape(task.init, jax.random.key(0))
        assert sum("scale" in layer for layer in params.values()) == norms
        loss = jax.eval_shape(
            task.loss, params, jax.tree.map(lambda a: a[:2], task.train)
        )
        assert loss.shape == ()


def test_convolution_is_one():
    params = {"kernel": gradients((3, 3, 2, 4), 1)[0], "bias": np.zeros(4)}
    x = gradients((2, 5, 6, 2), 1)[0]
    for stride in (1, 2):
        expected = jax.lax.conv_general_dilated(
            jnp.asarray(x, jnp.float32),
            jnp.asarray(params["kernel"], jnp.float32),
            (stride, stride),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        found = nets.convolution(params, x, stride)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_steps_to_a_loss():
    losses = np.array([np.linspace(20, 1, 20), np.full(20, 3.0)])
    # Over two steps the means are 19.5, 18.5, ...; the last is its own target.
    assert measuring.final(losses).tolist() == [1.5, 3.0]
    assert measuring.steps_to(losses, np.array([15.0, 2.9])) == [7, None]
    assert measuring.steps_to(losses, np.array([1.5, 3.0])) == [20, 2]
