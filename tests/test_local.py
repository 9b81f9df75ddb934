"""Curvature with a declared reach: colours and nested levels against dense float64.

Where the size does not matter it is a multiple of the number of colors, 2 reach + 1:
elements at two ends then have different ones, and the program no second set of probes.
"""

import dataclasses
import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from reference import newton_inverse

import bma_optax as bma
from bma_optax import _xla
from bma_optax.multilevel import _two_level

pytestmark = pytest.mark.usefixtures("x64")


def grad_squared(u, axes, periodic=False):
    if periodic:
        return sum(jnp.sum((jnp.roll(u, 1, axis) - u) ** 2) for axis in axes)
    return sum(jnp.sum(jnp.diff(u, axis=axis) ** 2) for axis in axes)


def smooth(seed, axes, periodic=False):
    """Differences between neighbours, with weights that vary, and a few data."""

    def f(u):
        rng = np.random.default_rng(seed)
        weights = jnp.asarray(rng.uniform(0.5, 2, u.shape))
        seen = jnp.asarray(rng.uniform(size=u.shape) < 0.1, float)
        varied = jnp.sum(weights * u**2) * 1e-3 + jnp.sum(seen * (u - 1) ** 2)
        return grad_squared(u, axes, periodic) + varied

    return f


def channels(u):
    """Neighbours and the channels of one pixel."""
    mixed = u @ jnp.array([[1.0, 0.3, -0.2], [0, 1, 0.5], [0, 0, 1]])
    return grad_squared(u, (0, 1)) + 0.1 * jnp.sum(mixed**2)


def coupled(*axes):
    """Neighbours along these axes, and all fields, which the other axes count."""

    def f(u):
        others = tuple(i for i in range(u.ndim) if i not in axes)
        mixed = u + 0.5 * jnp.sum(u, others, keepdims=True)
        return smooth(5, axes)(u) + 0.1 * jnp.sum(mixed**2)

    return f


def two_fields(p):
    strain = jnp.diff(p["u"], axis=0)[:, :-1] + jnp.diff(p["v"], axis=1)[:-1]
    return (
        jnp.sum(strain**2)
        + 0.1 * (grad_squared(p["u"], (0, 1)) + grad_squared(p["v"], (0, 1)))
        + 1e-2 * (jnp.sum(p["u"] ** 2) + jnp.sum(p["v"] ** 2))
    )


def beside_scalars(p):
    field = smooth(3, (0, 1))(p["u"])
    return field + (p["a"] - 2) ** 2 + p["a"] * p["b"] + p["b"] ** 2


def fourth_order(u):
    return jnp.sum(jnp.diff(u, n=2) ** 2) + 1e-2 * jnp.sum(u**2)


