"""Each trick for XLA on compiled programs: the test fails without the trick.

If one fails with the trick, or a program is as good without, XLA has learned to do it:
take the trick out.
"""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bma_optax as bma
from bma_optax import _control_flow, _random, _sharding, _xla, _xla_sums
from bma_optax._xla_sums import total_of
from bma_optax.adaptive import _columns
from bma_optax.algebra import _eigh, _symmetric_power
from bma_optax.multilevel import _stencil
from bma_optax.multilevel._stencil import Stencil
from bma_optax.partitions import _tiles

LARGE = (256, 256)
LIKE = {"a.kernel": jnp.zeros(LARGE), "b.kernel": jnp.zeros(LARGE)}
BYTES = 4 * 256 * 256


def temporaries(function, *args, **kwargs):
    """The bytes of temporaries, in multiples of one array."""
    program = jax.jit(function, **kwargs).lower(*args).compile()
    return program.memory_analysis().temp_size_in_bytes / BYTES


def of_update(tx):
    """Temporaries of a step to which gradients and state are donated."""
    return temporaries(tx.update, LIKE, jax.jit(tx.init)(LIKE), donate_argnums=(0, 1))


def first(x, *_):
    return x


@pytest.mark.parametrize(
    ("trick", "make"),
    [
        ("recompute", lambda: bma.scale_by_bma(form="symmetric")),
        ("recompute", lambda: bma.scale_by_mini_bma()),
        ("after", lambda: bma.scale_by_bma(bma.units, weights="learned")),
    ],
    ids=["symmetric", "mini", "learned"],
)
def test_a_step_copies_no_array(monkeypatch, trick, make):
    assert of_update(make()) < 0.1
    monkeypatch.setattr(_xla, trick, first)
    assert of_update(make()) > 0.9


def test_an_entry_is_no_part_of_the_kernels_that_take_it_up():
    """Or each of them would be another kernel to compile."""

    def scaled(entries, v, arrays):
        return [e * x for e, x in zip(entries(v), arrays, strict=True)]

    def program(entries):
        return jax.jit(functools.partial(scaled, entries)).lower(v, arrays).compile()

    v, arrays = jnp.array([1.0, -2.0, jnp.inf, jnp.nan]), [jnp.ones(9)] * 4
    assert " slice(" in program(list).as_text()
    found = program(_xla.entries)
    assert " slice(" not in found.as_text()
    for x, y in zip(found(v, arrays), v, strict=True):
        np.testing.assert_array_equal(x, jnp.full(9, y))
    flags = [True, False, True]
    np.testing.assert_array_equal(jax.jit(_xla.entries)(jnp.array(flags)), flags)


def test_a_static_number_makes_no_other_kernel():
    def folded(key):
        return [_random.fold(key, number) for number in range(3)]

    text = jax.jit(folded).lower(jnp.zeros(2, jnp.uint32)).compile().as_text()
    # Apart from the names of what they read, all are the same.
    bodies = re.findall(r"^%fused_computation.*?^}", text, re.M | re.S)
    plain = {re.sub(r"%[\w.]+|\w+\.\d+|, metadata={.*?}", "", x) for x in bodies}
    assert len(bodies) == 3 and len(plain) == 1
    for number, key in enumerate(folded(jnp.zeros(2, jnp.uint32))):
        np.testing.assert_array_equal(
            key, jax.jit(_random.fold)(np.zeros(2, "u4"), number)
        )


def test_a_bare_root_is_a_part_of_the_sum_over_it():
    def guarded(x):
        return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)

    x = jnp.ones(LARGE)
    assert temporaries(lambda x: jnp.sum(_xla_sums.sqrt(x)), x) < 0.1
    assert temporaries(lambda x: jnp.sum(guarded(x)), x) > 0.9
    np.testing.assert_array_equal(
        jax.vmap(jax.grad(_xla_sums.sqrt))(jnp.array([0.0, 4.0])), [0, 0.25]
    )


