"""Partitions: which elements form a block, sums over blocks, and their expansion."""

import itertools
import pickle
import sys
import time
from typing import NamedTuple

import equinox as eqx
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import bma_optax as bma

PARAMS = {
    "dense": {
        "kernel": jax.ShapeDtypeStruct((5, 3), jnp.float32),
        "bias": jax.ShapeDtypeStruct((3,), jnp.float32),
    },
    "scale": jax.ShapeDtypeStruct((), jnp.float32),
}


def brute_force_labels(shape, tile):
    """The block of each element, by its indices."""
    labels = {}
    result = np.zeros(shape, int)
    for index in itertools.product(*map(range, shape)):
        key = tuple(i // t for i, t in zip(index, tile, strict=True))
        result[index] = labels.setdefault(key, len(labels))
    return result


@pytest.mark.parametrize(
    ("rule", "names", "sizes"),
    [
        (bma.per_leaf, ("dense/bias", "dense/kernel", "scale"), (3, 15, 1)),
        (bma.per_layer, ("dense", "params"), (18, 1)),
        (
            bma.per_unit,
            ("dense/bias", *(f"dense/kernel[:, {i}]" for i in range(3)), "scale"),
            (3, 5, 5, 5, 1),
        ),
        (
            bma.per_row,
            ("dense/bias", *(f"dense/kernel[{i}, :]" for i in range(5)), "scale"),
            (3, 3, 3, 3, 3, 3, 1),
        ),
        (
            bma.by_path({"scale": None}, default=bma.stacked(bma.per_leaf, -1)),
            (
                *(f"dense/bias[{i}]" for i in range(3)),
                *(f"dense/kernel[:, {i}]" for i in range(3)),
            ),
            (1, 1, 1, 5, 5, 5),
        ),
        (
            bma.per_tile((3,)),
            (
                "dense/bias",
                *(f"dense/kernel[0:3, {i}]" for i in range(3)),
                *(f"dense/kernel[3:5, {i}]" for i in range(3)),
                "scale",
            ),
            (3, 3, 3, 3, 2, 2, 2, 1),
        ),
        (
            bma.by_path({"kernel": bma.per_tile((2, 2))}, default=bma.per_tile((2,))),
            (
                *("dense/bias[0:2]", "dense/bias[2:3]"),
                *("dense/kernel[0:2, 0:2]", "dense/kernel[0:2, 2:3]"),
                *("dense/kernel[2:4, 0:2]", "dense/kernel[2:4, 2:3]"),
                *("dense/kernel[4:5, 0:2]", "dense/kernel[4:5, 2:3]"),
                "scale",
            ),
            (2, 1, 4, 2, 4, 2, 2, 1, 1),
        ),
        (
            bma.by_path({"bias|scale": None, "kernel": bma.per_tile((5, 3))}),
            ("dense/kernel",),
            (15,),
        ),
        (
            bma.by_function(lambda path, shape: None if path == ("scale",) else shape),
            ("dense/bias", "dense/kernel"),
            (3, 15),
        ),
    ],
    ids=str,
)
def test_blocks(rule, names, sizes):
    blocks = bma.partition(PARAMS, rule)
    assert blocks.names == names
    assert blocks.sizes == sizes
    assert bma.partition(PARAMS, bma.per_element).num_blocks == 19


@st.composite
def shapes_and_tiles(draw):
    shape = draw(st.lists(st.integers(1, 7), max_size=3))
    tile = [draw(st.integers(1, 9)) for _ in shape]
    return tuple(shape), tuple(tile)


@given(st.lists(shapes_and_tiles(), min_size=1, max_size=3), st.data())
def test_block_sums_and_expand_against_brute_force(drawn, data):
    tiles = {(str(i),): tile for i, (_, tile) in enumerate(drawn)}
    rule = bma.by_function(lambda path, shape: tiles[path])
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    arrays = [rng.standard_normal(s).astype(np.float32) for s, _ in drawn]
    params = [jnp.asarray(a) for a in arrays]
    couple = data.draw(st.sampled_from(["all", "array", "layer"]))
    blocks = bma.partition(
        params, rule if couple == "all" else bma.within(couple, rule)
    )
    numbers = np.arange(blocks.num_blocks, dtype=np.float32)
    sums, filled = jax.device_get(
        jax.jit(lambda x: (blocks.block_sums(x), blocks.expand(numbers, x)))(params)
    )
    seen = []
    for array, fill, (shape, tile) in zip(arrays, filled, drawn, strict=True):
        labels = brute_force_labels(shape, tile)
        for label in range(labels.max() + 1):
            inside = np.asarray(fill)[labels == label]
            assert np.all(inside == inside[0])
            block = int(inside[0])
            seen.append(block)
            np.testing.assert_allclose(
                sums[block], array[labels == label].sum(), atol=1e-5
            )
            assert blocks.sizes[block] == (labels == label).sum()
    assert sorted(seen) == list(range(blocks.num_blocks))


def test_merged_arrays_share_one_block():
    params = {"a": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, "c": {"w": jnp.ones(4)}}
    blocks = bma.partition(params, bma.per_layer)
    np.testing.assert_array_equal(blocks.block_sums(params), [9.0, 4.0])
    filled = blocks.expand(jnp.array([1.0, 2.0]), params)
    assert jax.tree.map(lambda x: float(x.ravel()[-1]), filled) == {
        "a": {"w": 1.0, "b": 1.0},
        "c": {"w": 2.0},
    }


@pytest.mark.parametrize("arrays", [9, 30, 100])
def test_expand_to_many_arrays(arrays):
    # Some of several blocks, some without any; numbers that are not finite.
    tree = {
        f"{'bac'[i % 3]}{i:03}": jnp.zeros((i % 4, 3) if i % 2 else 2)
        for i in range(arrays)
    }
    rule = bma.by_path({"^a.*1$": None, "^b": bma.per_tile((1,))}, default=bma.per_leaf)
    blocks = bma.partition(tree, bma.within("array", rule))
    values = np.arange(blocks.num_blocks, dtype=np.float32)
    values[[0, 5, -1]] = np.inf, np.nan, -1e38
    filled = jax.jit(lambda values: blocks.expand(values, tree, default=-7))(values)
    for array, leaf in zip(blocks.arrays, jax.tree.leaves(filled), strict=True):
        expected = np.full(array.shape, -7.0)
        for i, block in enumerate(np.ndindex(*array.grid) if array.num_blocks else ()):
            index = tuple(
                slice(j * t, (j + 1) * t)
                for j, t in zip(block, array.tile, strict=True)
            )
            expected[index] = values[array.start + i]
        np.testing.assert_array_equal(leaf, expected)


def test_groups():
    params = {"a": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, "c": {"w": jnp.ones(4)}}
    whole = bma.partition(params, bma.per_unit)
    assert whole.groups == ((0, 1, 2, 3, 4),)
    assert whole.matrix_shape == (5, 5)
    by_layer = bma.partition(params, bma.within("layer", bma.per_unit))
    named = [{by_layer.names[i] for i in group} for group in by_layer.groups]
    assert named == [{"c/w"}, {"a/b", "a/w[:, 0]", "a/w[:, 1]", "a/w[:, 2]"}]
    assert by_layer.matrix_shape == (1 + 16,)
    by_array = bma.partition(params, bma.within("array", bma.per_unit))
    assert sorted(map(len, by_array.groups)) == [1, 1, 3]
    assert by_array.buckets == ((2, 1), (1, 3))
    alone = bma.partition(params, bma.within("block", bma.per_unit))
    assert alone.groups == ((0,), (1,), (2,), (3,), (4,))
    assert alone.matrix_shape == (5,)


def test_stacked_axes():
    rule = bma.stacked(bma.stacked(bma.per_unit, axis=1))
    assert rule.tile(("w",), (7, 5, 2, 3)) == (1, 5, 1, 1)
    assert rule.stacked_axes(("w",), (7, 5, 2, 3)) == (0, 2)
    both = bma.by_path({"w": rule}, default=bma.per_unit)
    assert both.stacked_axes(("w",), (7, 5, 2, 3)) == (0, 2)
    assert both.stacked_axes(("b",), (7, 5, 2, 3)) == ()
    assert bma.stacked(bma.by_path({"w": None})).tile(("w",), (2, 3)) is None


def test_rules_are_values_and_not_callable():
    rules = [
        *(bma.per_leaf, bma.per_layer, bma.per_unit, bma.per_element),
        *(bma.per_tile((2, 2)), bma.per_tile((2, 3))),
        *(bma.per_row, bma.stacked(bma.per_row), bma.stacked(bma.per_row, -1)),
        bma.per_column,
        bma.by_path({"a": None}),
        bma.by_function(len),
    ]
    assert not any(callable(rule) for rule in rules)
    assert len(set(rules)) == len(rules)
    assert bma.per_tile((2, 2)) == bma.per_tile([2, 2])
    assert bma.by_path({"a": None}) == bma.by_path({"a": None})
    assert bma.per_tile(4) == bma.per_tile((np.int64(4),)) == bma.per_tile((4,))
    assert bma.stacked(bma.per_row, np.int64(0)) == bma.stacked(bma.per_row)
    assert pickle.loads(pickle.dumps(rules[:5])) == rules[:5]
    assert [str(rule) for rule in rules[:5]] == [
        *("per_leaf", "per_layer", "per_unit", "per_element", "per_tile((2, 2))")
    ]


class Attention(NamedTuple):
    query: jax.Array
    value: jax.Array


@flax.struct.dataclass
class Struct:
    query: jax.Array
    value: jax.Array


class Equinox(eqx.Module):
    query: jax.Array
    value: jax.Array


@pytest.mark.parametrize("kind", [Attention, Struct, Equinox, dict])
def test_a_field_called_value_keeps_its_name(kind):
    params = {"attention": kind(query=jnp.ones((4, 3)), value=jnp.ones((4, 3)))}
    blocks = bma.partition(params)
    assert blocks.names == ("attention/query", "attention/value")
    assert bma.partition(params, bma.per_layer).names == ("attention",)
    assert bma.partition(params, bma.within("layer", bma.per_leaf)).groups == ((0, 1),)
    rule = bma.by_path({"attention/value": None})
    assert bma.partition(params, rule).names == ("attention/query",)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.value = nnx.Linear(4, 3, rngs=rngs)
        self.both = nnx.Param({"value": jnp.ones(2), "scale": jnp.ones(3)})


def test_a_box_of_flax_is_no_part_of_a_name():
    seen = []

    def see(tree):
        seen.append(tree)
        return tree

    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model,
        optax.GradientTransformation(
            lambda params: (see(params), ())[1], lambda g, s, p: (see(g), s)
        ),
        wrt=nnx.Param,
    )
    optimizer.update(model, nnx.state(model, nnx.Param))
    names = "both/scale", "both/value", "value/bias", "value/kernel"
    for tree in (*seen, model):
        assert sorted(bma.partition(tree).names) == sorted(names)
        assert sorted(bma.partition(tree, bma.per_layer).names) == ["both", "value"]
    assert jax.tree.structure(seen[0]) != jax.tree.structure(seen[1])

    plain = {"layer": {"kernel": jnp.ones(3), "value": jnp.ones(2)}}
    for box in (
        nnx.Param,
        lambda x: nn.Partitioned(x, names=("x",)),
        lambda x: nn.LogicallyPartitioned(x, names=("x",)),
        lambda x: nnx.Param(nn.Partitioned(x, names=("x",))),
    ):
        boxed = jax.tree.map(box, plain)
        for rule in (bma.per_layer, bma.by_path({"kernel$": None})):
            assert bma.partition(plain, rule) == bma.partition(boxed, rule)


