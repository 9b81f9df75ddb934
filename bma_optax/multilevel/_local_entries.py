"""Block sums and diagonal of a curvature with a declared reach, from few products.

N = 1ᵀ G 1, for the indicators 1 of blocks, takes a number of products that does not
depend on the size of the arrays, and so does diag G. There are two ways:

- Probes on elements give both. They take (2 reach + 1)^dim products.
- Probes on blocks give N. They take 2^dim products if the reach is at most half a
  block. Probes on elements that may have common neighbours give the diagonal, for
  (reach + 1)^dim products, and as many more to check it.

The way with fewer products is taken. A product with random numbers checks the reach: it
must be what the other products foretell. For f fields there are f times as many.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _control_flow, _tree
from bma_optax.curvature import _probing
from bma_optax.curvature._probing import LinearOperator
from bma_optax.multilevel import _color_probing, _color_vectors
from bma_optax.multilevel._stencil import Stencil
from bma_optax.partitions import _coloring
from bma_optax.partitions._systems import GridFields


class Check(NamedTuple):
    """How far a product is from what the declared reach foretells, relative."""

    error: jax.Array  # shape (): infinite if the product is not finite.
    tolerance: jax.Array  # shape (): the error that rounding explains.


class Entries(NamedTuple):
    """Entries of G, or sums of them, and what their check shows."""

    N: jax.Array | None  # a stencil.
    diagonal: list[jax.Array]  # one like each array, or none.
    check: Check
    rounding: jax.Array  # shape (): the rounding error of products, relative.
    products: jax.Array  # shape (), int32.


def gather(
    G: LinearOperator, fields: GridFields, stencil: Stencil, key, *, diagonal: bool
) -> Entries:
    """N and, if asked for, the diagonal of G on the arrays of a grid.

    Args:
      G: the curvature.
      fields: the arrays.
      stencil: the layout of N.
      key: a random key.
      diagonal: whether to return the diagonal.
    """
    axes, *shared = fields.probes(diagonal=diagonal)
    leaves = [jax.tree.leaves(G.params)[i] for i in fields.positions]
    dtype = _tree.common_statistic_dtype(leaves)
    numbers = _color_vectors.random_numbers(axes, key, dtype)
    measure = functools.partial(_measure, G, fields.positions, stencil, numbers)
    found = measure(axes, diagonal and not shared)
    for axes in shared:
        more = measure(axes, True, found)
        found = more._replace(
            check=worst([found.check, more.check]),
            products=found.products + more.products,
        )
    return found


def _measure(
    G, arrays, stencil, numbers, axes, diagonal, known: Entries | None = None
) -> Entries:
    """Multiplies G by probes with the colors of some axes, and checks the results.

    If the check fails, more products follow: first those that measure the rounding of
    the user's function, unless it is known, and then those with the colors of a
    periodic grid, where these are others.

    Args:
      G, stencil, diagonal: see :func:`gather`.
      arrays: the positions of the fields among the leaves of the parameters.
      numbers: random numbers along each axis.
      axes: the axes with their colors. If these are shared, N must be known.
      known: N and its check, if they are known.
    """
    leaves = [jax.tree.leaves(G.params)[i] for i in arrays]
    dtype = _tree.common_statistic_dtype(leaves)
    num_tests = len(leaves) * _coloring.num_tests(axes)

    def respond(axes, diagonal=diagonal):
        vectors = list(map(_color_vectors.color_vectors, axes, numbers))
        found = _color_probing.respond(G, arrays, axes, vectors, diagonal=diagonal)
        N = _as_stencil(found.sums[0]) if known is None else known.N
        return N, found.diagonal, found.sums[-1]

    def test(axes, scale=1.0):
        vectors = list(map(_color_vectors.test_vectors, axes, numbers))
        table = vectors[0].table
        vectors[0] = vectors[0]._replace(table=table.at[:, 0].multiply(scale))
        found = _color_probing.respond(G, arrays, axes, vectors, diagonal=False)
        return found.sums[0] / scale

    N, values, foretold = respond(axes)
    units = _units(N, stencil, axes, foretold)
    spent = jnp.int32(len(leaves) * _coloring.num_products(axes))
    if known is None:
        eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in leaves)
        least = min(_probing.ROUNDINGS * eps, _MOST)

        def tested(carry):
            """Tests what is foretold; the second time, by the first test, rescaled."""
            count, image, error, _ = carry
            first = count == 0
            seen = test(axes, jnp.where(first, 1, _probing.SCALE).astype(dtype))
            expected = jnp.where(first, foretold, image)
            found = _relative_error(seen / units, expected / units)
            image, error = (
                jnp.where(first, *pair) for pair in [(seen, image), (found, error)]
            )
            return count + 1, image, error, found

        def unexplained(carry):
            """Whether there was one test and it has shown an error."""
            count, _, error, _ = carry
            return (count == 1) & ~(error <= least)

        zero = jnp.zeros((), dtype)
        start = jnp.int32(0), jnp.zeros_like(foretold), zero, zero
        _, image, error, rounding = _control_flow.repeat(unexplained, tested, start)
        passes = error <= least
        tolerance = jnp.where(
            passes, least, jnp.clip(_probing.ROUNDINGS * rounding, least, _MOST)
        )
        spent = spent + jnp.where(passes, 0, num_tests).astype(jnp.int32)
    else:
        image = test(axes)
        error = _relative_error(image / units, foretold / units)
        rounding, tolerance = known.rounding, known.check.tolerance
    found = Entries(N, values, Check(error, tolerance), rounding, spent)
    if not any(axis.colors.clash for axis in axes):
        return found

    def again(_):
        more = tuple(dataclasses.replace(axis, around=True) for axis in axes)
        N, values, foretold = respond(more)
        units = _units(N, stencil, axes, foretold)
        seen = image if known is None else test(more)
        error = _relative_error(seen / units, foretold / units)
        count = len(leaves) * _coloring.num_products(more) - (
            num_tests if known is None else 0
        )
        check = Check(error, tolerance)
        return Entries(N, values, check, rounding, spent + jnp.int32(count))

    with jax.named_scope("more_probes"):
        return _control_flow.renewed(~(error <= tolerance), again, found)


def _as_stencil(sums):
    """S[b, a, *offset, *cell] from sums over blocks, (*offsets, a, b, *grid)."""
    dim = (sums.ndim - 2) // 2
    return sums.transpose(dim + 1, dim, *range(dim), *range(dim + 2, sums.ndim))


def _units(N, stencil, axes, sums):
    """The size of sums of a check, ``sums``, if every field had curvature 1.

    In other units, a field of large curvature would hide the errors of the rest.
    Entries along an axis of fields are fields of their own.
    """
    size = jnp.abs(stencil.diagonal(N)[:: stencil.num_columns])  # That of means.
    mean = jnp.mean(
        size,
        axis=[1 + i for i, axis in enumerate(axes) if not axis.fields],
        keepdims=True,
    )
    root = jnp.sqrt(jnp.where(mean == 0, 1, mean))
    dim, counts = len(axes), sums.shape[: len(axes)]
    parts = []
    for offsets in np.ndindex(*counts):
        pairs = zip(offsets, axes, strict=True)
        shift = [-offset if axis.fields else 0 for offset, axis in pairs]
        source = jnp.roll(root, shift, axis=range(1, 1 + dim))
        parts.append(source[:, None] * root[None])
    shape = (*counts, len(root), *root.shape)
    return jnp.broadcast_to(jnp.stack(parts).reshape(shape), sums.shape)


def worst(checks):
    """The check whose error is largest relative to its tolerance."""
    error, tolerance = (jnp.stack(x) for x in zip(*checks, strict=True))
    # An infinite error is the largest.
    most = jnp.argmax(error / tolerance)
    return Check(error[most], tolerance[most])


def reaches_far(error, tolerance) -> str:
    return (
        "The curvature reaches further than `reach` declares: a product with it is "
        f"{float(error):.1e} from what that reach foretells, relative, where rounding "
        f"explains {float(tolerance):.1e}. Pass a larger `reach`, or None. Under "
        "jax.jit the diagonal alone is used, and `local` is False."
    )


_MOST = 0.1  # The error of a false reach is larger than this in any dtype.


def _relative_error(x, y):
    """‖x - y‖ over the larger norm: 0 for zeros, infinite if one is not finite.

    x and y are divided by their largest entry first: the squares would overflow or
    vanish.
    """
    largest = jnp.maximum(jnp.max(jnp.abs(x)), jnp.max(jnp.abs(y)))
    usable = largest >= float(jnp.finfo(x.dtype).tiny)
    scale = jnp.where(usable, largest, 1)
    difference, *squares = (
        jnp.sum(jnp.square(v)) for v in (x / scale - y / scale, x / scale, y / scale)
    )
    error = jnp.sqrt(difference / jnp.where(usable, jnp.maximum(*squares), 1))
    return jnp.where(jnp.isfinite(largest), error, jnp.inf)
