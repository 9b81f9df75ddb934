"""The benchmark of networks: its peers, its way to measure, and a short run."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bma_optax as bma
from benchmarks.networks import __main__ as networks
from benchmarks.networks import methods, peers, variants
from benchmarks.networks import shrinkage as networks_shrinkage
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


def test_correlations_are_shrunk_by_their_noise():
    """Not at all where every gradient is the same, nearly out where signs are drawn."""
    rng = np.random.default_rng(0)
    grads = jnp.asarray(rng.standard_normal((3, 4)), jnp.float32)
    params = {"a": grads[:2], "b": grads[2]}
    tx = networks_shrinkage.scale_by_shrunk_adam_bma(b2=0.99)
    plain = bma.scale_by_adam_bma(b2=0.99)
    states, update = (tx.init(params), plain.init(params)), jax.jit(tx.update)
    for _ in range(5):
        updates, first = update(params, states[0])
        expected, second = plain.update(params, states[1])
        states = first, second
    assert states[0].shrinkage < 1e-4
    for x, y in zip(*map(jax.tree.leaves, (updates, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)
    state = tx.init(params)
    for _ in range(100):
        drawn = {name: rng.choice([-1.0, 1.0]) * x for name, x in params.items()}
        drawn = jax.tree.map(lambda x: x.astype("float32"), drawn)
        _, state = update(drawn, state)
    assert state.shrinkage > 0.2


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


def test_variants_of_mini_bma(x64):
    kernels, biases = gradients((3, 2, 5), 8), gradients((5,), 8, seed=1)
    grads = [{"w": k + 0.5, "b": b} for k, b in zip(kernels, biases, strict=True)]
    grads[4]["w"][0, 0, 0] = np.nan  # One unit is left out.
    plain = list(updates_of(methods.mini_bma(), grads))
    every = [variants.scale_by_mini_bma_of(1, methods.UNITS)]
    for whiten in (0.0, 1.0):
        every.append(
            variants.scale_by_two_sided_mini_bma(methods.UNITS, whiten, factor=1.0)
        )
    for tx in every:
        for found, expected in zip(updates_of(tx, grads), plain, strict=True):
            for key in expected:
                np.testing.assert_allclose(found[key], expected[key], rtol=1e-9)


def test_directions_of_inputs_are_orthonormal(x64):
    """And four of them as in their formula."""
    kernels = [k + 0.5 for k in gradients((3, 2, 5), 6)]
    tx = variants.scale_by_mini_bma_of(4, methods.UNITS)
    state, update = tx.init({"w": kernels[0]}), jax.jit(tx.update)
    Y, h, M, m = np.array(state.direction["w"]).reshape(4, 6).T, 0, 0, 0
    for t, kernel in enumerate(kernels, start=1):
        Q = variants.orthonormal(state.direction["w"], (0, 1)).reshape(4, 6)
        np.testing.assert_allclose(Q @ Q.T, np.eye(4), atol=1e-12)
        updates, state = update({"w": kernel}, state)
        G, (Q, triangle) = kernel.reshape(6, 5).T, np.linalg.qr(Y)
        Q = Q * np.sign(np.diag(triangle))  # Those of Gram and Schmidt are Y's.
        h, M = 0.99 * h + 0.01 * np.sum(G**2, 1), 0.99 * M + 0.01 * (G @ Q) ** 2
        m = 0.9 * m + 0.1 * G
        Lambda = np.maximum((h - M.sum(1)) / 2, 1e-3 * h / 6)[:, None]
        r = m + np.minimum((Lambda / M) ** 0.5 - 1, 0) * (m @ Q) @ Q.T
        r *= np.sqrt((1 - 0.99**t) / Lambda) / (1 - 0.9**t)
        np.testing.assert_allclose(updates["w"].reshape(6, 5).T, r, rtol=1e-5)
        target = G.T @ G @ Q
        Y = 0.95 * Y + 0.05 * target / np.linalg.norm(target, axis=0)


@pytest.mark.parametrize("whiten", [0.0, 1.0])
def test_a_direction_of_units(x64, whiten):
    kernels = [k + 0.5 for k in gradients((6, 5), 6)]
    tx = variants.scale_by_two_sided_mini_bma(methods.UNITS, whiten)
    plain = list(updates_of(methods.mini_bma(), kernels))
    q, y, h, M, c, N = np.ones(6) / 6**0.5, np.ones(5) / 5**0.5, 0, 0, 0, 0
    for t, updates in enumerate(updates_of(tx, kernels), start=1):
        G, R, p = kernels[t - 1].T, plain[t - 1].T, y / np.linalg.norm(y)
        v = q / np.linalg.norm(q)
        h, M = 0.99 * h + 0.01 * np.sum(G**2, 1), 0.99 * M + 0.01 * (G @ v) ** 2
        Lambda = np.maximum((h - M) / 5, 1e-3 * h / 6)
        W = G
        if whiten:
            W = G + np.outer(np.minimum((Lambda / M) ** 0.5 - 1, 0) * (G @ v), v)
            W = W / np.sqrt(Lambda / (1 - 0.99**t))[:, None]
        c, N = 0.99 * c + 0.01 * np.sum(W**2, 0), 0.99 * N + 0.01 * (p @ W) ** 2
        L = np.maximum((c - N) / 4, 1e-3 * c / 5)
        R = R + np.outer(p, np.minimum((L / N) ** 0.5 - 1, 0) * (p @ R))
        np.testing.assert_allclose(updates.T, R, rtol=1e-9)
        turned, target = G.T @ (G @ v), W @ (W.T @ p)
        q = 0.95 * q + 0.05 * turned / np.linalg.norm(turned)
        y = 0.95 * y + 0.05 * target / np.linalg.norm(target)


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


class Valley:
    """In the place of a trainer: the loss is the distance to one power of 2."""

    def __init__(self, best):
        self.best, self.calls = best, 0
        self.method = methods.Method("valley", None, {"b2": (0.5, 0.9)}, start=-8)

    def __call__(self, seeds, rates, settings):
        self.calls += 1
        losses = np.abs(np.log2(rates) - self.best) + settings["b2"]
        losses[np.array(rates) > 2.0**8] = np.nan
        return np.tile(losses[:, None], 20), losses


@pytest.mark.parametrize(("best", "calls"), [(-8, 2), (-2, 3), (-20, 4)])
def test_grids_grow_until_the_best_rate_is_inside(best, calls):
    valley = Valley(best)
    found = measuring.tune(valley, seed=0)
    assert found["rate"] == 2.0**best and found["interior"]
    assert found["settings"] == {"b2": 0.5} and valley.calls == calls


def test_a_grid_without_an_end_says_so():
    assert not measuring.tune(Valley(-100), seed=0)["interior"]


def test_steps_to_a_loss():
    losses = np.array([np.linspace(20, 1, 20), np.full(20, 3.0)])
    # Over two steps the means are 19.5, 18.5, ...; the last is its own target.
    assert measuring.final(losses).tolist() == [1.5, 3.0]
    assert measuring.steps_to(losses, np.array([15.0, 2.9])) == [7, None]
    assert measuring.steps_to(losses, np.array([1.5, 3.0])) == [20, 2]


def test_short_run_goes_on(tmp_path, capsys):
    path = tmp_path / "networks.json"
    options = ["--small", "--tasks", "mlp_raw", "--repeats", "1", "--out", str(path)]
    options += ["--methods", "mini_bma", "adam_mini"]
    networks.main(options)
    before = json.loads(path.read_text())
    lost = before["tasks"]["mlp_raw"]["methods"].pop("adam_mini")
    path.write_text(json.dumps(before))
    networks.main(options)
    content = json.loads(path.read_text())
    task = content["tasks"]["mlp_raw"]
    assert content["versions"]["jax"] and content["device"] and content["cores"]
    assert set(task["methods"]) == {"adam", "adam_mini", "mini_bma"}
    found = dict(task["methods"])
    for key in ("tuning", "train_loss", "test_loss", "steps_to_adam"):
        assert found["adam_mini"][key] == lost[key]
    del found["adam_mini"]  # The others are not run again.
    assert found == before["tasks"]["mlp_raw"]["methods"]
    for name, row in task["methods"].items():
        tuned, timed = row["tuning"], task["timings"][name]
        grid = next(g for g in tuned["grids"] if g["settings"] == tuned["settings"])[
            "losses"
        ]
        rates = [float(rate) for rate in grid]
        assert rates == sorted(rates) and len(rates) >= measuring.RATES
        assert tuned["interior"] == (min(rates) < tuned["rate"] < max(rates))
        assert min(x for x in grid.values() if x) == grid[str(tuned["rate"])]
        assert len(row["train_loss"]) == len(row["test_loss"]) == 6
        assert timed["seconds_per_step"] > 0 and timed["compile_seconds"] > 0
    d, timed = task["parameters"], task["timings"]
    assert d == 64 * 6 + 6 + 6 * 10 + 10
    # Two moments and a count; one moment and a number a unit.
    assert timed["adam"]["state_over_params"] == pytest.approx(2 + 1 / d, rel=1e-4)
    mini = 1 + (6 + 6 + 10 + 10 + 1) / d
    assert timed["adam_mini"]["state_over_params"] == pytest.approx(mini, rel=1e-4)
    assert set(content["costs"]["methods"]) == {"adam", "adam_mini", "mini_bma"}
    looks = task["methods"]["mini_bma"]["angles"]
    assert set(looks) == {"dense0", "dense1"}
    for row in looks.values():
        for key in ("mean", "top", "share"):
            assert all(0 <= x <= 1 + 1e-5 for x in row[key])
    printed = capsys.readouterr().out
    for name in ("Adam", "Adam-mini", "mini-BMA, learned weights"):
        assert f"\n| {name} |" in printed
    assert path.with_suffix(".png").exists()
    with pytest.raises(SystemExit, match="other settings"):
        networks.main([*options, "--seeds", "2"])