def test_a_sum_of_roots_stores_a_part_of_them(monkeypatch):
    """And takes many at a time, as a sum over all but the last axis does not."""

    def roots(x):
        return total_of(_xla_sums.sqrt, (0,), x)

    x = jnp.ones(LARGE)
    monkeypatch.setattr(_sharding, "is_whole", lambda x: True)
    assert temporaries(roots, x) < 0.2
    monkeypatch.setattr(_xla_sums, "_PIECES", 1)
    assert temporaries(lambda x: roots(x), x) > 0.9


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((40, 3), (0,)), ((41, 3), (0,)), ((3, 17, 2), (0, 1)), ((3, 40), (1,))]
    + [((37, 2), (0,)), ((3, 2), ()), ((40, 3), (0, 1)), ((), ()), ((0, 3), (0,))],
)
def test_sums_in_pieces_and_in_two_steps_are_sums(monkeypatch, shape, axes):
    monkeypatch.setattr(_sharding, "is_whole", lambda x: True)
    x = jnp.asarray(np.random.default_rng(0).random(shape), jnp.float32)
    weights = jnp.full(tuple(n if i in axes else 1 for i, n in enumerate(shape)), 3.0)
    for found, expected in (
        (jax.jit(lambda x: _xla_sums.total(x, axes))(x), x),
        (jax.jit(lambda x: _xla_sums.total_in_two_steps(x, axes))(x), x),
        (
            jax.jit(lambda *x: total_of(jnp.multiply, axes, *x))(x, weights),
            3 * x,
        ),
    ):
        expected = np.sum(np.asarray(expected), axis=axes, keepdims=True)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("weights", ["constant", "learned"])
def test_sums_of_one_device_and_of_several_give_one_step(monkeypatch, weights):
    """Nothing is cut where an axis could be sharded: that would gather its shards."""
    tx = bma.scale_by_bma(bma.units, weights=weights)
    rng = np.random.default_rng(1)
    shapes = {"a": {"kernel": (41, 5), "bias": (5,)}, "b": {"kernel": (3, 3, 18, 4)}}
    g = jax.tree.map(
        lambda s: jnp.asarray(1 + rng.standard_normal(s), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )

    def steps():
        _, state = jax.jit(tx.update)(g, jax.jit(tx.init)(g))
        return jax.jit(lambda g, s: tx.update(g, s))(g, state)

    assert jax.device_count() > 1
    several = steps()
    monkeypatch.setattr(_sharding, "is_whole", lambda x: True)
    monkeypatch.setattr(_columns, "_LARGE", 1)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        steps(),
        several,
    )


def test_a_gpu_sums_few_elements_at_first(monkeypatch):
    """Else XLA stores what it sums, 12 bytes a parameter more."""
    monkeypatch.setattr(_sharding, "is_whole", lambda x: True)
    x = jnp.ones((60, 3))
    for axes, sums in (((0,), 2), ((1,), 1)):
        text = program(lambda x, axes=axes: _xla_sums.total(x, axes), x)
        assert text.count("stablehlo.reduce(") == sums


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 2, 3)])
def test_sums_over_units_of_a_convolution_copy_no_kernel(monkeypatch, axes):
    """Its factors are in the order in which XLA takes them as they lie."""
    monkeypatch.setattr(_sharding, "is_whole", lambda x: True)
    x = jnp.ones((3, 4, 16, 32))
    y = jnp.ones([n if i in axes else 1 for i, n in enumerate(x.shape)])
    other = tuple(i for i in range(4) if i not in axes)

    def copies(function):
        text = jax.jit(function).lower(x, y).compile().as_text()
        return text.count(" copy(")

    def sums(x, y):
        return (
            _xla_sums.total(x, axes),
            _xla_sums.sum_of_products(x, y, axes, other),
        )

    def turned(x, y):
        inner = [axes, range(3)]
        pair = (x, jnp.squeeze(y, other))
        if 0 not in axes:
            pair, inner = pair[::-1], inner[::-1]
        return jax.lax.dot_general(*pair, (inner, ((), ())))

    assert copies(sums) == 0
    assert copies(turned) == 1


def test_a_step_with_units_writes_the_statistics_and_the_update_alone(monkeypatch):
    """The scaled gradient is computed twice, which takes less time than to store it."""
    monkeypatch.setattr(_sharding, "is_whole", lambda x: True)
    like = {"kernel": jnp.ones(LARGE)}
    tx = bma.scale_by_bma(bma.units)

    def written():
        arguments = like, tx.init(like), like
        step = jax.jit(lambda *x: tx.update(*x), donate_argnums=(0, 1))
        text = step.lower(*arguments).compile().as_text()
        shape = f"f32[{','.join(map(str, LARGE))}]"
        lines = text[text.index("ENTRY") :].splitlines()
        return sum(f"= {shape}" in line and " fusion(" in line for line in lines)

    assert written() == 2
    monkeypatch.setattr(_columns, "_LARGE", math.inf)
    assert written() > 2


