"""State that survives: checkpoints, other processes, other devices, compositions."""

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from jax.sharding import NamedSharding, PartitionSpec
from methods import BY_NAME, every_method

import bma_optax as bma

HERE = Path(__file__).parent
PARAMS = {
    "a": {"w": -jnp.ones((8, 4)), "b": jnp.arange(8.0)},
    "c": jnp.linspace(-1.0, 1.0, 16),
}


def loss(params):
    leaves = jax.tree.leaves(params)
    squares = sum(jnp.sum((x - 0.3) ** 2 + jnp.cos(x) / 2) for x in leaves)
    return squares + 0.01 * sum(jnp.sum(x) for x in leaves) ** 2


value = jax.jit(loss)


def make_step(tx):
    def step(params, state):
        updates, state = tx.update(
            jax.grad(loss)(params), state, params, value_fn=loss, loss_of=loss
        )
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def jitted_step(tx):
    return jax.jit(make_step(tx))


def steps(tx, params, state, count):
    step = jitted_step(tx)
    for _ in range(count):
        params, state = step(params, state)
    return params, state


def raw(tree):
    """The tree with arrays of NumPy."""
    return jax.tree.map(np.asarray, tree)


def by_name():
    return {name: method.build() for name, method in BY_NAME.items()}


def some():
    """One transformation of each kind, since compiling takes time."""
    names = "adagrad_bma", "adam_bma learned", "mini_bma", "newton_bma"
    return {name: by_name()[name] for name in names}


def save(folder, pair):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, pair)


def restore(folder, like):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder, like)


def elsewhere(code: str, *arguments) -> subprocess.CompletedProcess:
    """Python in a process of its own, with this folder on its path."""
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


RESUME = """
import conftest, pickle, sys
from pathlib import Path
import jax, test_survival as t
folder = Path(sys.argv[1])
found = {}
for name, tx in t.some().items():
    like = t.PARAMS, jax.jit(tx.init)(t.PARAMS)
    params, state = t.restore(folder / name.replace(" ", "_"), like)
    found[name] = t.raw(jax.tree.leaves(t.steps(tx, params, state, 2)))
(folder / "found.pickle").write_bytes(pickle.dumps(found))
"""


def test_another_process_goes_on_bit_for_bit(tmp_path):
    import pickle

    expected = {}
    for name, tx in some().items():
        pair = steps(tx, PARAMS, jax.jit(tx.init)(PARAMS), 3)
        save(tmp_path / name.replace(" ", "_"), pair)
        expected[name] = raw(jax.tree.leaves(steps(tx, *pair, 2)))
    done = elsewhere(RESUME, tmp_path)
    assert done.returncode == 0, done.stderr
    found = pickle.loads((tmp_path / "found.pickle").read_bytes())
    assert set(found) == set(expected)
    for name in expected:
        for x, y in zip(expected[name], found[name], strict=True):
            np.testing.assert_array_equal(x, y)


@every_method
def test_saved_in_other_ways(method, tmp_path):
    """A state is saved as bytes and in files of arrays: it holds arrays alone."""
    tx = method.build()
    pair = PARAMS, jax.jit(tx.init)(PARAMS)
    state = jax.tree.map(lambda x: x + np.ones((), x.dtype), raw(pair[1]))
    state = jax.tree.map(jnp.asarray, state)
    leaves, treedef = jax.tree.flatten(state)
    np.savez(tmp_path / "state.npz", *leaves)
    eqx.tree_serialise_leaves(tmp_path / "state.eqx", state)
    content = flax.serialization.to_bytes(state)
    with np.load(tmp_path / "state.npz") as file:
        from_numpy = treedef.unflatten(file.values())
    for restored in (
        from_numpy,
        eqx.tree_deserialise_leaves(tmp_path / "state.eqx", pair[1]),
        flax.serialization.from_bytes(pair[1], content),
    ):
        jax.tree.map(np.testing.assert_array_equal, state, restored)
    with jax.numpy_dtype_promotion("standard"):
        # A loss that is not known yet is infinite, as in Optax's line searches.
        assert not np.isnan(jax.jit(optax.tree.norm)(state))
    # Arrays of NumPy go on as those of JAX do, whose types stay.
    step = make_step(tx)
    found = jax.eval_shape(lambda: step(PARAMS, from_numpy))
    assert found == jax.eval_shape(lambda: (PARAMS, state))