# name -> loss, parameters, tile, reach, and the axes of bma.stacked. Where several have
# one shape, tile and reach, they share a program.
CASES = {
    "1 dimension": (smooth(0, (0,)), np.zeros(45), (5,), 1),
    "long tiles": (smooth(0, (0,)), np.zeros(60), (20,), 1),
    "2 dimensions": (smooth(1, (0, 1)), np.zeros((24, 12)), (4, 4), 1),
    "3 dimensions": (smooth(2, (0, 1, 2)), np.zeros((5, 4, 6)), (2, 2, 2), 1),
    "sizes that do not divide": (smooth(3, (0, 1)), np.zeros((9, 18)), (4, 5), 1),
    "periodic": (smooth(4, (0, 1), True), np.zeros((24, 12)), (4, 4), 1),
    "periodic in tiles of 2": (smooth(4, (0,), True), np.zeros(24), (2,), 1),
    "periodic, 8 by 5 tiles": (smooth(4, (0, 1), True), np.zeros((16, 10)), (2, 2), 1),
    "periodic, an odd number of elements": (
        smooth(4, (0,), True),
        np.zeros(45),
        (5,),
        1,
    ),
    "periodic, a last tile shorter than the reach": (
        lambda u: jnp.sum((jnp.roll(u, 2) - u) ** 2) + 0.1 * jnp.sum(u**2),
        np.zeros(33),
        (4,),
        2,
    ),
    "periodic, reach 2": (
        lambda u: jnp.sum((jnp.roll(u, 2) - u) ** 2) + 0.1 * jnp.sum(u**2),
        np.zeros(34),
        (2,),
        2,
    ),
    "periodic, 3 dimensions": (
        smooth(4, (0, 1, 2), True),
        np.zeros((5, 4, 6)),
        (2, 2, 2),
        1,
    ),
    "reach 2": (fourth_order, np.zeros(33), (4,), 2),
    "reach beyond a tile": (fourth_order, np.zeros(50), (1,), (2,)),
    "channels in one block": (channels, np.zeros((9, 6, 3)), (4, 4, 3), 1),
    "channels": (channels, np.zeros((9, 6, 3)), (4, 4), (1, 1)),
    "fields first": (coupled(1, 2), np.zeros((2, 13, 8)), (4, 4), (1, 1), 0),
    "fields from the end": (coupled(0, 2), np.zeros((9, 2, 6, 2)), (4, 4), 1, -2, -1),
    "fields on a line": (coupled(0), np.zeros((21, 2, 2)), (4,), (1,)),
    "nine fields": (coupled(0), np.zeros((21, 9)), (4,), (1,)),
    "fields in a volume": (coupled(0, 1, 2), np.zeros((4, 8, 4, 2)), (2, 2, 2), 1),
    "a block each channel": (channels, np.zeros((9, 6, 3)), (4, 4, 1), (1, 1, 2)),
    "two fields": (
        two_fields,
        {"u": np.zeros((12, 12)), "v": np.zeros((12, 12))},
        (4, 4),
        1,
    ),
    "beside scalars": (
        beside_scalars,
        {"a": np.zeros(()), "b": np.zeros(()), "u": np.zeros((9, 9))},
        (3, 3),
        1,
    ),
}
every_case = pytest.mark.parametrize("name", CASES)


def case(name, most=None, shape=None):
    """Loss, parameters, and the rule without and with a reach.

    Tiles are no longer than ``most``; fields have another ``shape``.
    """
    f, params, tile, reach, *stacked = CASES[name]
    if shape is not None:
        params = jax.tree.map(lambda x: np.zeros(shape) if x.ndim else x, params)
    tile = tuple(t if most is None or t == 1 else most for t in tile)
    rules = [bma.per_tile(tile), bma.per_tile(tile, reach=reach)]
    for axis in stacked:
        rules = [bma.stacked(rule, axis) for rule in rules]
    return f, jax.tree.map(jnp.asarray, params), *rules


def product(f, like):
    return jax.linearize(jax.grad(f), like)[1]


def columns(function, like, at_once=True):
    """A linear function of trees as a matrix, transposed; ``at_once`` by ``vmap``."""
    flat, unravel = ravel_pytree(like)
    units = jnp.eye(flat.size)

    def column(e):
        return ravel_pytree(function(unravel(e)))[0]

    return jax.vmap(column)(units) if at_once else jax.lax.map(column, units)


def dense(f, like):
    """The curvature G as a matrix."""
    return np.asarray(jax.jit(lambda: columns(product(f, like), like))()).T


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def operator_and_labels(rule, local, G, like, at_once):
    """The operator C for a matrix G, and the number of each element's block."""
    _, unravel = ravel_pytree(like)
    C = bma.preconditioner(lambda v: unravel(G @ ravel_pytree(v)[0]), like, local)
    blocks = bma.partition(like, rule)
    numbers = blocks.expand(np.arange(blocks.num_blocks) + 0.5, like)
    return columns(C, like, at_once), jnp.astype(ravel_pytree(numbers)[0], int)


def matrices(
    name, change=lambda rule: rule, positions=lambda like: None, at_once=True, **sizes
):
    """C with a reach, C by its definition, G, and the number of blocks of a case.

    ``change`` makes another rule of the local one, and ``positions`` gives the
    coordinates of the elements to the reference. Cases of one shape and rule share a
    program. ``at_once`` makes the columns of C by ``vmap``: nested levels take long to
    trace then.
    """
    f, like, rule, local = case(name, **sizes)
    G = dense(f, like)
    found = operator_and_labels(rule, change(local), G, like, at_once)
    C, labels = map(np.asarray, found)
    expected = newton_inverse(G, labels, positions=positions(like))
    return C.T, expected, G, 1 + int(np.max(labels))