def test_names_without_flax(monkeypatch):
    tree = {"layer": {"kernel": jnp.ones(3), "value": jnp.ones(2)}}
    expected = bma.partition(tree).names
    monkeypatch.delitem(sys.modules, "flax")
    assert bma.partition(tree).names == expected == ("layer/kernel", "layer/value")


def test_empty_and_placeholder_trees():
    for tree in ({}, None, [], optax.MaskedNode(), {"a": None, "b": jnp.zeros((0, 3))}):
        for rule in (bma.per_leaf, bma.per_unit, bma.per_tile((2,))):
            blocks = bma.partition(tree, rule)
            assert blocks.num_blocks == 0
            assert blocks.matrix_shape == (0, 0)
            assert blocks.block_sums(tree).shape == (0,)
            assert "0 blocks" in repr(blocks)
    assert bma.partition({}, bma.by_path({"x": None})).num_blocks == 0


def test_table_shows_every_array_and_its_bytes():
    table = repr(bma.partition(PARAMS, bma.per_unit))
    for text in ("dense/kernel", "(5, 1)", "60", "per_unit", "1 of 5 × 5", "O(125)"):
        assert text in table


LONG = jnp.zeros(1001)
MANY = bma.scale_by_bma(bma.per_element)


@pytest.mark.parametrize(
    "make",
    [
        lambda: bma.partition(LONG, bma.per_element),
        lambda: MANY.init(LONG),
        lambda: optax.chain(optax.clip(1.0), MANY).init(LONG),
        lambda: jax.jit(optax.chain(optax.clip(1.0), MANY).init)(LONG),
        lambda: bma.newton_bma(bma.per_tile((1,))).init(LONG),
    ],
    ids=["partition", "init", "chain", "jitted", "newton_bma"],
)
def test_many_blocks_warn_at_the_users_line(make):
    with pytest.warns(
        UserWarning, match="^'params' has .* 1,001 blocks.*`reach`"
    ) as caught:
        make()
    assert [warning.filename for warning in caught] == [__file__]
    assert caught[0].lineno == make.__code__.co_firstlineno