@pytest.mark.parametrize("name", ["adagrad_bma", "mini_bma", "newton_bma"])
def test_another_sharding_restores_bit_for_bit(tmp_path, name):
    tx = by_name()[name]
    pair = steps(tx, PARAMS, jax.jit(tx.init)(PARAMS), 3)
    save(tmp_path / "state", pair)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(x):
        split = x.ndim > 0 and x.shape[0] % 4 == 0 and x.size >= 8
        spec = PartitionSpec("x") if split else PartitionSpec()
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        )

    moved = restore(tmp_path / "state", jax.tree.map(place, pair))
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(moved))
    for x, y in zip(jax.tree.leaves(pair), jax.tree.leaves(moved), strict=True):
        np.testing.assert_array_equal(raw(x), raw(y))
    # Sums over shards are added in another order.
    after, there = steps(tx, *pair, 2)[0], steps(tx, *moved, 2)[0]
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
        after,
        there,
    )


KILLED = """
import conftest, os, signal, sys, threading
from pathlib import Path
import jax.numpy as jnp, orbax.checkpoint as ocp, test_survival as t
tx = t.by_name()["adagrad_bma"]
pair = t.PARAMS, tx.init(t.PARAMS)
manager = ocp.CheckpointManager(Path(sys.argv[1]))
for count in (1, 2):
    pair = t.steps(tx, *pair, 1)
    if count == 2:  # Killed on the way from the draft to its final name.
        os.rename = Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    manager.save(count, args=ocp.args.StandardSave(pair))
    manager.wait_until_finished()
"""


def test_killed_during_a_save_the_last_whole_one_restores(tmp_path):
    done = elsewhere(KILLED, tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    tx = by_name()["adagrad_bma"]
    start = PARAMS, jax.jit(tx.init)(PARAMS)
    with ocp.CheckpointManager(tmp_path) as manager:
        assert manager.latest_step() == 1
        pair = manager.restore(1, args=ocp.args.StandardRestore(start))
    expected = steps(tx, *start, 1)
    jax.tree.map(np.testing.assert_array_equal, raw(pair), raw(expected))


# Compositions -------------------------------------------------------------------------

WRAPPERS = {
    "inject": lambda tx: optax.inject_hyperparams(lambda c: optax.chain(tx, scale(c)))(
        c=0.5
    ),
    "masked": lambda tx: optax.masked(tx, {"a": True, "c": False}),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally": lambda tx: optax.conditionally_mask(tx, lambda step: step > 1),
    "ema": lambda tx: optax.chain(tx, optax.ema(0.5)),
}


def scale(c):
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda u: u * jnp.asarray(c, u.dtype), updates)
    )


@settings(max_examples=12)
@given(
    st.lists(st.sampled_from(sorted(WRAPPERS)), min_size=2, max_size=3),
    st.sampled_from(["adagrad_bma", "adam_bma learned", "mini_bma"]),
)
def test_wrappers_in_any_order(names, method):
    tx = by_name()[method]
    with jax.numpy_dtype_promotion("standard"):
        for name in names:
            tx = WRAPPERS[name](tx)
        params, state = PARAMS, jax.jit(tx.init)(PARAMS)
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
        step = jax.jit(make_step(optax.with_extra_args_support(tx)))
        for _ in range(4):
            params, state = step(params, state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(params))


@pytest.mark.parametrize("name", ["adagrad_bma", "adam_bma learned", "mini_bma"])
def test_schedule_free_and_lookahead(name):  # These average the iterates.
    tx = by_name()[name]
    with jax.numpy_dtype_promotion("standard"):
        gentle = optax.chain(tx, optax.scale(0.2))
        free = optax.contrib.schedule_free(gentle, learning_rate=0.1)
        params, state = steps(free, PARAMS, jax.jit(free.init)(PARAMS), 150)
        mean = jax.jit(optax.contrib.schedule_free_eval_params)(state, params)
        assert value(mean) < value(PARAMS)
        ahead = optax.lookahead(gentle, sync_period=3, slow_step_size=0.5)
        both = optax.LookaheadParams.init_synced(PARAMS)
        state = jax.jit(ahead.init)(both)

        @jax.jit
        def step(both, state):
            updates, state = ahead.update(jax.grad(loss)(both.fast), state, both)
            return optax.apply_updates(both, updates), state

        for _ in range(60):
            both, state = step(both, state)
        assert value(both.slow) < value(PARAMS)