@every_case
def test_colors_give_what_the_entries_of_G_give(name):
    """Up to 64 blocks the coarse matrix is dense: C must be the same to rounding."""
    got, expected, _, count = matrices(name)
    assert count <= 64
    np.testing.assert_allclose(got, expected, atol=1e-10 * np.abs(expected).max())


def test_no_draw_hides_a_periodic_axis_of_few_tiles():
    """Random signs cancelled in all tiles of an axis, for three of these keys."""
    x = jnp.arange(120.0).reshape(5, 4, 6)

    def product_fn(v):
        around = [jnp.roll(v, k, axis) for axis in range(3) for k in (-1, 1)]
        return 7 * v - sum(around)

    @jax.jit
    def solve(key):
        rule = bma.per_tile((2, 2, 2), reach=1)
        C = bma.preconditioner(product_fn, x, rule, key=key)
        return C(x), C.local

    found = [solve(jnp.array([0, i], jnp.uint32)) for i in range(16)]
    for y, local in found:
        assert local
        np.testing.assert_allclose(y, found[0][0], rtol=1e-9)


def test_a_grid_holds_the_users_functions_few_times():
    """Each is compiled: colors, periodic colors, the check, and no reach at all."""

    def product_fn(params):
        return lambda v: v * jnp.cos(params)  # A cosine each time.

    calls = []

    def loss(u):
        calls.append(u)
        return jnp.sum(jnp.square(u - jnp.roll(u, 1)))

    rule, u = bma.per_tile((4, 4), reach=1), jnp.zeros((65, 65))
    tx = bma.scale_by_newton_bma(rule, curvature=bma.Operator(product_fn))
    text = jax.jit(tx.update).lower(u, jax.eval_shape(tx.init, u), u).as_text()
    assert text.count("stablehlo.cosine") == 4
    tx = bma.newton_bma(rule)
    update = functools.partial(tx.update, value_fn=loss)
    jax.eval_shape(update, u, jax.eval_shape(tx.init, u), u)
    assert len(calls) <= 5


# Shapes where tiles of two are more than 64 blocks: there are levels below them.
NESTED = {
    "1 dimension": (147,),
    "2 dimensions": (24, 12),
    "3 dimensions": (7, 9, 7),
    "sizes that do not divide": (15, 21),
    "periodic": (24, 12),
    "periodic, an odd number of elements": (147,),
    "periodic, a last tile shorter than the reach": (133,),
    "reach 2": (133,),
    "reach beyond a tile": (70,),
    "fields from the end": (9, 2, 9, 2),
    "nine fields": (18, 9),
    "two fields": (12, 12),
    "beside scalars": (15, 18),
}


@pytest.mark.parametrize("name", NESTED)
def test_nested_operator_is_symmetric_and_positive_definite(name):
    at_once = name in ("2 dimensions", "periodic")
    matrix, wanted, G, count = matrices(
        name, at_once=at_once, most=2, shape=NESTED[name]
    )
    assert count > 64
    scale = np.abs(matrix).max()
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12 * scale)
    # As good as its definition: the dense coarse correction is in reach of it.
    root = np.linalg.cholesky(G)
    values, best = (np.linalg.eigvalsh(root.T @ C @ root) for C in (matrix, wanted))
    assert values[0] > 0  # The sign of an eigenvalue of C is that of one of these.
    assert values[-1] / values[0] < 2.5 * max(best[-1] / best[0], 5)


def laplacian(n):
    """A Laplacian with 40 data on n x n: with Jacobi κ is 3,000 to 30,000."""
    seen = np.zeros(n * n)
    seen[np.random.default_rng(0).choice(n * n, 40, replace=False)] = 1
    seen = jnp.asarray(seen.reshape(n, n))

    def f(u):
        return grad_squared(u, (0, 1)) / 2 + jnp.sum(seen * (u - 1) ** 2) / 2

    return f


TILES = bma.per_tile((4, 4), reach=1)