def test_what_is_materialized_is_not_computed_for_each_element_of_a_block():
    def fusions(keep):
        def function(x, y):
            return x + keep(jnp.maximum(x[:, :1], 0.3), y[:, :1])

        x = jnp.ones(LARGE)
        text = jax.jit(function).lower(x, x).compile().as_text()
        return text[text.index("ENTRY") :].count(" fusion(")

    assert fusions(_xla.materialize) == 2
    assert fusions(first) == 1


def test_neighbours_are_windows_of_one_array(monkeypatch):
    """And not an array each, which XLA on CPU stores."""
    stencil = Stencil(1, LARGE, (1, 1))
    matvec = functools.partial(Stencil.matvec.__wrapped__, stencil)
    S, x = jnp.ones(stencil.shape), jnp.ones((1, *LARGE))
    assert temporaries(matvec, S, x) < 6
    monkeypatch.setattr(_xla, "neighbours", _xla._rolled)
    assert temporaries(lambda S, x: matvec(S, x), S, x) > 7


def test_sums_over_a_few_elements_are_written_out(monkeypatch):
    """XLA on CPU takes up to fifty times longer for a reduction over a short axis."""
    stencil = Stencil(2, (8, 8), (1, 1))
    x, u, S = jnp.ones(LARGE), jnp.ones((2, 8, 8)), jnp.ones(stencil.shape)

    def reductions():
        """In new functions, which JAX has not traced."""
        product = functools.partial(Stencil.matvec.__wrapped__, stencil)
        for function, args in (
            (lambda x: _tiles.axis_sums(x, 0, 4), (x,)),
            (lambda S, u: product(S, u), (S, u)),
        ):
            text = jax.jit(function).lower(*args).compile().as_text()
            yield " reduce(" in text

    assert [*reductions()] == [False, False]
    monkeypatch.setattr(_tiles, "_MAX_SLICES", 1)
    monkeypatch.setattr(_stencil, "_FEW", 1)
    assert [*reductions()] == [True, True]


def program(function, *args, platform="cuda"):
    """The program before XLA compiles it, for a platform that need not be there."""
    if platform == "cpu":
        return jax.jit(function).lower(*args).as_text()
    export = jax.export.export(jax.jit(function), platforms=[platform])
    return export(*args).mlir_module()


def test_a_second_pass_starts_after_the_first_where_fusions_cannot_write_in_place():
    """Otherwise XLA on a GPU copies arrays that one fusion both sums and writes."""

    def passes(tx, platform):
        lowered = program(tx.update, LIKE, jax.jit(tx.init)(LIKE), platform=platform)
        barriers = re.findall("stablehlo.optimization_barrier.*", lowered)
        return sum("256x256" in line for line in barriers)

    # Learned weights have one pass more, for their next directions.
    learned = {"partition": bma.units, "weights": "learned"}
    for make in (bma.scale_by_bma, bma.scale_by_adam_bma):
        for tx, more in ((make(), 1), (make(**learned), 2)):
            assert [passes(tx, platform) for platform in ("cuda", "cpu")] == [more, 0]
    # mini-BMA takes array by array: two passes more, and on CPU squares anew.
    tx, arrays = bma.scale_by_mini_bma(), len(LIKE)
    found = [passes(tx, platform) for platform in ("cuda", "cpu")]
    assert found == [2 * arrays, arrays]


def decreasing(u):
    return sum(jnp.sum(jnp.diff(x, axis=0) ** 2) for x in jax.tree.leaves(u))


@pytest.mark.parametrize(
    ("tx", "platforms"),
    [
        (bma.scale_by_bma(bma.per_unit), ("cuda", "cpu")),
        (bma.scale_by_bma(bma.units, weights="learned"), ("cuda", "cpu")),
        (bma.scale_by_mini_bma(), ("cuda", "cpu")),
        (bma.newton_bma(bma.per_tile((4, 8))), ("cuda", "cpu")),
        # Its warnings are lowered for devices that are there.
        (bma.newton_bma(bma.per_tile((2, 2), reach=1)), ("cpu",)),
    ],
    ids=["all coupled", "learned", "mini", "newton", "nested"],
)
def test_products_that_decide_a_root_are_not_rounded(tx, platforms):
    """TF32 has ten bits: three digits of an inverse and its symmetry would be lost."""
    params = {"a.kernel": jnp.ones((16, 16))}
    update = functools.partial(tx.update, value_fn=decreasing)
    for platform in platforms:
        text = program(update, params, tx.init(params), params, platform=platform)
        products = [
            line for line in text.splitlines() if "stablehlo.dot_general" in line
        ]
        assert all("HIGHEST" in line for line in products)


