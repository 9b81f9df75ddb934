"""Random trees, partitions and gradients give finite, stable, equivariant updates.

``BMA_FUZZ_STEPS`` and ``BMA_FUZZ_EXAMPLES`` make a longer run by hand.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bma_optax as bma

STEPS = int(os.environ.get("BMA_FUZZ_STEPS", 3000))
EXAMPLES = int(os.environ.get("BMA_FUZZ_EXAMPLES", 7))
KINDS = 6

SHAPES = st.sampled_from([(), (0,), (1,), (3,), (2, 3), (3, 1, 2), (0, 4), (4, 4)])
DTYPES = st.sampled_from(["float32", "bfloat16", "float16"])
NAMES = st.sampled_from(["w", "b/c", "kernel", "0", "α"])


@st.composite
def trees(draw, dtypes=DTYPES):
    """Nested dictionaries and tuples of arrays, at least one of them not empty."""
    leaves = st.builds(lambda s, d: jnp.zeros(s, d), SHAPES, dtypes)
    nodes = st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.dictionaries(NAMES, inner, min_size=1, max_size=3),
            st.lists(inner, min_size=1, max_size=3).map(tuple),
        ),
        max_leaves=4,
    )
    return {"first": jnp.zeros((3, 2)), "rest": draw(nodes)}


RULES = st.sampled_from(
    [
        bma.per_leaf,
        bma.per_column,
        bma.per_row,
        bma.by_path({"first": bma.per_tile((2, 2))}, default=bma.per_element),
        bma.per_element,
        bma.by_path({"first": None}),
        bma.by_path({"first": bma.per_element}),
    ]
)
SCOPES = st.sampled_from(["all", "array", "layer", "block"])


def within(scope, rule):
    return rule if scope == "all" else bma.within(scope, rule)


def of_one_shape(rule):
    """A rule whose blocks can share weights."""
    return bma.per_column if "per_tile" in repr(rule) else rule


def methods(rule):
    """The transformations that need neither parameters nor a loss."""
    learned = {"weights": "learned", "estimator": "projection"}
    return {
        "left": bma.scale_by_bma(rule),
        "symmetric": bma.scale_by_bma(rule, form="symmetric"),
        "projection": bma.scale_by_bma(rule, estimator="projection"),
        "adam": bma.scale_by_adam_bma(partition=rule),
        "mini": bma.scale_by_mini_bma(partition=of_one_shape(rule)),
        "learned": bma.scale_by_bma(of_one_shape(rule), **learned),
        "adam learned": bma.scale_by_adam_bma(partition=of_one_shape(rule), **learned),
    }


def gradient(key, like, last):
    """A gradient of a random kind and size, 1e-30 to 1e30 where the dtype holds it."""
    kind_key, size_key, key = jax.random.split(key, 3)
    kind = jax.random.randint(kind_key, (), 0, KINDS)
    exponent = jax.random.uniform(size_key, minval=-30.0, maxval=30.0)

    def leaf(key, x, old):
        info = jnp.finfo(x.dtype)
        limit = jnp.log10(float(info.max)) - 1
        size = 10 ** jnp.clip(exponent, -30, limit)
        noise = jax.random.normal(key, x.shape)
        hot = jnp.zeros(x.size).at[:1].set(1).reshape(x.shape)
        values = [noise, jnp.sign(noise), jnp.ones(x.shape), hot, 0 * noise, noise]
        value = jnp.stack([(v * size).astype(x.dtype) for v in values])[kind]
        return jnp.where(kind == KINDS - 1, old, value)  # The last kind: once more.

    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(key, max(len(leaves), 1))
    olds = jax.tree.leaves(last)
    return treedef.unflatten(
        [leaf(k, x, o) for k, x, o in zip(keys, leaves, olds, strict=False)]
    )


def finite(tree):
    leaves = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves))


EVERY = st.sampled_from(sorted(methods(bma.per_leaf)))


@settings(max_examples=EXAMPLES)
@given(trees(), RULES, SCOPES, st.integers(0, 2**20), EVERY)
def test_finite_gradients_give_finite_updates(params, rule, scope, seed, name):
    rule = within(scope, rule)
    tx = methods(rule)[name]
    if name == "symmetric":  # It is large where z is tiny: beyond float16.
        params = jax.tree.map(
            lambda x: x.astype("float32") if x.dtype == "float16" else x, params
        )

    @jax.jit
    def run(key):
        def step(carry, key):
            state, last = carry
            grads = gradient(key, params, last)
            updates, state = tx.update(grads, state, params)
            return (state, grads), finite(updates)

        keys = jax.random.split(key, STEPS)
        return jax.lax.scan(step, (tx.init(params), params), keys)

    (state, _), fine = run(jax.random.key(seed))
    assert np.all(fine), np.flatnonzero(~np.asarray(fine))[:5]
    if hasattr(state, "inverse_root"):
        used = of_one_shape(rule) if "learned" in name else rule
        blocks = bma.partition(params, used)
        for root in blocks.split_matrix(state.inverse_root):
            assert np.all(np.linalg.eigvalsh(np.asarray(root, np.float64)) > 0)


@settings(max_examples=5)
@given(trees(st.just("float32")), RULES, st.integers(0, 2**20), st.integers(-8, 8))
def test_updates_do_not_depend_on_the_scale_of_gradients(params, rule, seed, power):
    tx = bma.scale_by_bma(rule, eps=0.0)

    @jax.jit
    def run(key, scale):
        def step(state, key):
            grads = jax.tree.map(lambda x: scale * x, gradient_of(key, params))
            updates, state = tx.update(grads, state)
            return state, updates

        return jax.lax.scan(step, tx.init(params), jax.random.split(key, 20))[1]

    key = jax.random.key(seed)
    # A power of four: roots and squares are exact.
    plain, scaled = run(key, 1.0), run(key, 4.0**power)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        plain,
        scaled,
    )


def gradient_of(key, like):
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten(
        [jax.random.normal(k, x.shape) + 0.5 for k, x in zip(keys, leaves, strict=True)]
    )


BY_LEAF = methods(bma.per_leaf)
UPDATES = {name: jax.jit(tx.update) for name, tx in BY_LEAF.items()}


@pytest.mark.parametrize("name", ["left", "symmetric", "projection", "adam"])
@settings(max_examples=4)
@given(seed=st.integers(0, 2**20))
def test_permutations(name, seed):
    """Permuted elements of a block, or permuted leaves, permute the update."""
    rng = np.random.default_rng(seed)
    inside, leaves = rng.permutation(5), rng.permutation(3)

    def run(gradients):
        state = jax.jit(BY_LEAF[name].init)(gradients[0])
        for g in gradients:
            updates, state = UPDATES[name](g, state)
        return updates

    def tree(arrays):
        return [jnp.asarray(x, jnp.float32) for x in arrays]

    gradients = [rng.standard_normal((3, 5)) + 0.5 for _ in range(4)]
    plain = np.stack(run([tree(g) for g in gradients]))
    moved = run([tree(g[leaves][:, inside]) for g in gradients])
    np.testing.assert_allclose(np.stack(moved), plain[leaves][:, inside], 2e-4, 1e-6)