def condition(f, like, steps=30, rule=TILES):
    """κ of C G from the coefficients of conjugate gradients (Lanczos)."""

    @jax.jit
    def coefficients(r):
        G = product(f, like)
        C = bma.preconditioner(G, like, rule)

        def step(carry, _):
            r, p, last = carry
            z = C(r)
            rz = jnp.vdot(r, z)
            b = rz / last
            p = z + b * p
            Gp = G(p)
            a = rz / jnp.vdot(p, Gp)
            return (r - a * Gp, p, rz), (a, b)

        return jax.lax.scan(step, (r, 0 * r, jnp.inf), length=steps + 1)[1]

    r = np.random.default_rng(1).standard_normal(like.shape)
    a, b = map(np.asarray, coefficients(r))
    a, b = a[:-1], b[1:]
    diagonal = 1 / a + np.concatenate([[0], b[:-1] / a[:-1]])
    off = np.sqrt(b[:-1]) / a[:-1]
    values = np.linalg.eigvalsh(np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1))
    return values[-1] / values[0]


def test_condition_number_does_not_grow():
    found = {}
    for n in (18, 72):
        found[n] = condition(laplacian(n), jnp.zeros((n, n)))
    assert all(kappa < 32 for kappa in found.values()), found


ONES = bma.per_tile((1, 1), reach=1)


def test_many_one_element_tiles_have_levels():
    assert condition(laplacian(36), jnp.zeros((36, 36)), 12, ONES) < 4


def test_two_nested_levels():
    like, rule = jnp.zeros(4101), bma.per_tile((1,), reach=1)
    state = jax.eval_shape(bma.scale_by_newton_bma(rule).init, like)
    cells = {x.shape[-1] for x in jax.tree.leaves(state.K)}
    assert cells == {4101, 1026, 257}  # The last one is dense.
    assert condition(smooth(0, (0,)), like, 12, rule) < 4


@functools.cache
def levels_of_a_line():
    """Levels of 313, 79 and 20 cells, of which the second one has a matrix."""
    params, rule = jnp.zeros(40_000), bma.per_tile((128,), reach=1)
    (system,) = _two_level.two_level(params, rule).systems
    rng = np.random.default_rng(0)
    data = jnp.asarray(rng.uniform(0.01, 1, (1, 313)))
    entries = jnp.stack([2 + data, -jnp.ones_like(data), -jnp.ones_like(data)])
    S = entries.transpose(1, 0, 2)[None]
    r = jnp.asarray(rng.standard_normal((1, 313)))
    return system, S, r


def solved(hierarchy, system, S, r):
    @jax.jit
    def run(S, r):
        levels, _ = hierarchy.setup(S, jnp.ones_like(r), 0.0, 0.0)
        return hierarchy.solve(lambda x: system.stencil.matvec(S, x), levels, r)

    return run(S, r)


def test_few_cells_have_a_matrix_in_the_place_of_cycles():
    system, S, r = levels_of_a_line()
    hierarchy = system.hierarchy
    levels = hierarchy.like(jnp.float64)
    assert [x.shape for x in levels.smoothers] == [(1, 313)]
    assert not levels.operators and levels.inverse.shape == (79, 79)
    every = dataclasses.replace(hierarchy, num_cycled=2)
    found, expected = (solved(h, system, S, r) for h in (hierarchy, every))
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_nine_arrays_on_one_grid_multiply_as_their_matrices_do():
    """More than eight have a sum in the place of a term for each."""
    params = {str(i): jnp.zeros(40) for i in range(9)}
    (system,) = _two_level.two_level(params, bma.per_tile((4,), reach=1)).systems
    rng = np.random.default_rng(0)
    S, x = rng.standard_normal((9, 9, 3, 10)), rng.standard_normal((9, 10))
    found = jax.jit(system.stencil.matvec)(jnp.asarray(S), jnp.asarray(x))
    near = np.stack([x, np.roll(x, -1, axis=1), np.roll(x, 1, axis=1)], axis=1)
    np.testing.assert_allclose(found, np.einsum("abon,bon->an", S, near), rtol=1e-12)


