"""What Optax does not have: SOAP, and a control that scales along a learned direction.

Arrays are seen as matrices, inputs x units: the last axis counts units, in embeddings
the first one. Arrays with one axis have Adam, or stay as they are.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.networks.tasks import EMBEDDING


def is_embedding(path: Any) -> bool:
    return EMBEDDING in jax.tree_util.keystr(path)


def axes(path: Any, array: jax.Array) -> tuple[tuple[int, ...], int]:
    """The axes inside a unit, and the one that counts units, of an array with two."""
    return ((1,), 0) if is_embedding(path) else (tuple(range(array.ndim - 1)), -1)


def unzip(like: Any, rows: Any) -> tuple[Any, ...]:
    """Trees, from a tree that has a tuple for each array."""
    structure = jax.tree.structure(like)
    columns = zip(*structure.flatten_up_to(rows), strict=True)
    return tuple(jax.tree.unflatten(structure, column) for column in columns)


class ScaleAlongDirectionState(NamedTuple):
    direction: Any  # A number an input, all axes kept.


def scale_along_direction(c: Any, kept: float = 0.95):
    """x + (c - 1) q (q · x) for the update x of each unit: a control.

    The units of an array share q over their inputs. It follows the leading direction of
    the updates that pass, by a step of power iteration a step.
    """

    def init(params):
        def start(path, p):
            shape = [1] * p.ndim
            for i in axes(path, p)[0] if p.ndim > 1 else ():
                shape[i] = p.shape[i]
            return jnp.full_like(p, 1 / math.sqrt(math.prod(shape)), shape=shape)

        return ScaleAlongDirectionState(jax.tree.map_with_path(start, params))

    def update(updates, state, params=None):
        def one(path, x, y):
            if x.ndim < 2:
                return x, y
            inputs, units = axes(path, x)
            q = y / jnp.linalg.norm(y)
            along = jnp.sum(x * q, inputs, keepdims=True)
            target = jnp.sum(x * along, units, keepdims=True)
            size = jnp.linalg.norm(target)
            turned = kept * y + (1 - kept) * target / size
            return x + (c - 1) * along * q, jnp.where(size > 0, turned, y)

        pairs = jax.tree.map_with_path(one, updates, state.direction)
        updates, direction = unzip(updates, pairs)
        return updates, ScaleAlongDirectionState(direction)

    return optax.GradientTransformation(init, update)


class Side(NamedTuple):
    """SOAP's statistics of one axis of a matrix."""

    square: jax.Array  # (n, n): decayed average of G Gᵀ or Gᵀ G.
    basis: jax.Array  # (n, n), orthogonal.


class ScaleBySOAPState(NamedTuple):
    count: jax.Array
    mu: Any  # Like params.
    nu: Any  # Like params, as matrices, in the rotated basis.
    sides: Any  # Two for each array, None for axes that are not rotated.


def scale_by_soap(
    b1: Any = 0.95,
    b2: Any = 0.95,
    eps: float = 1e-8,
    interval: int = 10,
    longest: int = 2048,
):
    """SOAP: Adam in the eigenbases of Shampoo's factors.

    Vyas et al., arXiv 2409.11321, and their code: the first gradient gives the bases
    and moves nothing; afterwards the second moment is kept up at every step, and every
    `interval` steps a step of orthogonal iteration turns the bases. Axes longer than
    `longest` are not rotated, nor are arrays with one axis.
    """

    def init(params):
        def sides(p):
            return tuple(
                Side(jnp.zeros((n, n), p.dtype), jnp.eye(n, dtype=p.dtype))
                if p.ndim > 1 and n <= longest
                else None
                for n in as_matrix(p).shape
            )

        mu = optax.tree.zeros_like(params)
        nu, count = jax.tree.map(as_matrix, mu), jnp.zeros((), jnp.int32)
        return ScaleBySOAPState(count, mu, nu, jax.tree.map(sides, params))

    def update(grads, state, params=None):
        count = optax.safe_increment(state.count)
        first = count == 1
        steps = jnp.maximum(count - 1, 1)  # Of Adam.

        def one(g, mu, nu, sides):
            matrix = as_matrix(g)
            mu = jnp.where(first, mu, b1 * mu + (1 - b1) * g)
            rotated = rotate(matrix, sides)
            nu = jnp.where(first, nu, b2 * nu + (1 - b2) * rotated**2)
            m = rotate(as_matrix(mu), sides) / (1 - b1**steps)
            v = nu / (1 - b2**steps)
            step = rotate(m / (jnp.sqrt(v) + eps), sides, back=True)
            step = jnp.where(first, 0, step.reshape(g.shape))
            grams = (lambda: matrix @ matrix.T), (lambda: matrix.T @ matrix)
            sides = tuple(
                side and side._replace(square=b2 * side.square + (1 - b2) * gram())
                for side, gram in zip(sides, grams, strict=True)
            )
            due = jnp.where(first, 0, jnp.where(count % interval == 0, 1, 2))
            branches = eigenvectors, turn, lambda nu, sides: (nu, sides)
            return step, mu, *jax.lax.switch(due, branches, nu, sides)

        rows = jax.tree.map(one, grads, state.mu, state.nu, state.sides)
        updates, *statistics = unzip(grads, rows)
        return updates, ScaleBySOAPState(count, *statistics)

    return optax.GradientTransformation(init, update)


def as_matrix(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def rotate(x, sides, back=False):
    left, right = (side and (side.basis.T if back else side.basis) for side in sides)
    x = x if left is None else left.T @ x
    return x if right is None else x @ right


def eigenvectors(nu, sides):
    """Both bases at their start."""
    return nu, tuple(
        side and side._replace(basis=jnp.linalg.eigh(side.square)[1]) for side in sides
    )


def turn(nu, sides):
    """A step of orthogonal iteration, the largest estimated eigenvalue first."""
    turned = []
    for axis, side in enumerate(sides):
        if side is not None:
            square, basis = side
            order = jnp.argsort(-jnp.sum(basis * (square @ basis), axis=0))
            nu = jnp.take(nu, order, axis)
            basis = jnp.linalg.qr(square @ basis[:, order])[0]
            side = Side(square, basis)
        turned.append(side)
    return nu, tuple(turned)