def test_a_thousand_blocks_are_no_news():
    bma.partition(jax.ShapeDtypeStruct((1000,), jnp.float32), bma.per_element)


# The names that libraries give -> the tile of a unit, for the shapes that they have.
UNITS = {
    ("Dense_0", "kernel"): ((5, 3), (5, 1)),
    ("Conv_0", "kernel"): ((3, 3, 5, 2), (3, 3, 5, 1)),
    ("attention", "query", "kernel"): ((8, 2, 4), (8, 1, 1)),
    ("attention", "out", "kernel"): ((2, 4, 8), (2, 4, 1)),
    ("attention", "query", "bias"): ((2, 4), (2, 4)),
    ("LayerNorm_0", "scale"): ((5, 3), (5, 3)),
    ("Embed_0", "embedding"): ((9, 4), (1, 4)),
    ("layer", "lora_a"): ((5, 2), (5, 1)),
    ("linear", "w"): ((5, 3), (5, 1)),
    ("gru", "w_h"): ((5, 15), (5, 1)),
    ("net/conv2_d_transpose_1", "w"): ((3, 3, 5, 2), (3, 3, 1, 2)),
    ("w1",): ((5, 3), (5, 1)),
    ("embed", "embeddings"): ((9, 4), (1, 4)),
    ("batch_norm", "offset"): ((1, 1, 1, 4), (1, 1, 1, 4)),
    ("layers", "0", "weight"): ((3, 5), (1, 5)),
    ("conv", "weight"): ((3, 5, 2, 2), (1, 5, 2, 2)),
    ("conv", "bias"): ((3, 1, 1), (3, 1, 1)),
    ("cell", "weight_hh"): ((12, 4), (1, 4)),
    ("attention", "in_proj_weight"): ((12, 4), (1, 4)),
    ("fc.weight",): ((3, 5), (1, 5)),
    ("norm", "g"): ((3, 1), (3, 1)),
    (): ((5, 3), (5, 1)),
}