def test_no_loops_off_the_cpu(monkeypatch):
    """A GPU launches kernels in the time that it would take for a loop's copies."""
    system, S, r = levels_of_a_line()
    hierarchy = dataclasses.replace(system.hierarchy, num_cycled=2)
    levels = hierarchy.like(jnp.float64)

    def solve(levels, S, r):
        return hierarchy.solve(lambda x: system.stencil.matvec(S, x), levels, r)

    loops = {}
    for platform in ("cpu", "cuda", "tpu"):
        export = jax.export.export(jax.jit(solve), platforms=[platform])
        loops[platform] = export(levels, S, r).mlir_module().count("stablehlo.while")
    assert loops == {"cpu": 2, "cuda": 0, "tpu": 0}
    looped = solved(hierarchy, system, S, r)
    monkeypatch.setattr(
        _xla, "by_platform", lambda solve, loops, fewer, r: solve(fewer, r)
    )
    written = solved(hierarchy, system, S, r)
    np.testing.assert_allclose(written, looped, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rate", [None, 1.3])
def test_a_field_is_solved_in_twenty_steps(rate):
    f, start = laplacian(72), jnp.zeros((72, 72))
    if rate is None:
        tx = bma.newton_bma(bma.per_tile((4, 4), reach=1))
    else:
        direction = bma.scale_by_newton_bma(
            bma.per_tile((4, 4), reach=1), update_interval=100
        )
        tx = optax.chain(direction, optax.trace(0.45), optax.scale(-rate))

    def step(carry, _):
        u, state = carry
        updates, state = tx.update(jax.grad(f)(u), state, u, value_fn=f)
        u = optax.apply_updates(u, updates)
        return (u, state), f(u)

    @jax.jit
    def run(u):
        (_, state), values = jax.lax.scan(step, (u, tx.init(u)), length=20)
        return state, f(u), values[-1]

    # The data are all 1: so is the solution, with loss 0.
    state, first, last = run(start)
    assert last < 2e-6 * first
    numbers = bma.diagnostics(state)
    assert numbers["local"] and numbers["coarse_ratio"] < 0.01
    # The curvature is constant: one refresh.
    assert numbers["products"] == 9 + 1


@functools.cache
def flow(n=36):
    """Two fields that meet in each pixel: the loss, and its least value."""
    a, b, c = np.random.default_rng(0).standard_normal((3, n, n))

    def f(p):
        data = 1e-2 * jnp.sum((a * p["u"] + b * p["v"] + c) ** 2)
        return data + sum(grad_squared(x, (0, 1)) for x in p.values())

    @jax.jit
    def least():
        zero = {"u": jnp.zeros((n, n)), "v": jnp.zeros((n, n))}
        g, G = jax.grad(f)(zero), product(f, zero)
        x, _ = jax.scipy.sparse.linalg.cg(G, g, tol=1e-10, maxiter=3000)
        return f(jax.tree.map(jnp.negative, x))

    return f, float(least())


LAYOUTS = {
    "a dictionary": (lambda p: p, {"u": (36, 36), "v": (36, 36)}, TILES),
    "the last axis": (
        lambda p: {"u": p[..., 0], "v": p[..., 1]},
        (36, 36, 2),
        TILES,
    ),
    "the first axis": (
        lambda p: {"u": p[0], "v": p[1]},
        (2, 36, 36),
        bma.stacked(TILES),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_flow_in_any_layout(layout):
    fields, shapes, rule = LAYOUTS[layout]
    f, least = flow()
    start = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))
    tx = bma.newton_bma(rule)

    def loss(p):
        return f(fields(p))

    def step(carry, _):
        p, state = carry
        updates, state = tx.update(jax.grad(loss)(p), state, p, value_fn=loss)
        p = optax.apply_updates(p, updates)
        return (p, state), loss(p)

    run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=20)[1])
    assert abs(run(start)[-1] - least) < 1e-6


def first_refresh(rule, loss, field):
    """A function of parameters: a field of the state after the first update.

    The rest of the state is no part of the program.
    """
    tx = bma.scale_by_newton_bma(rule)

    @jax.jit
    def run(u, **extra_args):
        _, state = tx.update(u, tx.init(u), u, value_fn=loss, **extra_args)
        return getattr(state, field)

    return run


def test_products_do_not_depend_on_the_size():
    for n in (12, 36):
        products = first_refresh(TILES, laplacian(n), "products")
        # Each element is probed, and the reach is checked.
        assert products(np.zeros((n, n))) == 9 + 1


# The declaration ----------------------------------------------------------------------

