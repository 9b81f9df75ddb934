"""Peers that Optax does not have, or not as needed: Adam-mini and SOAP.

Arrays are seen as matrices, inputs x units: the last axis counts units, in embeddings
the first one. Arrays with one axis have Adam.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.networks.tasks import EMBEDDINGS


def is_embedding(path: Any) -> bool:
    return EMBEDDINGS in jax.tree_util.keystr(path)


def input_axes(path: Any, array: jax.Array) -> tuple[int, ...]:
    """The axes inside a unit; none for arrays with one axis."""
    if array.ndim < 2:
        return ()
    return (1,) if is_embedding(path) else tuple(range(array.ndim - 1))


def scale_by_adam_mini(b1: Any = 0.9, b2: Any = 0.99, eps: float = 1e-8):
    """Adam-mini: the second moment of a unit is the mean over its inputs.

    Zhang et al., arXiv 2406.16793. One number a unit everywhere; the paper has one a
    head for queries and keys, which is coarser.
    """

    def squares(grads):
        return jax.tree.map_with_path(
            lambda path, g: jnp.mean(g**2, input_axes(path, g), keepdims=True), grads
        )

    def init(params):
        mu = optax.tree.zeros_like(params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, squares(mu))

    def update(grads, state, params=None):
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        nu = optax.tree.update_moment(squares(grads), state.nu, b2, 1)
        m, v = bias_corrected(mu, b1, count), bias_corrected(nu, b2, count)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), m, v)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def bias_corrected(moment, b, count):
    return optax.tree.bias_correction(moment, b, count)


class Rotation(NamedTuple):
    """SOAP's statistics of one matrix (m, n)."""

    left: jax.Array  # (m, m): decayed average of G Gᵀ.
    right: jax.Array  # (n, n): of Gᵀ G.
    left_basis: jax.Array  # (m, m), orthogonal.
    right_basis: jax.Array  # (n, n).


class ScaleBySOAPState(NamedTuple):
    count: jax.Array
    mu: Any  # Like params.
    nu: Any  # Like params, as matrices, in the rotated basis.
    rotation: Any  # A Rotation a matrix, None for arrays with one axis.


def scale_by_soap(
    b1: Any = 0.95, b2: Any = 0.95, eps: float = 1e-8, interval: int = 10
):
    """SOAP: Adam in the eigenbases of Shampoo's factors.

    Vyas et al., arXiv 2409.11321, and their code: the first gradient gives the bases
    and moves nothing; afterwards the second moment is kept up at every step, and every
    `interval` steps a step of orthogonal iteration turns the bases.
    """

    def init(params):
        def rotation(p):
            if p.ndim < 2:
                return None
            m, n = as_matrix(p).shape
            square = jnp.zeros((m, m), p.dtype), jnp.zeros((n, n), p.dtype)
            eyes = jnp.eye(m, dtype=p.dtype), jnp.eye(n, dtype=p.dtype)
            return Rotation(*square, *eyes)

        zeros = optax.tree.zeros_like(params)
        nu = jax.tree.map(as_matrix, zeros)
        rotations = jax.tree.map(rotation, params)
        return ScaleBySOAPState(jnp.zeros((), jnp.int32), zeros, nu, rotations)

    def update(grads, state, params=None):
        count = optax.safe_increment(state.count)
        first = count == 1
        steps = jnp.maximum(count - 1, 1)  # Of Adam.

        def one(g, mu, nu, rotation):
            matrix = as_matrix(g)
            mu = jnp.where(first, mu, b1 * mu + (1 - b1) * g)
            rotated = rotate(matrix, rotation)
            nu = jnp.where(first, nu, b2 * nu + (1 - b2) * rotated**2)
            m = rotate(as_matrix(mu), rotation) / (1 - b1**steps)
            v = nu / (1 - b2**steps)
            step = m / (jnp.sqrt(v) + eps)
            step = jnp.where(first, 0, rotate_back(step, rotation).reshape(g.shape))
            if rotation is None:
                return step, mu, nu, None
            left, right, *bases = rotation
            left = b2 * left + (1 - b2) * matrix @ matrix.T
            right = b2 * right + (1 - b2) * matrix.T @ matrix

            def start(nu):
                return nu, jnp.linalg.eigh(left)[1], jnp.linalg.eigh(right)[1]

            def turn(nu):
                rows, left_basis = orthogonal_iteration(left, bases[0])
                columns, right_basis = orthogonal_iteration(right, bases[1])
                return nu[rows][:, columns], left_basis, right_basis

            due = jnp.where(first, 0, jnp.where(count % interval == 0, 1, 2))
            branches = start, turn, lambda nu: (nu, *bases)
            nu, *bases = jax.lax.switch(due, branches, nu)
            return step, mu, nu, Rotation(left, right, *bases)

        structure = jax.tree.structure(grads)
        leaves = structure.flatten_up_to(state.rotation)
        columns = (jax.tree.leaves(tree) for tree in (grads, state.mu, state.nu))
        results = [one(*row) for row in zip(*columns, leaves, strict=True)]
        updates, mu, nu, rotations = (
            jax.tree.unflatten(structure, column)
            for column in zip(*results, strict=True)
        )
        return updates, ScaleBySOAPState(count, mu, nu, rotations)

    return optax.GradientTransformation(init, update)


def as_matrix(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1]) if x.ndim > 1 else x


def rotate(x, rotation: Rotation | None):
    if rotation is None:
        return x
    return rotation.left_basis.T @ x @ rotation.right_basis


def rotate_back(x, rotation: Rotation | None):
    if rotation is None:
        return x
    return rotation.left_basis @ x @ rotation.right_basis.T


def orthogonal_iteration(matrix, basis):
    """The order of the estimated eigenvalues, largest first, and the next basis."""
    order = jnp.argsort(-jnp.sum(basis * (matrix @ basis), axis=0))
    return order, jnp.linalg.qr(matrix @ basis[:, order])[0]


def with_random_directions(tx: optax.GradientTransformation, key: jax.Array):
    """Mini-BMA from random weights; with b3 almost 1 they stay."""

    def init(params):
        state = tx.init(params)
        leaves, structure = jax.tree.flatten(state.direction)
        keys = jax.random.split(key, len(leaves))
        random = [
            jax.random.normal(key, leaf.shape, leaf.dtype)
            for key, leaf in zip(keys, leaves, strict=True)
        ]
        return state._replace(direction=jax.tree.unflatten(structure, random))

    return optax.GradientTransformation(init, tx.update)
