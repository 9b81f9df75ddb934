"""The partition that is suggested for a loss, and what is printed of it."""

import contextlib
import functools
import io
import re

import jax
import jax.numpy as jnp
import pytest

import bma_optax as bma
from bma_optax.suggest import _report, _trial

# A multiple of the number of colors: elements at two ends have different ones, and the
# programs no second set of probes.
N = 36


def smooth(u, weights=None, axes=None):
    axes = range(u.ndim) if axes is None else axes
    weights = weights or [1.0] * u.ndim
    return sum(weights[i] * jnp.sum(jnp.diff(u, axis=i) ** 2) for i in axes)


def periodic(u):
    differences = [(jnp.roll(u, 1, axis) - u) ** 2 for axis in range(u.ndim)]
    return jnp.sum(sum(differences)) + 1e-3 * jnp.sum((u - 1) ** 2)


def inpainting(u):
    return smooth(u) + jnp.sum((u[:: N // 2, :: N // 3] - 1) ** 2)


def flow(first, second):
    """Horn and Schunck's optical flow between two smooth images."""
    y, x = jnp.meshgrid(jnp.linspace(0, 3, N), jnp.linspace(0, 3, N), indexing="ij")
    ix, iy, it = jnp.cos(x) * jnp.cos(y), -jnp.sin(x) * jnp.sin(y), 0.1 * jnp.cos(x)
    data = jnp.sum((ix * first + iy * second + it) ** 2)
    return data + 3 * smooth(first) + 3 * smooth(second)


def blending(u):
    """Inside a disc gradients follow an image, and nothing outside it is unknown."""
    y, x = jnp.meshgrid(jnp.arange(1.0 * N), jnp.arange(1.0 * N), indexing="ij")
    inside = ((y - N / 2) ** 2 + (x - N / 2) ** 2 < (N / 3) ** 2)[..., None]
    u = jnp.where(inside, u, 0)
    guide = jnp.sin(x / 3.0)[..., None] * jnp.arange(1.0, 4.0)[None, None]
    return sum(
        jnp.sum((jnp.diff(u, axis=i) - jnp.diff(guide, axis=i)) ** 2) for i in (0, 1)
    )


def rotated(u):
    """Diffusion along pi/4, a hundred times weaker across."""
    gx = (u[1:, 1:] - u[:-1, :-1]) / 2**0.5
    gy = (u[1:, :-1] - u[:-1, 1:]) / 2**0.5
    return jnp.sum(gx**2 + 0.01 * gy**2) + (u[3, 3] - 1) ** 2 + 1e-3 * jnp.sum(u**2)


def plate(u):
    bends = [jnp.diff(u, 2, axis=axis) for axis in (0, 1)]
    twist = jnp.diff(jnp.diff(u, axis=0), axis=1)
    data = jnp.sum((u[::5, ::5] - 1) ** 2)
    return sum(jnp.sum(b**2) for b in bends) + 2 * jnp.sum(twist**2) + data


def bending(u):
    """A deformation of two fields, which a landmark holds together."""
    seconds = sum(jnp.sum(jnp.diff(u, 2, axis=axis) ** 2) for axis in (1, 2))
    return seconds + jnp.sum((u[0, ::5, ::5] + u[1, ::5, ::5] - 1) ** 2)


def blur(u):
    kernel = jnp.exp(-(jnp.arange(-3.0, 4.0) ** 2) / 4)
    kernel = jnp.outer(kernel, kernel)[None, None] / jnp.sum(kernel) ** 2
    blurred = jax.lax.conv(u[None, None], kernel, (1, 1), "SAME")[0, 0]
    return jnp.sum((blurred - 1) ** 2) + 1e-3 * jnp.sum(u**2)


def total_variation(u):
    data = jnp.sin(jnp.arange(1.0 * N) / 2)[:, None] + jnp.zeros((N, N))
    steps = jnp.diff(u, axis=0)[:, :-1] ** 2 + jnp.diff(u, axis=1)[:-1] ** 2
    return jnp.sum(jnp.sqrt(steps + 1e-2)) + 1e-3 * jnp.sum((u - data) ** 2)


def superresolution(u):
    """Four elements at a time are seen by their mean."""
    return smooth(u) + 0.01 * jnp.sum((jnp.mean(u.reshape(-1, 4), 1) - 1) ** 2)


def quadratic_elements(u):
    """Slopes on elements of three nodes, of which two neighbours share one."""
    left, middle, right = u[:-2:2], u[1:-1:2], u[2::2]
    ends = 7 * left**2 + 2 * left * right + 7 * right**2
    return jnp.sum(ends + 16 * middle * (middle - left - right)) + (u[3] - 1) ** 2


TILE = bma.per_tile((4, 4), reach=1)
CASES = {
    "image": (inpainting, jnp.zeros((N, N)), TILE),
    "periodic": (periodic, jnp.zeros((N, N)), TILE),
    "line": (
        lambda u: smooth(u) + (u[7] - 1) ** 2,
        jnp.zeros(200),
        bma.per_tile(4, reach=1),
    ),
    "volume": (
        lambda u: smooth(u) + (u[3, 4, 5] - 1) ** 2,
        jnp.zeros((12, 12, 12)),
        bma.per_tile((4, 4, 4), reach=1),
    ),
    "flow (n, n, 2)": (
        lambda u: flow(u[..., 0], u[..., 1]),
        jnp.zeros((N, N, 2)),
        TILE,
    ),
    "flow (2, n, n)": (
        lambda u: flow(u[0], u[1]),
        jnp.zeros((2, N, N)),
        bma.stacked(TILE),
    ),
    "flow in a dict": (
        lambda p: flow(p["x"], p["y"]),
        {"x": jnp.zeros((N, N)), "y": jnp.zeros((N, N))},
        TILE,
    ),
    "colors in a mask": (
        blending,
        jnp.zeros((N, N, 3)),
        bma.per_tile((4, 4, 1), reach=(1, 1, 0)),
    ),
    "images that do not meet": (
        lambda p: inpainting(p["a"]) + 2 * inpainting(p["b"]),
        {"a": jnp.zeros((N, N)), "b": jnp.zeros((N, N))},
        bma.within("array", TILE),
    ),
    "field and scalars": (
        lambda p: (
            smooth(p["u"]) + jnp.sum((p["u"] - p["mean"]) ** 2) / 99 + p["mean"] ** 2
        ),
        {"u": jnp.zeros((N, N)), "mean": jnp.ones(())},
        TILE,
    ),
    "field and network": (
        lambda p: inpainting(p["u"]) + jnp.sum(jnp.tanh(p["w"] @ jnp.ones(9)) ** 2),
        {"u": jnp.zeros((N, N)), "w": jnp.ones((9, 9)) / 9},
        bma.by_path({"^u$": TILE}),
    ),
    "stiff along the first axis": (
        lambda u: smooth(u, [1.0, 0.01]) + (u[3, 3] - 1) ** 2,
        jnp.zeros((N, N)),
        bma.per_tile((4, 1), reach=1),
    ),
    "stiff along the last axis": (
        lambda u: smooth(u, [0.001, 1.0]) + (u[3, 3] - 1) ** 2,
        jnp.zeros((N, N)),
        bma.per_tile((1, 4), reach=1),
    ),
    "weaker along the last axis": (  # Thin tiles save less than they cost.
        lambda u: smooth(u, [1.0, 0.2]) + (u[3, 3] - 1) ** 2,
        jnp.zeros((N, N)),
        TILE,
    ),
    "weak along an axis, and not smooth": (
        lambda u: smooth(u, [1.0, 0.3]) + jnp.sum(u**2),
        jnp.zeros((N, N)),
        bma.per_leaf,
    ),
    "stiff along a diagonal": (rotated, jnp.zeros((N, N)), TILE),
    "plate": (
        plate,
        jnp.zeros((N, N)),
        bma.per_tile((4, 4), reach=2, slopes=True),
    ),
    "spline": (
        lambda u: jnp.sum(jnp.diff(u, 2) ** 2) + jnp.sum((u[::9] - 1) ** 2),
        jnp.zeros(200),
        bma.per_tile(4, reach=2, slopes=True),
    ),
    "line under tension": (
        lambda u: (
            jnp.sum(jnp.diff(u, 2) ** 2) + 0.15 * smooth(u) + jnp.sum(u[::99] ** 2)
        ),
        jnp.zeros(400),
        bma.per_tile(4, reach=2, slopes=True),
    ),
    "bending, fields first": (
        bending,
        jnp.zeros((2, 20, 20)),
        bma.stacked(bma.per_tile((4, 4), reach=2, slopes=True)),
    ),
    "total variation": (total_variation, jnp.zeros((N, N)), TILE),
    "prime": (lambda u: smooth(u) + (u[5, 5] - 1) ** 2, jnp.zeros((31, 37)), TILE),
    "five in a line": (
        lambda u: jnp.sum(jnp.diff(u, n=2) ** 2) + u[2] ** 2,
        jnp.zeros(5),
        bma.per_tile(4, reach=2),
    ),
    "five in a line, by first differences": (
        lambda u: smooth(u) + 0.01 * jnp.sum(u**2),
        jnp.zeros(5),
        bma.per_leaf,
    ),
    "not finite nearby": (
        lambda u: inpainting(u) - 1e-6 * jnp.sum(jnp.sqrt(1e-6 - u**2)),
        jnp.zeros((N, N)),
        TILE,
    ),
    "two that meet behind all cuts": (
        lambda u: inpainting(u) + (u[17, 17] - u[31, 31]) ** 2,
        jnp.zeros((N, N)),
        bma.per_leaf,
    ),
    "2 × 1000": (
        lambda u: smooth(u) + (u[0, 5] - 1) ** 2,
        jnp.zeros((2, 1000)),
        bma.stacked(bma.per_tile(4, reach=1)),
    ),
    "superresolution": (superresolution, jnp.zeros(84), bma.per_tile(4, reach=3)),
    "quadratic elements": (
        quadratic_elements,
        jnp.zeros(145),
        bma.per_tile(4, reach=2),
    ),
    "blur": (blur, jnp.zeros((N, N)), bma.per_leaf),
    "network": (
        lambda p: jnp.mean(
            (jnp.tanh(jnp.eye(9) @ p["a"]) @ p["b"] - jnp.arange(9.0)) ** 2
        ),
        {"a": jnp.full((9, 12), 0.1), "b": jnp.full(12, 0.2)},
        bma.per_leaf,
    ),
    "one number": (lambda x: x**2, jnp.ones(()), bma.per_leaf),
    "bfloat16": (lambda x: x**2, jnp.ones((), jnp.bfloat16), bma.per_leaf),
    "nothing": (lambda p: jnp.zeros(()), {"a": jnp.zeros((0, 3))}, bma.per_leaf),
}


# What the printed table also says of some.
WORDS = {
    "periodic": "axis 0, 1",
    "flow in a dict": "grid of 2 fields",
    "colors in a mask": "axis 2",
    "stiff along the first axis": f"{TILE} takes ",
    "weaker along the last axis": "per_tile((4, 1), reach=1) takes ",
    "stiff along a diagonal": "per_tile((4, 4), reach=1, slopes=True) takes ",
    "line under tension": "per_tile((4,), reach=2) takes ",
    "plate": "fourth order",
    "bending, fields first": "with 2 slopes a block",
    "field and scalars": "taken for zero",
    "five in a line, by first differences": "few steps are needed without them",
    "blur": "what is slow here is not smooth",
    "two that meet behind all cuts": "entries of the curvature beyond the reach above",
    "network": "No array has neighbours",
    "bfloat16": "Keep parameters in float32",
}


@functools.cache
def suggested(name):
    """The rule for a case, and what is printed."""
    loss, params, _ = CASES[name]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        rule = bma.suggest_partition(loss, params)
    return rule, printed.getvalue()


@pytest.mark.parametrize("name", CASES)
def test_the_right_rule_is_found_and_said(name):
    rule = CASES[name][-1]
    found, text = suggested(name)
    assert found == rule, text
    assert text.startswith(f"Suggested partition: {rule}\n")
    assert WORDS.get(name, "") in text
    if name == "image":
        line = next(x for x in text.splitlines() if x.startswith("Conjugate"))
        steps, without = (int(x) for x in re.findall(r"(\d+) (?:steps|without)", line))
        assert 5 < steps < 40 and 2 * steps < without


def test_a_saddle_is_said(capsys):
    def loss(u):
        return smooth(u) - jnp.sum(u**2)

    assert bma.suggest_partition(loss, jnp.zeros((N, N))) == TILE
    assert "not positive definite" in capsys.readouterr().out


def test_curvature_that_vanishes_at_the_parameters_is_said(capsys):
    def loss(u):
        quartic = sum(jnp.sum(jnp.diff(u, axis=axis) ** 4) for axis in (0, 1))
        return quartic + (u[3, 5] - 1) ** 2

    assert bma.suggest_partition(loss, jnp.zeros((N, N))) == TILE
    assert "no curvature at these parameters" in capsys.readouterr().out


def test_the_rule_is_the_whole_program():
    loss, params, _ = CASES["image"]
    tx = bma.newton_bma(suggested("image")[0])
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step(state, u):
        updates, state = tx.update(jax.grad(loss)(u), state, u, value_fn=loss)
        return state, u + updates, loss(u + updates)

    for _ in range(20):
        state, params, value = step(state, params)
    assert value < 1e-6


def test_a_solution_that_is_not_reached_is_said(capsys, monkeypatch):
    for module in (_report, _trial):
        monkeypatch.setattr(module, "MOST_STEPS", 8)
    loss, params, rule = CASES["image"]
    assert bma.suggest_partition(loss, params) == rule
    text = capsys.readouterr().out
    assert "more than 8 steps to 1e-6 of the gap with blocks, no fewer without" in text


def test_arguments_reach_the_loss():
    def loss(u, weight, *, data):
        return weight * smooth(u) + jnp.sum((u - data) ** 2)

    params = jnp.zeros((N, N))
    rule = bma.suggest_partition(loss, params, 30.0, data=params, verbose=False)
    assert rule == TILE


def test_a_key_of_the_loss_comes_by_position():
    def loss(u, key):
        return jnp.sum(jax.random.uniform(key, u.shape) * u**2)

    key, params = jax.random.key(0), jnp.ones(3)
    assert bma.suggest_partition(loss, params, key, verbose=False) == bma.per_leaf


def test_steps_that_solve_exactly_are_counted(capsys):
    """Here the diagonal is nearly all of G."""

    def loss(u):
        return 1e-7 * smooth(u) + jnp.sum((u - 1) ** 2)

    assert bma.suggest_partition(loss, jnp.zeros((N, N))) == bma.per_leaf
    assert "with blocks, 1 without" in capsys.readouterr().out


def test_a_loss_without_curvature_is_told(capsys):
    def variation(u):
        return jnp.sum(jnp.abs(jnp.diff(u)))

    assert bma.suggest_partition(variation, jnp.arange(9.0)) == bma.per_leaf
    assert "The curvature is 0 here" in capsys.readouterr().out