BEYOND = {
    "reach too small": (fourth_order, np.zeros(64), (4,), 1),
    "reach too small inside blocks": (
        lambda u: smooth(0, (0, 1, 2))(u) + jnp.sum((u[2:] - u[:-2]) ** 2),
        np.zeros((8, 4, 4)),
        (4, 4, 4),
        1,
    ),
    "no reach at all": (smooth(0, (0, 1)), np.zeros((16, 16)), (4, 4), 0),
    "a global term": (
        lambda u: smooth(0, (0, 1))(u) + 1e-4 * jnp.sum(u) ** 2,
        np.zeros((15, 15)),
        (4, 4),
        1,
    ),
}


@pytest.mark.parametrize("name", BEYOND)
def test_a_wrong_declaration_is_caught(name):
    f, params, tile, reach = BEYOND[name]
    tx = bma.scale_by_newton_bma(bma.per_tile(tile, reach=reach), update_interval=1)
    # Within jit: a warning, a flag, and the inverse of a diagonal near that of G.
    # Without jit it is an error, which test_troubles.py asks for.
    g = np.ones_like(params)
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, value_fn=f))
    with pytest.warns(UserWarning, match="further than `reach`"):
        updates, state = jax.block_until_ready(
            update(g, jax.jit(tx.init)(params), params)
        )
        jax.effects_barrier()
    assert not state.local and not bma.diagnostics(state)["local"]
    np.testing.assert_array_equal(updates, state.inverse_diagonal * g)
    ratio = np.diag(dense(f, params)) * np.asarray(state.inverse_diagonal).ravel()
    assert 0.4 < ratio.min() and ratio.max() < 2.5
    update(g, state, params)  # It is said once.
    jax.effects_barrier()


def test_a_wrong_declaration_is_caught_in_a_preconditioner():

    @functools.partial(jax.jit, static_argnums=0)
    def local(reach, like):
        G, rule = product(fourth_order, like), bma.per_tile((4,), reach=reach)
        return bma.preconditioner(G, like, rule).local

    with pytest.warns(UserWarning, match="further than `reach`"):
        assert not local(1, np.zeros(60))
        jax.effects_barrier()
    assert local(2, np.zeros(60))


