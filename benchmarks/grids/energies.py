"""Energies of fields that people minimise: surfaces, phases, and those of images.

Areas are those of a unit square, so that an energy and its answer hardly change with n.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage

import bma_optax as bma
from benchmarks.grids.images import TWO_LAST, blend, denoise, flow, registration
from benchmarks.grids.problems import dirichlet
from benchmarks.harness.solver import Problem

NEAR = bma.per_tile((4, 4), reach=1)


def slopes(u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Differences down and right, at the upper left corner of each cell."""
    return u[1:, :-1] - u[:-1, :-1], u[:-1, 1:] - u[:-1, :-1]


def minimal_surface(n: int = 64) -> Problem:
    """The least area over a wire frame that is a random wave on each side."""

    def make(seed: int):
        rng = np.random.default_rng(seed)
        t = np.linspace(0, 1, n + 2)
        frame = np.zeros((n + 2, n + 2))
        waves = [np.sin(np.pi * np.outer(np.arange(1, 4), t)) for _ in range(4)]
        sides = [0.5 * rng.standard_normal(3) @ wave for wave in waves]
        frame[0], frame[-1], frame[:, 0], frame[:, -1] = sides
        return np.zeros((n, n)), frame

    def loss(u, data):
        whole = data.at[1:-1, 1:-1].set(u)
        down, right = slopes(whole)
        up, left = slopes(whole[::-1, ::-1])
        h = 1 / (n + 1)
        return sum(
            jnp.sum(h * jnp.sqrt(h**2 + a**2 + b**2)) / 2
            for a, b in ((down, right), (up, left))
        )

    return Problem(
        name="surface",
        title=f"minimal surface, {n} x {n}",
        make=make,
        loss=loss,
        partition=NEAR,
    )


def torsion(n: int = 64, twist: float = 5.0, stiffness: float = 1e3) -> Problem:
    """A twisted bar that yields: the stress is at most the distance to the surface."""
    i = np.minimum(np.arange(1, n + 1), np.arange(n, 0, -1)) / (n + 1)
    distance, area = np.minimum(i[:, None], i), 1 / (n + 1) ** 2

    def make(seed: int):
        return np.zeros((n, n)), np.array(twist * (1 + 0.3 * seed))

    def loss(u, data):
        beyond = jax.nn.relu(u - distance.astype(u.dtype))
        body = area * (stiffness * jnp.sum(beyond**2) / 2 - data * jnp.sum(u))
        return dirichlet(jnp.pad(u, 1), 2) + body

    return Problem(
        name="torsion",
        title=f"elastic-plastic torsion, {n} x {n}",
        make=make,
        loss=loss,
        partition=NEAR,
    )


def bratu(n: int = 64, heat: float = 6.0) -> Problem:
    """Combustion in a square, just before it ignites (at 6.8)."""
    area = 1 / (n + 1) ** 2

    def make(seed: int):
        return np.zeros((n, n)), np.array(heat * (1 - 0.1 * seed))

    def loss(u, data):
        energy = dirichlet(jnp.pad(u, 1), 2) - data * area * jnp.sum(jnp.exp(u))
        # Every stable state is below 1.4; what has ignited has no least energy.
        return jnp.where(jnp.max(u) > 1.4, jnp.inf, energy)

    return Problem(
        name="bratu", title=f"Bratu, {n} x {n}", make=make, loss=loss, partition=NEAR
    )


def superconductor(n: int = 64, length: float = 0.1) -> Problem:
    """Ginzburg-Landau: a complex field, as two, with one vortex held by its edge."""
    x = np.linspace(-1, 1, n + 2)
    area = (2 / (n + 1)) ** 2

    def make(seed: int):
        rng = np.random.default_rng(seed)
        z = x + 1j * x[:, None] - (rng.uniform(-0.3, 0.3) + 1j * rng.uniform(-0.3, 0.3))
        edge = np.stack([z.real, z.imag], -1) / np.abs(z)[..., None]
        start = 0.5 * edge[1:-1, 1:-1]
        return start, edge

    def loss(u, data):
        whole = data.at[1:-1, 1:-1].set(u)
        excess = 1 - jnp.sum(u**2, -1)
        return dirichlet(whole, 2) + area / (4 * length**2) * jnp.sum(excess**2)

    return Problem(
        name="superconductor",
        title=f"Ginzburg-Landau, {n} x {n} x 2",
        make=make,
        loss=loss,
        partition=TWO_LAST,
    )


def phases(n: int = 128, width: float = 0.02, time: float = 1.0) -> Problem:
    """Allen-Cahn: one implicit step of two phases that separate."""
    area = 1 / n**2

    def make(seed: int):
        noise = np.random.default_rng(seed).standard_normal((n, n))
        start = scipy.ndimage.gaussian_filter(noise, 4, mode="wrap")
        start *= 0.5 / np.abs(start).max()
        return start, start

    def loss(u, data):
        around = [jnp.sum((u - jnp.roll(u, 1, axis)) ** 2) / 2 for axis in (0, 1)]
        wells = (1 - u**2) ** 2 / 4 + (u - data) ** 2 / (2 * time)
        return width**2 * (around[0] + around[1]) + area * jnp.sum(wells)

    return Problem(
        name="phases",
        title=f"a step of Allen-Cahn, {n} x {n}, periodic",
        make=make,
        loss=loss,
        partition=NEAR,
    )


def larger(make: Callable[[int], Problem], n: int) -> Problem:
    problem = make(n)
    return dataclasses.replace(problem, name=f"{problem.name}_{n}")


ENERGIES = {
    "flow": flow,
    "blend": blend,
    "surface": minimal_surface,
    "torsion": torsion,
    "bratu": bratu,
    "superconductor": superconductor,
    "registration": registration,
    "phases": phases,
    "denoise": denoise,
}
ENERGIES |= {
    f"{name}_256": functools.partial(larger, ENERGIES[name], 256)
    for name in ("surface", "torsion", "bratu")
}