@pytest.mark.parametrize("path", UNITS, ids=str)
def test_units_by_name(path):
    shape, tile = UNITS[path]
    tree = jax.ShapeDtypeStruct(shape, jnp.float32)
    stacked = jax.ShapeDtypeStruct((*shape, 7), jnp.float32)
    for key in reversed(path):
        tree, stacked = {key: tree}, {key: stacked}
    assert bma.partition(tree, bma.per_unit).arrays[0].tile == tile
    over_layers = bma.partition(stacked, bma.stacked(bma.per_unit, axis=-1))
    assert over_layers.arrays[0].tile == (*tile, 1)
    assert f"  {tile}  " in repr(bma.partition(tree, bma.per_unit))


UNNAMED = {"theta": jnp.ones((4, 3, 2)), "w": jnp.ones((4, 3)), "v": jnp.ones(2)}
IN_STACK = bma.by_path({"v|w": None}, default=bma.stacked(bma.per_unit, axis=1))


@pytest.mark.parametrize(
    "init",
    [
        lambda: bma.partition(UNNAMED, bma.per_unit),
        lambda: bma.partition(UNNAMED, IN_STACK),
        lambda: bma.mini_bma(0.1).init(UNNAMED),
        lambda: bma.scale_by_bma(bma.units).init(UNNAMED),
        lambda: bma.scale_by_newton_bma(bma.per_unit).init(UNNAMED),
    ],
    ids=["partition", "stacked", "mini_bma", "units", "newton_bma"],
)
def test_a_name_that_cannot_tell_is_said(init):
    with pytest.warns(UserWarning, match="^'theta': .*per_column.*per_row") as seen:
        init()
    assert [warning.filename for warning in seen] == [__file__]