@every_method
def test_donated_buffers(method):
    tx = method.build()
    step = jax.jit(make_step(tx), donate_argnums=(0, 1), keep_unused=True)
    if tx not in some().values():  # One of each kind runs; the others are asked.
        pair = PARAMS, jax.eval_shape(tx.init, PARAMS)
        text = step.lower(*pair).as_text()
        arrays = [x for x in jax.tree.leaves(pair) if x.size > 1]
        assert text.count("tf.aliasing_output") >= len(arrays)
        return
    params, state = jax.tree.map(jnp.copy, PARAMS), jax.jit(tx.init)(PARAMS)
    kept = steps(tx, params, state, 3)[0]
    for _ in range(3):
        given = jax.tree.leaves((params, state))
        params, state = step(params, state)
        assert all(x.is_deleted() for x in given if x.size > 1)
    # Another program: it may round another way.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    jax.tree.map(close, params, kept)


EXPORTED = """
import sys
from pathlib import Path
import jax, numpy as np
from jax import export
folder = Path(sys.argv[1])
for path in sorted(folder.glob("*.exported")):
    step = export.deserialize(bytearray(path.read_bytes())).call
    leaves = list(np.load(path.with_suffix(".npz")).values())
    found = step(*step(*leaves))
    np.savez(path.with_suffix(".found.npz"), *found)
assert "bma_optax" not in sys.modules
"""


def test_an_exported_step_runs_in_another_process(tmp_path):
    from jax import export

    expected = {}
    for name, tx in some().items():
        pair = PARAMS, jax.jit(tx.init)(PARAMS)
        leaves, treedef = jax.tree.flatten(pair)

        def flat(*given, treedef=treedef, tx=tx):
            return jax.tree.leaves(make_step(tx)(*jax.tree.unflatten(treedef, given)))

        path = tmp_path / f"{name.replace(' ', '_')}.exported"
        path.write_bytes(export.export(jax.jit(flat))(*leaves).serialize())
        np.savez(path.with_suffix(".npz"), *leaves)
        expected[path] = jax.tree.leaves(steps(tx, *pair, 2))
    done = elsewhere(EXPORTED, tmp_path)
    assert done.returncode == 0, done.stderr
    for path, leaves in expected.items():
        found = np.load(path.with_suffix(".found.npz")).values()
        for x, y in zip(leaves, found, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


class Interleaved(RuleBasedStateMachine):
    """Updates, saves and restores in any order equal the updates that survive."""

    tx = bma.scale_by_bma(bma.per_unit, update_interval=3)
    update = staticmethod(jax.jit(tx.update))

    def __init__(self):
        super().__init__()
        self.state = self.tx.init(PARAMS)
        self.gradients: list = []
        self.saved = None

    @rule(seed=st.integers(0, 99))
    def step(self, seed):
        rng = np.random.default_rng(seed)
        grads = jax.tree.map(
            lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), PARAMS
        )
        self.updates, self.state = self.update(grads, self.state)
        self.gradients.append(grads)

    @rule()
    def save(self):
        # As any tool that keeps arrays by their paths would.
        leaves, treedef = jax.tree.flatten(self.state)
        self.saved = [np.array(x) for x in leaves], treedef, list(self.gradients)

    @precondition(lambda self: self.saved)
    @rule()
    def restore(self):
        leaves, treedef, self.gradients = self.saved
        self.gradients = list(self.gradients)
        self.state = treedef.unflatten(map(jnp.asarray, leaves))

    def teardown(self):
        state = self.tx.init(PARAMS)
        for grads in self.gradients:
            _, state = self.update(grads, state)
        jax.tree.map(np.testing.assert_array_equal, raw(self.state), raw(state))
        assert self.state.count == len(self.gradients)


Interleaved.TestCase.settings = settings(max_examples=10, stateful_step_count=12)
TestInterleaved = Interleaved.TestCase
