"""Entries of G by products with it: block sums and the diagonal."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _flow, _trees

# Products run side by side as long as their vectors hold no more elements than this.
_BATCH_ELEMENTS = 2**22

_IMPLEMENTATION = "threefry2x32"  # The same numbers on every device.


def key_data(key: Any) -> jax.Array:
    """Two numbers of 32 bits from a seed or a key of any kind, for a state to hold.

    Arrays of numbers can be saved, averaged and compared, typed keys cannot.
    """
    if jnp.issubdtype(getattr(key, "dtype", int), jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    elif getattr(key, "shape", ()) == ():
        return jax.random.key_data(jax.random.key(key, impl=_IMPLEMENTATION))
    # A key of the user's stays with the user: other numbers are drawn here.
    if key.shape == (2,):
        ours = jax.random.fold_in(typed_key(key), 0)
    else:
        ours = jax.random.key(0, impl=_IMPLEMENTATION)
        for word in key:
            ours = jax.random.fold_in(ours, word)
    return jax.random.key_data(ours)


def typed_key(data: jax.Array) -> jax.Array:
    """The random key that a state holds as numbers."""
    return jax.random.wrap_key_data(data, impl=_IMPLEMENTATION)


def typed(product, params):
    """``product`` with results on the mesh as the parameters are."""
    return lambda v: jax.tree.map(_trees.typed_like, product(v), params)


def block_products(product, blocks, params, positions):
    """1ᵀ G 1 for the indicators 1 of the blocks at these positions."""

    def row(i):
        indicator = (jnp.arange(blocks.num_blocks) == i).astype(jnp.float32)
        tangent = typed_vector(blocks.expand(indicator, params), params)
        return blocks.block_sums(product(tangent))[positions]

    full = _map(row, (jnp.asarray(positions),), params)
    return (full + full.T) / 2


def by_units(product, params, active):
    """e_iᵀ G e_i for every i in the active arrays, 0 in others."""
    leaves, treedef = jax.tree.flatten(params)

    def entry(number, position):
        units = [
            ((_positions(leaf) == position) & (number == k)).astype(leaf.dtype)
            for k, leaf in enumerate(leaves)
        ]
        unit = typed_vector(jax.tree.unflatten(treedef, units), params)
        return _trees.vdot(unit, product(unit))

    sizes = [leaf.size if on else 0 for leaf, on in zip(leaves, active, strict=True)]
    numbers = np.repeat(np.arange(len(leaves), dtype=np.int32), sizes)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in (0, *sizes)])
    entries = _map(entry, (jnp.asarray(numbers), jnp.asarray(positions)), params)
    parts = [
        x.astype(_trees.statistic_dtype(leaf)).reshape(leaf.shape)
        if on
        else _trees.zeros_like(leaf, _trees.statistic_dtype)
        for x, leaf, on in zip(_split(entries, sizes), leaves, active, strict=True)
    ]
    return typed_vector(jax.tree.unflatten(treedef, parts), params)


def by_signs(product, params, active, key, num_probes):
    """max(|mean|, standard error) of x ∘ G x over random signs x in active arrays."""
    zeros = _trees.zeros_like(params, _trees.statistic_dtype)

    def sample(key):
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        signs = [
            jax.random.rademacher(k, leaf.shape, leaf.dtype)
            if on
            else _trees.zeros_like(leaf)
            for k, leaf, on in zip(keys, leaves, active, strict=True)
        ]
        x = typed_vector(jax.tree.unflatten(treedef, signs), params)
        return jax.tree.map(
            lambda s, x, y: x.astype(s.dtype) * y.astype(s.dtype), zeros, x, product(x)
        )

    def add(sums, key):
        first, second, scale = sums
        y = sample(key)
        # In units of the first sample, or the squares would overflow or vanish.
        scale = jax.tree.map(
            lambda s, y: jnp.where(s == 0, jax.lax.stop_gradient(_largest(y)), s),
            scale,
            y,
        )
        first = jax.tree.map(jnp.add, first, y)
        second = jax.tree.map(
            lambda s, y, c: s + jnp.square(y / jnp.where(c == 0, 1, c)),
            second,
            y,
            scale,
        )
        return (first, second, scale), None

    keys = jax.random.split(key, num_probes)
    start = zeros, zeros, jax.tree.map(_largest, zeros)
    (first, second, scale), _ = _flow.scan(add, start, keys, operands=params)

    def combine(first, second, scale):
        mean = first / num_probes
        square = jnp.square(mean / jnp.where(scale == 0, 1, scale))
        variance = (second / num_probes - square) / (num_probes - 1)
        error = jnp.where(
            variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0
        )
        return jnp.maximum(jnp.abs(mean), scale * error)

    return jax.tree.map(combine, first, second, scale)


def _largest(x):
    return jnp.max(jnp.abs(x), initial=0)


def typed_vector(tree, params):
    """``tree`` typed as a tangent of ``params`` must be."""
    return jax.tree.map(_trees.typed_like, tree, params)


def _map(f, xs, params):
    """``f`` over the first axis in chunks that bound the memory."""
    length = len(xs[0])
    batch = max(1, min(length, _BATCH_ELEMENTS // max(_trees.size(params), 1)))
    return _flow.map(lambda x: f(*x), xs, batch, params)


def _split(x, sizes):
    return jnp.split(x, np.cumsum(sizes)[:-1])


def _positions(leaf):
    """The flat position of each element, without a reshape of a sharded array."""
    positions = jnp.zeros(leaf.shape, jnp.int32)
    for axis, n in enumerate(leaf.shape):
        iota = jax.lax.broadcasted_iota(jnp.int32, leaf.shape, axis)
        positions = positions * n + iota
    return positions
