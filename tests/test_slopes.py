"""Slopes beside block means, against dense float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_local
from test_local import case, product

import bma_optax as bma

pytestmark = pytest.mark.usefixtures("x64")


def sloped(rule):
    """The rule of tiles with slopes, below ``stacked``."""
    if hasattr(rule, "axis"):
        return bma.stacked(sloped(rule.rule), rule.axis)
    return bma.per_tile(rule.leading, reach=rule.distance, slopes=True)


def positions(like):
    """The coordinates of every element, one column for each axis."""
    most = max(x.ndim for x in jax.tree.leaves(like))
    parts = []
    for x in jax.tree.leaves(like):
        where = np.indices(x.shape, float).reshape(x.ndim, x.size).T
        parts.append(np.pad(where, [(0, 0), (0, most - x.ndim)]))
    return np.concatenate(parts)


matrices = functools.partial(test_local.matrices, change=sloped, positions=positions)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("reach 2", None),
        ("sizes that do not divide", None),  # Tiles of one element along axis 0.
        ("periodic, an odd number of elements", None),
        ("3 dimensions", (6, 3, 6)),
        ("fields first", (2, 15, 9)),
        ("beside scalars", None),
    ],
)
def test_products_give_what_the_entries_of_G_give(name, shape):
    """Up to 64 blocks the coarse matrix is dense: C must be the same to rounding."""
    got, expected, _, count = matrices(name, shape=shape)
    assert count <= 64
    np.testing.assert_allclose(got, expected, atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("reach 2", (135,)),
        ("sizes that do not divide", (15, 33)),
        ("two fields", (12, 15)),
    ],
)
def test_nested_operator_is_symmetric_and_positive_definite(name, shape):
    at_once = name == "reach 2"
    matrix, wanted, G, count = matrices(name, at_once=at_once, most=2, shape=shape)
    assert count > 64
    scale = np.abs(matrix).max()
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12 * scale)
    root = np.linalg.cholesky(G)
    values, best = (np.linalg.eigvalsh(root.T @ C @ root) for C in (matrix, wanted))
    assert values[0] > 0
    assert values[-1] / values[0] < 2 * best[-1] / best[0]


def plate(u):
    """A thin plate inside a clamped boundary."""
    padded = jnp.pad(u, 2)
    laplacian = (
        sum(jnp.roll(padded, s, k) for s in (1, -1) for k in (0, 1)) - 4 * padded
    )
    return jnp.sum(laplacian**2) / 2


RULE = bma.per_tile((4, 4), reach=2, slopes=True)


def iterations(n, rule):
    """Steps of conjugate gradients to 1e-8."""

    @jax.jit
    def run(b):
        like = jnp.zeros_like(b)
        G = product(plate, like)
        C = bma.preconditioner(G, like, rule)

        def going(carry):
            return jnp.linalg.norm(carry[0]) > 1e-8 * jnp.linalg.norm(b)

        def step(carry):
            r, p, last, count = carry
            z = C(r)
            rz = jnp.vdot(r, z)
            p = z + rz / last * p
            Gp = G(p)
            return r - rz / jnp.vdot(p, Gp) * Gp, p, rz, count + 1

        return jax.lax.while_loop(going, step, (b, 0 * b, jnp.inf, 0))[-1]

    return int(run(np.random.default_rng(0).standard_normal((n, n))))


def test_steps_on_a_plate_hardly_grow_with_its_size():
    """On 30 points the blocks are inverted exactly. With means steps triple."""
    small, large = iterations(30, RULE), iterations(95, RULE)
    assert large < 1.3 * small, (small, large)
    assert large < 100
    assert iterations(30, bma.per_tile((4, 4), reach=2)) > 2 * small


def test_float32_and_elements_without_curvature():
    """A hole, and a plate that nothing holds: linear functions have no curvature."""
    seen = np.ones((35, 35), np.float32)
    seen[5:16, 9:30] = 0

    def f(u):
        seconds = [jnp.diff(u * seen, n=2, axis=k) for k in (0, 1)]
        return sum(jnp.sum(x**2) for x in seconds)

    with jax.enable_x64(False):

        @jax.jit
        def apply(g):
            like = jnp.zeros_like(g)
            C = bma.preconditioner(product(f, like), like, RULE)
            return C.local, C(g)

        g = np.random.default_rng(0).standard_normal((35, 35)).astype(np.float32)
        local, x = apply(g)
        assert local
        assert x.dtype == jnp.float32
        assert np.all(np.isfinite(x)) and np.vdot(g, x) > 0


def test_the_state_keeps_its_structure():
    u = jnp.ones((15, 25))
    tx = bma.scale_by_newton_bma(RULE)
    state = jax.jit(tx.init)(u)
    update = jax.jit(functools.partial(tx.update, value_fn=plate))
    grads = jax.jit(jax.grad(plate))(u)
    updates, after = update(grads, state, u)
    assert jax.tree.structure(state) == jax.tree.structure(after)
    for x, y in zip(*map(jax.tree.leaves, (state, after)), strict=True):
        assert jax.typeof(x) == jax.typeof(y)
    assert np.vdot(updates, grads) > 0


def test_slopes_along_axes_of_no_tile_change_nothing():
    """Tiles of one element have no slopes: their rule is that of means."""
    f, like, _, local = case("reach beyond a tile")

    @functools.partial(jax.jit, static_argnums=0)
    def apply(rule, x):
        return bma.preconditioner(product(f, like), like, rule)(x)

    with_slopes, means = (apply(rule, np.ones(50)) for rule in (sloped(local), local))
    np.testing.assert_allclose(with_slopes, means, rtol=1e-12)


def test_combinators_carry_slopes_along():
    image = {"u": jax.ShapeDtypeStruct((3, 64, 64), "float32")}
    rule = bma.per_tile((4, 4), reach=2, slopes=True)
    assert repr(rule) == "per_tile((4, 4), reach=2, slopes=True)"
    assert rule != bma.per_tile((4, 4), reach=2)
    for inner in (rule, bma.within("array", rule)):
        whole = bma.by_path({"u": bma.stacked(inner)}, default=None)
        assert whole.slopes(("u",), (3, 64, 64)) and not whole.slopes(("v",), (9,))
        blocks = bma.partition(image, whole)
        assert "grid of 1 field with 2 slopes a block:" in str(blocks)
        (grid,) = blocks.grids
        assert [slope.axis for slope in grid.tiles.slopes] == [1, 2]


def test_an_array_of_a_single_tile_has_its_mean_alone():
    """It is no grid, and costs what it costs without slopes."""
    like = jax.ShapeDtypeStruct((4, 4), "float32")
    with_slopes, means = (
        bma.partition(like, rule) for rule in (RULE, bma.per_tile((4, 4), reach=2))
    )
    assert not with_slopes.grids and with_slopes.buckets == means.buckets == ((1, 1),)
