"""Probing: entries of G from products with chosen vectors.

Vectors v and products G v are trees like params, of d elements in all. With 1_i the
indicator of block i, the sum of G over blocks i and j is 1_iᵀ G 1_j. The diagonal of G
is e_iᵀ G e_i with unit vectors e_i, exactly and for d products, or the mean of x ∘ G x
over random signs x (Hutchinson; Bekas, Kokiopoulou and Saad 2007). ``active``, a flag
for each array, says where the diagonal is wanted; it is 0 elsewhere. Results come with
the number of products that they took, as :class:`Probed`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _control_flow, _random, _sharding, _tree

# Products run side by side while their vectors hold at most this many elements in all.
_BATCH_ELEMENTS = 2**22

_IMPLEMENTATION = "threefry2x32"  # It gives the same numbers on every device.


def key_data(key: Any) -> jax.Array:
    """Returns the numbers of a key, uint32 of shape (2,), from a seed or any key.

    A state holds numbers because they can be saved, averaged and compared; typed keys
    cannot.
    """
    if jnp.issubdtype(getattr(key, "dtype", int), jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    elif getattr(key, "shape", ()) == ():
        return jax.random.key_data(jax.random.key(key, impl=_IMPLEMENTATION))
    # Fold the user's key, so that the user and the library draw different numbers.
    if key.shape == (2,):
        ours = jax.random.fold_in(typed_key(key), 0)
    else:
        ours = jax.random.key(0, impl=_IMPLEMENTATION)
        for word in key:
            ours = jax.random.fold_in(ours, word)
    return jax.random.key_data(ours)


def typed_key(data: jax.Array) -> jax.Array:
    """Returns the typed random key of the numbers, shape (2,), that a state holds."""
    # The cast is for an average of states, whose numbers have another dtype.
    return jax.random.wrap_key_data(data.astype(jnp.uint32), impl=_IMPLEMENTATION)


class LinearOperator(NamedTuple):
    """The matrix G at given parameters, known by its products."""

    product: Callable[[Any], Any]  # v -> G v on trees like params.
    params: Any

    def __call__(self, v):
        """Returns G v; v and G v are trees like ``params``, sharded as they are."""
        y = self.product(jax.tree.map(_sharding.typed_like, v, self.params))
        return jax.tree.map(_sharding.typed_like, y, self.params)


class Probed(NamedTuple):
    """A quantity that was found by products with G, and their number."""

    value: Any
    products: jax.Array  # shape (), int32.


def by_units(G: LinearOperator, active) -> Probed:
    """Returns e_iᵀ G e_i for every entry i of the active arrays, a tree like params."""
    params = G.params
    leaves, treedef = jax.tree.flatten(params)

    def entry(number, position):
        units = [
            ((_positions(leaf) == position) & (number == k)).astype(leaf.dtype)
            for k, leaf in enumerate(leaves)
        ]
        unit = jax.tree.map(
            _sharding.typed_like, jax.tree.unflatten(treedef, units), params
        )
        return _tree.vdot(unit, G(unit))

    sizes = [leaf.size if on else 0 for leaf, on in zip(leaves, active, strict=True)]
    numbers = np.repeat(np.arange(len(leaves), dtype=np.int32), sizes)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in (0, *sizes)])
    entries = batched(entry, (jnp.asarray(numbers), jnp.asarray(positions)), params)
    parts = [
        x.astype(_tree.statistic_dtype(leaf)).reshape(leaf.shape)
        if on
        else _tree.zeros_like(leaf, _tree.statistic_dtype)
        for x, leaf, on in zip(_split(entries, sizes), leaves, active, strict=True)
    ]
    diagonal = jax.tree.unflatten(treedef, parts)
    diagonal = jax.tree.map(_sharding.typed_like, diagonal, params)
    return Probed(diagonal, jnp.int32(sum(sizes)))


def by_signs(G: LinearOperator, active, key, num_probes) -> Probed:
    """Returns max(|mean|, standard error) of x ∘ G x over random signs x, like params.

    The error of an entry comes from the other entries of its row, also from those of
    other arrays, and an array of large curvature would drown the rest. Therefore x is
    scaled in each array by a unit, c^-½ for a mean curvature c. Where several arrays
    are active, the first ``_FOR_UNITS`` samples find the units and are then left out.
    """
    params = G.params
    zeros = _tree.zeros_like(params, _tree.statistic_dtype)
    several = sum(active) > 1 and num_probes >= 2 * _FOR_UNITS
    left_out = _FOR_UNITS if several else 0

    def sample(key, size):
        """Returns x ∘ G x / unit, like params, from the mean size of each array, ()."""
        signs = random_signs(params, key, active)
        unit = jax.tree.map(
            power_of_2 if several else lambda c, p: jnp.ones_like(c), size, params
        )
        x = jax.tree.map(lambda x, u: x * u.astype(x.dtype), signs, unit)
        y = G(x)
        return jax.tree.map(
            lambda z, x, y, u: x.astype(z.dtype) * y.astype(z.dtype) / u,
            zeros,
            signs,
            y,
            unit,
        )

    def add(carry, number):
        """Adds a sample to the sums of values and of their squares over size²."""
        first, second, size = carry
        y = sample(_random.fold(key, number), size)
        found = jax.tree.map(lambda y: or_one(jnp.mean(jnp.abs(y))), y)
        size = jax.tree.map(
            lambda new, old: jnp.where(
                number <= left_out, jax.lax.stop_gradient(new), old
            ),
            found,
            size,
        )
        used = number >= left_out
        first = jax.tree.map(lambda s, y: s + jnp.where(used, y, 0), first, y)
        # Divide by the size first, or the squares would overflow or vanish.
        second = jax.tree.map(
            lambda s, y, c: s + jnp.where(used, jnp.square(y / c), 0), second, y, size
        )
        return (first, second, size), None

    ones = jax.tree.map(lambda z: or_one(jnp.sum(z)), zeros)
    numbers = jnp.arange(num_probes, dtype=jnp.int32)
    (first, second, size), _ = _control_flow.scan(
        add, (zeros, zeros, ones), numbers, operands=params
    )
    n = num_probes - left_out

    def combine(first, second, size):
        mean = first / n
        variance = (second / n - jnp.square(mean / size)) / (n - 1)
        error = jnp.where(
            variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0
        )
        return jnp.maximum(jnp.abs(mean), size * error)

    diagonal = jax.tree.map(combine, first, second, size)
    return Probed(diagonal, jnp.int32(num_probes))


# The number of samples that find the units. Each takes the square root of the factor by
# which a unit is wrong.
_FOR_UNITS = 6

# A product with a multiple of a vector differs from that multiple of its product by
# rounding, in whatever dtype the user's function computes. Not a power of 2, so that it
# changes how numbers are rounded.
SCALE = 1.3
ROUNDINGS = 16  # Errors that rounding explains: products are off by one or two.


def power_of_2(size, leaf):
    """Returns the power of 2 near 1/√size, in the range of the leaf's dtype.

    Multiplying by a power of 2 rounds nothing.
    """
    most = min(30, int(jnp.finfo(leaf.dtype).maxexp) // 2)
    exponent = jnp.round(-jnp.log2(size) / 2)
    return jnp.exp2(jnp.clip(exponent, -most, most))


def or_one(x):
    return jnp.where(x > 0, x, 1)


def batched(f, xs, params):
    """Maps ``f`` over the first axis of the arrays ``xs``, in chunks.

    A chunk's vectors like ``params`` hold at most ``_BATCH_ELEMENTS`` elements.
    """
    length = len(xs[0])
    batch = max(1, min(length, _BATCH_ELEMENTS // max(_tree.size(params), 1)))
    return _control_flow.map(lambda x: f(*x), xs, batch, params)


def _split(x, sizes):
    return jnp.split(x, np.cumsum(sizes)[:-1])


def random_signs(params, key, active):
    """Returns ±1 in the active arrays and 0 in the others, a tree like ``params``."""
    leaves, treedef = jax.tree.flatten(params)
    signs = [
        _random.signs(_random.fold(key, i), _positions(leaf), leaf.dtype)
        if on
        else _tree.zeros_like(leaf)
        for i, (leaf, on) in enumerate(zip(leaves, active, strict=True))
    ]
    return jax.tree.unflatten(treedef, signs)


def _positions(leaf):
    """Returns each element's flat position, int32 in the shape of ``leaf``.

    It reshapes nothing, because JAX refuses to reshape a sharded axis.
    """
    positions = jnp.zeros(leaf.shape, jnp.int32)
    for axis, n in enumerate(leaf.shape):
        iota = jax.lax.broadcasted_iota(jnp.int32, leaf.shape, axis)
        positions = positions * n + iota
    return positions