@pytest.mark.parametrize(
    ("make", "by_name", "column"),
    [
        (bma.scale_by_mini_bma, bma.per_unit, bma.per_column),
        (bma.scale_by_bma, bma.units, bma.within("block", bma.per_column)),
    ],
    ids=["mini", "units"],
)
def test_the_name_is_not_said_again_at_update(make, by_name, column):
    params = {"theta": jnp.ones((4, 3, 2)), "w": jnp.ones((4, 3))}
    tx = make(partition=by_name)
    with pytest.warns(UserWarning, match="theta"):
        state = tx.init(params)
    updates, _ = jax.jit(tx.update)(params, state)  # A warning is an error here.
    tx = make(partition=column)
    expected, _ = jax.jit(tx.update)(params, tx.init(params))
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_many_patterns_on_many_arrays():
    """It takes seconds if each path is matched once, and many minutes if not."""
    shape = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    params = {f"a{i:04}": {"w": shape} for i in range(5000)}
    rule = bma.by_path({f"a{i:04}/": bma.per_unit for i in range(0, 5000, 25)})
    start = time.process_time()
    blocks = bma.partition(params, bma.within("array", rule))
    assert time.process_time() - start < 10
    assert blocks.num_blocks == 200 * 3 + 4800
    assert len(repr(rule)) < 400


def test_sums_over_long_tiles():
    """Long tiles are summed by another program than short ones."""
    x = jnp.arange(100.0)
    sums = bma.partition(x, bma.per_tile((40,))).block_sums(x)
    np.testing.assert_array_equal(sums, [x[:40].sum(), x[40:80].sum(), x[80:].sum()])


# Who sees whom ------------------------------------------------------------------------