def test_derivatives_of_powers_are_not_rounded():
    def root(M):
        return bma.BlockMeanMatrix(jnp.ones(3), M, (2, 2, 2)).inverse_sqrt().M

    text = program(jax.hessian(lambda M: jnp.sum(root(M))), jnp.eye(3))
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert products and all("HIGHEST" in line for line in products)


def test_values_stay():
    x = jnp.array([[1.0, jnp.nan, jnp.inf]])
    np.testing.assert_array_equal(_xla.materialize(x, jnp.zeros((1, 3))), x)
    np.testing.assert_array_equal(_xla.recompute(x), x)
    np.testing.assert_array_equal(_xla.second_pass(x), x)
    np.testing.assert_array_equal(_xla.after(x, jnp.ones((4, 3))), x)


def test_other_platforms_compute_as_they_see_fit():
    x = jnp.ones(3)
    assert "divide" not in program(_xla.materialize, x, x)


def test_a_refresh_copies_no_array():
    """A step without one leaves the state where it is; derivatives are a branch's."""

    def renewed(predicate, x, y):
        def f(last):
            return last[0] * y, last[1] + 1

        return _control_flow.renewed(predicate, f, (x, jnp.int32(1)))[0]

    def expected(predicate, x, y):
        return jnp.where(predicate, x * y, x)

    x, y = jnp.arange(3.0), jnp.ones(3) / 2
    for on in (jnp.asarray(True), jnp.asarray(False)):
        for derivative in (jax.jacfwd, jax.jacrev):
            found, wanted = (
                jax.jit(derivative(f, argnums=(1, 2)))(on, x, y)
                for f in (renewed, expected)
            )
            chex.assert_trees_all_close(found, wanted)
    both = jax.jit(jax.vmap(renewed, in_axes=(0, None, None)))
    found = both(jnp.asarray([True, False]), x, y)
    np.testing.assert_array_equal(found, [x / 2, x])
    text = jax.jit(renewed).lower(jnp.asarray(True), x, y).as_text()
    assert "stablehlo.while" in text and "stablehlo.case" not in text


def test_a_refresh_writes_its_products_to_memory_that_is_there():
    """Without that, each round of the loop over colors would fill it with zeros."""
    tx = bma.scale_by_newton_bma(bma.per_tile((4, 4), reach=1), update_interval=1)
    u = jnp.zeros((66, 66))
    update = functools.partial(tx.update, value_fn=decreasing)
    text = jax.jit(update).lower(u, jax.eval_shape(tx.init, u), u).compile().as_text()
    loops, _ = text.split("\nENTRY ")
    made = re.findall(r"(\S+) = f32\[3,66,66\]\S* (?:fusion|copy)\(", loops)
    assert len(made) == 1 and "dynamic-update-slice" in made[0]


def test_a_refresh_of_dense_blocks_holds_the_product_twice():
    """A network's is a long program: once for N and its rounding, once for diag G."""
    curvature = bma.Operator(
        lambda _: lambda v: jax.tree.map(lambda x: jax.lax.rev(x, (0,)), v)
    )
    tx = bma.scale_by_newton_bma(curvature=curvature, update_interval=1)
    params = {"a": jnp.ones(200), "b": jnp.ones(300)}
    text = program(tx.update, params, tx.init(params), params, platform="cpu")
    assert text.count("stablehlo.reverse") == 2 * len(params)


def test_a_large_root_on_a_tpu_is_one_operation():
    """JAX's own choice there is a program that takes minutes to compile."""
    like = jax.ShapeDtypeStruct((300, 300), jnp.float32)

    def both(M):
        power = _symmetric_power.matrix_power(M, -0.5, jnp.float32(0))
        return power, _eigh.eigenvalues(M)

    def loops(f):
        export = jax.export.export(jax.jit(f), platforms=["tpu"])
        return export(like).mlir_module().count("stablehlo.while")

    assert loops(both) == 0 < loops(jnp.linalg.eigh)