def test_the_check_holds_at_every_scale():
    """Also in float32, where squares of very small or large numbers are 0 or inf."""
    with jax.enable_x64(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        u = np.linspace(0, 1, 60, dtype=np.float32)

        def loss(u, scale):
            return scale * fourth_order(u)

        for reach, true in ((1, False), (2, True)):
            local = first_refresh(bma.per_tile((4,), reach=reach), loss, "local")
            for scale in (1e-30, 1e-22, 1e-12, 1.0, 1e12, 1e18, 1e25):
                assert local(u, scale=np.float32(scale)) == true, scale


@pytest.mark.parametrize(
    ("of_loss", "of_params"),
    [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float64")],
)
def test_the_check_allows_for_the_rounding_of_the_loss(of_loss, of_params):
    def loss(u):
        u = u.astype(of_loss)
        return (grad_squared(u, (0, 1)) + jnp.sum(u**2)).astype(of_params)

    rng = np.random.default_rng(0)
    u = jnp.asarray(rng.standard_normal((36, 36)), of_params)
    for reach, true in ((1, True), (0, False)):
        local = first_refresh(bma.per_tile((4, 4), reach=reach), loss, "local")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert local(u) == true


def test_a_false_reach_is_found_in_a_field_of_any_unit():
    def f(p, scale):
        far = sum(jnp.sum((p["v"] - jnp.roll(p["v"], 7, k)) ** 2) for k in (0, 1))
        far = far + 1e-2 * jnp.sum(p["v"] ** 2)
        return grad_squared(p["u"], (0, 1)) + 1e-2 * jnp.sum(p["u"] ** 2) + scale * far

    like = {"u": jnp.zeros((15, 15), "float32"), "v": jnp.zeros((15, 15), "float32")}

    @functools.partial(jax.jit, static_argnums=0)
    def local(rule, scale):
        return bma.preconditioner(lambda v: jax.grad(f)(v, scale), like, rule).local

    for reach, true in ((1, False), (7, True)):
        rule = bma.per_tile((4, 4), reach=reach)
        for scale in (1.0, 1e-4, 1e-10):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert local(rule, jnp.float32(scale)) == true


def test_a_weak_pull_between_all_elements_is_found():
    """Each entry of it is tiny; of the curvature along constants it is nearly all."""

    def f(u, weight):
        smooth = grad_squared(u, (0, 1)) + 1e-3 * jnp.sum(u**2)
        return smooth + weight * jnp.mean(u) ** 2

    local = first_refresh(TILES, f, "local")
    for weight, true in ((0.0, True), (10.0, False), (100.0, False)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            u = np.zeros((33, 30), np.float32)
            assert local(u, weight=np.float32(weight)) == true, weight


def test_a_step_with_a_reach_is_exported_where_warnings_are_ignored():
    from jax import export

    u = jnp.zeros((12, 12))
    tx = bma.scale_by_newton_bma(bma.per_tile((4, 4), reach=1))
    state = jax.jit(tx.init)(u)

    def step(u, *leaves):
        given = jax.tree.unflatten(jax.tree.structure(state), leaves)
        return tx.update(u, given, u, value_fn=laplacian(12))[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export.export(jax.jit(step))(u, *jax.tree.leaves(state)).serialize()


def test_a_true_declaration_passes_in_float32():
    with jax.enable_x64(False):
        local = first_refresh(TILES, laplacian(18), "local")
        assert local(np.zeros((18, 18), np.float32))


def test_not_a_number_keeps_the_last_good_factor():
    def f(u, scale):
        return scale * laplacian(15)(u)

    u = jnp.ones((15, 15))
    tx = bma.scale_by_newton_bma(bma.per_tile((4, 4), reach=1), update_interval=1)
    update = jax.jit(
        lambda state, scale: tx.update(u, state, u, value_fn=f, scale=scale)
    )
    first, state = update(jax.jit(tx.init)(u), 1.0)
    second, state = update(state, float("nan"))
    np.testing.assert_array_equal(first, second)
    assert state.failures == 1 and state.local


def test_indefinite_curvature_still_descends():
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.standard_normal((32, 33)))

    def f(u):
        return jnp.sum(weights * jnp.diff(u, axis=0) ** 2) - jnp.sum(u**2)

    u = jnp.asarray(rng.standard_normal((33, 33)))
    tx = bma.scale_by_newton_bma(bma.per_tile((2, 2), reach=1), update_interval=100)
    state = jax.jit(tx.init)(u)
    update = jax.jit(lambda g, s: tx.update(g, s, u, value_fn=f))
    for _ in range(20):
        g = jnp.asarray(rng.standard_normal((33, 33)))
        updates, state = update(g, state)
        assert jnp.vdot(g, updates) > 0


def test_lineax_and_conjugate_gradients_take_nested_levels():
    f, like = laplacian(33), jnp.zeros((33, 33))

    @jax.jit
    def solve(b):
        G = product(f, like)
        C = bma.preconditioner(G, like, bma.per_tile((2, 2), reach=1))
        x, _ = jax.scipy.sparse.linalg.cg(G, b, M=C, tol=1e-8, maxiter=30)
        return G(x), C.as_lineax().T.mv(b), C(b)

    b = np.random.default_rng(0).standard_normal((33, 33))
    image, of_lineax, expected = solve(b)
    np.testing.assert_allclose(image, b, atol=1e-6)
    np.testing.assert_allclose(of_lineax, expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("shape", "rule", "megabytes"),
    [
        ((10**5,), bma.per_tile((1,), reach=1), 5),
        ((300, 300), ONES, 9),
        ((8, 100_000), bma.per_tile((8, 1), reach=1), 5),
        ((64, 64, 2), TILES, 0.1),
    ],
    ids=str,
)
def test_what_a_reach_holds(shape, rule, megabytes):
    like = jax.ShapeDtypeStruct(shape, "float32")
    state = jax.eval_shape(bma.scale_by_newton_bma(rule).init, like)
    held = sum(4 * x.size for x in jax.tree.leaves((state.N, state.K)))
    assert held < megabytes * 1e6


def test_many_products_of_fields_are_said():
    like = jax.ShapeDtypeStruct((16, 16, 200), "float32")
    tx = bma.scale_by_newton_bma(bma.per_tile((4, 4), reach=1))
    with pytest.warns(UserWarning, match="each refresh costs 2,000 products") as caught:
        jax.eval_shape(tx.init, like)
    assert caught[0].filename == __file__


def test_whole_arrays_beside_a_reach_are_counted():
    many = dict.fromkeys(map(str, range(1001)), jax.ShapeDtypeStruct((), "float32"))
    tx = bma.scale_by_newton_bma(bma.per_tile((1,), reach=1))
    with pytest.warns(UserWarning, match="1,001 blocks in one group"):
        jax.eval_shape(tx.init, many)


def mixed(p):
    """A field with neighbours beside numbers that see nothing but themselves."""
    return jnp.sum(jnp.diff(p["u"]) ** 2) + jnp.sum(p["u"] ** 2) + jnp.sum(p["c"] ** 4)


@functools.partial(jax.jit, static_argnums=0)
def first_update(tx, params):
    """The first direction, and the gradient."""
    grads = jax.grad(mixed)(params)
    return tx.update(grads, tx.init(params), params, value_fn=mixed)[0], grads


def test_an_array_without_blocks_beside_a_field():
    params = {"u": np.ones(12), "c": np.ones(3)}
    rule = bma.by_path({"u": bma.per_tile((4,), reach=1), "c": None})
    updates, grads = first_update(bma.scale_by_newton_bma(rule), params)
    np.testing.assert_allclose(updates["c"], grads["c"] / 12, rtol=1e-5)


def test_fields_with_two_reaches_beside_a_layer():
    """Each part of one tree has the inverse that it has alone."""
    params = {"net": {"b": jnp.ones(3), "w": jnp.ones((2, 3))}, "u": jnp.ones((12, 12))}
    params["v"] = jnp.ones(40)
    rules = {
        "net": bma.within("layer", bma.per_column),
        "u": bma.per_tile((4, 4), reach=1),
        "v": bma.per_tile((4,), reach=2),
    }

    def net(p):
        return jnp.sum((p["w"] @ jnp.arange(1.0, 4.0)) ** 2) + jnp.sum(
            (p["b"] - 1) ** 4
        )

    losses = {"net": net, "u": smooth(1, (0, 1)), "v": fourth_order}

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def apply(f, x, rule):
        return bma.preconditioner(product(f, x), x, rule, num_probes=9)(x)

    together = apply(
        lambda p: sum(f(p[name]) for name, f in losses.items()),
        params,
        bma.by_path(rules),
    )
    for name, rule in rules.items():
        alone = apply(losses[name], params[name], rule)
        chex.assert_trees_all_close(together[name], alone, rtol=1e-6)


def test_one_element_tiles_are_newtons_method_however_many():
    """100 blocks of one element: with coarser levels it would not be exact."""
    x = np.random.default_rng(0).standard_normal(100)
    params = {"u": x, "c": np.ones(1)}
    rule = bma.per_tile((1,), reach=1)
    updates, grads = first_update(bma.scale_by_newton_bma(rule), params)
    differences = np.diff(np.eye(100), axis=0)
    H = 2 * differences.T @ differences + 2 * np.eye(100)
    expected = np.linalg.solve(H, grads["u"])
    np.testing.assert_allclose(updates["u"], expected, rtol=1e-4, atol=1e-5)


def test_a_diagonal_that_is_given_costs_no_products():
    x = jnp.ones((24, 24))
    given = bma.Hessian(diagonal_fn=lambda p: jax.tree.map(jnp.ones_like, p))
    states = []
    for curvature in (bma.Hessian(), given):
        tx = bma.scale_by_newton_bma(TILES, curvature=curvature)
        update = jax.jit(functools.partial(tx.update, value_fn=lambda p: jnp.sum(p**2)))
        states.append(update(x, jax.jit(tx.init)(x), x)[1])
    chex.assert_trees_all_close(*(state.N for state in states))
    probed, known = (int(state.products) for state in states)
    assert known == 4 + 1 < probed  # The colours and the check of the reach.


def test_what_a_loss_takes_and_raises():
    def loss(p, **named):
        return named["scale"] * jnp.sum(p**2)

    def broken(p):
        raise TypeError("a mistake of its own")

    x, tx = jnp.ones(4), bma.scale_by_newton_bma(key=jax.random.key(3))
    update = jax.jit(functools.partial(tx.update, value_fn=loss))
    updates, _ = update(x, jax.jit(tx.init)(x), x, scale=5.0)
    np.testing.assert_allclose(updates, x / 10, rtol=1e-5)
    with pytest.raises(TypeError, match="a mistake of its own"):
        tx.update(x, tx.init(x), x, value_fn=broken)