def test_bounds_narrow_and_go_along_with_every_combinator():
    path = ("dense", "kernel")
    narrow = bma.within("array", bma.per_unit)
    assert bma.within("layer", narrow).scope(path) == "array"
    assert bma.within("block", narrow).scope(path) == "block"
    assert bma.stacked(narrow).scope(path) == "array"
    by_path = bma.by_path({"dense": narrow}, default=None)
    assert by_path.scope(path) == "array" and by_path.scope(("other",)) == "all"
    assert (
        repr(bma.within("layer", narrow))
        == "within('layer', within('array', per_unit))"
    )
    near = bma.per_tile((4, 4), reach=(1, 2))
    for rule in (near, bma.within("array", near), bma.by_path({"dense": near})):
        assert rule.reach(path, (8, 8, 3)) == (1, 2, 3)
        assert rule.reach(path, ()) is None
    assert bma.stacked(near).reach(path, (5, 8, 8)) == (5, 1, 2)
    assert bma.by_path({"other": None}, default=None).reach(path, (8, 8)) is None


def test_one_tree_with_fields_and_a_network():
    params = {
        "image": jnp.ones((12, 12)),
        "net": {"bias": jnp.ones(3), "kernel": jnp.ones((2, 3))},
        "scale": jnp.ones(()),
        "volume": jnp.ones((4, 4, 4)),
    }
    rule = bma.by_path(
        {
            "image": bma.per_tile((4, 4), reach=1),
            "volume": bma.per_tile((2, 2, 2), reach=1),
            "net": bma.within("layer", bma.per_unit),
        }
    )
    blocks = bma.partition(params, rule)
    named = [{blocks.names[i].split("[")[0] for i in group} for group in blocks.groups]
    assert named == [{"scale"}, {"net/bias", "net/kernel"}, {"image"}, {"volume"}]
    assert blocks.num_blocks == sum(map(len, blocks.groups)) == len(blocks.sizes)
    assert blocks.matrix_shape == (1 + 4**2,)
    sums = jax.jit(blocks.block_sums)(params)
    np.testing.assert_array_equal(sums, blocks.sizes)
    numbers = np.arange(blocks.num_blocks, dtype="float32")
    filled = jax.device_get(jax.jit(blocks.expand)(numbers, params))
    expected = [len(g) * g[0] + len(g) * (len(g) - 1) / 2 for g in blocks.groups]
    assert expected[2] == np.sum(filled["image"]) / 16
    assert expected[3] == np.sum(filled["volume"]) / 8


def test_the_table_warns_of_a_root_that_takes_longer_than_an_update():
    """On an accelerator `eigh` is latency: .5 ms, and 10 µs more for each row."""
    few, many = (jax.ShapeDtypeStruct((8, n), "float32") for n in (63, 150))
    text = repr(bma.partition(many, bma.per_unit))
    assert "on an H100 `eigh` about 2.0 ms" in text and "update_interval" in text
    assert "H100" not in repr(bma.partition(few, bma.per_unit))


@pytest.mark.parametrize(
    ("rule", "shape"),
    [
        (bma.per_tile((4, 4), reach=1), (256, 256)),
        (bma.per_tile((4, 4), reach=1), (1024, 1024)),
        (bma.stacked(bma.per_tile((4, 4), reach=2)), (2, 50, 60)),
        (bma.stacked(bma.per_tile((4, 4), reach=2, slopes=True)), (2, 50, 60)),
        (bma.per_tile((2, 2, 2), reach=1), (16, 16, 16)),
        (bma.per_leaf, (16, 16)),
        (bma.per_column, (16, 16)),
    ],
    ids=str,
)
def test_the_table_tells_what_newton_bma_holds(rule, shape):
    like = jax.ShapeDtypeStruct(shape, "float32")
    state = jax.eval_shape(bma.scale_by_newton_bma(rule).init, like)
    arrays = jax.tree.leaves((state.N, state.K, state.Lambda))
    text = repr(bma.partition(like, rule))
    diagonal, rest = (4 * sum(x.size for x in xs) for xs in ([like], arrays))
    assert f"float32 state {diagonal:,} bytes of diag" in text
    assert f" and {rest:,} of " in text
