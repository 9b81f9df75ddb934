"""Groups of blocks that all see each other: N and K are dense matrices.

    M = N / (n nᵀ),   K = (M^-1 - Λ^-1) / (n nᵀ)

with n_i² the sum of z² over block i. For each bucket of c groups of n blocks, N, M and
K have shape (c, n, n). One product with G for each block gives all of N, and the
absolute eigenvalues of M give its inverse.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _control_flow, _random, _sharding, _tree, _xla
from bma_optax.algebra import _eigh, _symmetric_power
from bma_optax.algebra._expansions import diagonal_matrix
from bma_optax.curvature import _probing
from bma_optax.curvature._probing import LinearOperator, Probed
from bma_optax.multilevel import _coarse_system
from bma_optax.multilevel._coarse_system import Inverted, Measured
from bma_optax.partitions._blocks import Partition, pieces

_COMBINATIONS = 4  # Products that measure the rounding of M.


@dataclasses.dataclass(frozen=True)
class Dense:
    """All groups of blocks that have a dense matrix; static."""

    blocks: Partition  # without grids.

    @property
    def sizes(self) -> np.ndarray:
        """The number of elements of each block, shape (L_dense,)."""
        return np.asarray(self.blocks.sizes)

    def like(self, dtype) -> tuple[Any, Any, Any]:
        """The shapes of N and of K, for each bucket, and that of Λ."""
        matrices = tuple(
            jax.ShapeDtypeStruct((count, n, n), dtype)
            for count, n in self.blocks.buckets
        )
        return matrices, matrices, jax.ShapeDtypeStruct(self.sizes.shape, dtype)

    def initial(self, zeros) -> tuple[Any, Any, Any]:
        """N = 0, K = 0 and Λ = 1, from zeros like numbers of blocks."""
        N, K, Lambda = jax.tree.map(
            lambda x: jnp.sum(zeros) + jnp.zeros(x.shape, x.dtype),
            self.like(zeros.dtype),
        )
        return N, K, Lambda + 1

    def shardings(self, leaves) -> tuple[Any, Any, Any]:
        """The shardings of N, K and Λ over explicit axes: all are on all devices."""
        return _sharding.replicated(self.like(jnp.float32), leaves)

    def replicate(self, K) -> Any:
        """K on all devices."""
        return jax.tree.map(_sharding.replicate, K)

    def sums(self, leaves) -> jax.Array:
        """Sums over the elements of each block, shape (L_dense,)."""
        return self.blocks.block_sums(leaves)

    def fill(self, values, leaves) -> dict[int, jax.Array]:
        """The arrays with blocks, by their positions: each block has its value."""
        filled = zip(
            self.blocks.arrays, self.blocks.expand(values, leaves), strict=True
        )
        return {i: x for i, (array, x) in enumerate(filled) if array.num_blocks}

    # There are no slopes: a block has a single column, its indicator.
    restrict = metric = sums
    prolong = fill

    @property
    def has_diagonal(self) -> bool:
        """Whether each element is a block: N is G and has the diagonal."""
        return all(
            array.num_blocks == math.prod(array.shape) and array.owner == array.path
            for array in self.blocks.arrays
        )

    def measure(self, G: LinearOperator, key, diagonal: bool, n2=None) -> Measured:
        """Gathers N by one product with the indicator of each block.

        Given n², it makes the products of :meth:`rounding` side by side with these: the
        product is a long program, which is compiled once then.
        """
        count = self.blocks.num_blocks
        indicators = jnp.eye(count, dtype=_tree.common_statistic_dtype(G.params))
        combinations = indicators[:0] if n2 is None else _combinations(n2, key)
        images = self._images(G, jnp.concatenate([indicators, combinations]))
        full = (images[:count] + images[:count].T) / 2
        N, row = [], 0
        for groups, n in self.blocks.buckets:
            square = full[row : row + groups * n, row : row + groups * n]
            square = square.reshape(groups, n, groups, n)
            N.append(jnp.einsum("gigj->gij", square))
            row += groups * n
        values: dict[int, jax.Array] = {}
        if diagonal and self.has_diagonal:
            parts = [jnp.diagonal(x, axis1=1, axis2=2).reshape(-1) for x in N]
            zeros = _tree.zeros_like(G.params, _tree.statistic_dtype)
            values = self.fill(jnp.concatenate(parts), jax.tree.leaves(zeros))
        evidence = full, combinations, images[count:]
        return Measured(tuple(N), values, None, evidence, jnp.int32(len(images)))

    def _images(self, G, vectors):
        """1ᵀ G 1 times each vector over the blocks, shape (vectors, L_dense)."""

        def image(x):
            return self.blocks.block_sums(G(self.blocks.expand(x, G.params)))

        return _probing.batched(image, (vectors,), G.params)

    def rounding(self, G, found, n2, key) -> Probed:
        """How far rounding moves eigenvalues of M, shape ().

        The product with a random combination of blocks differs from that combination of
        their products by the rounding of the user's function, whatever dtype it
        computes in. The result is the largest of a few differences: a single one can be
        small by chance.
        """
        n = jnp.sqrt(n2)
        (full, t, images), products = found.evidence, 0
        if not len(t):  # `measure` had no n².
            t, products = _combinations(n2, key), _COMBINATIONS
            images = self._images(G, t)
        least = jnp.min(n, initial=jnp.inf)
        errors = (images - _xla.product(t, full)) / (least * n)[None]
        error = 8 * jnp.max(jnp.abs(jax.lax.stop_gradient(errors)), initial=0)
        error = jnp.maximum(error, 4 * float(jnp.finfo(n.dtype).eps))
        return Probed(error, jnp.int32(products))

    @_control_flow.compiled
    def invert(self, N, n2, damping, floor, rounding) -> Inverted:
        """K from the absolute eigenvalues of M + damping I.

        Args:
          N: the matrices of the groups, see :meth:`like`.
          n2: n², shape (L_dense,).
          damping, floor, rounding: numbers of shape ().
        """
        parts = [
            _invert(M, n2, s, damping, floor, rounding)
            for M, n2, s in zip(
                self.small_matrices(N, n2),
                self._split(n2),
                self._split(self.sizes),
                strict=True,
            )
        ]
        return Inverted(
            tuple(part.K for part in parts),
            jnp.concatenate([part.Lambda.reshape(-1) for part in parts]),
            jnp.min(jnp.stack([part.smallest for part in parts])),
            jnp.sum(jnp.stack([part.floored for part in parts]), dtype=jnp.int32),
        )

    @_control_flow.compiled
    def correct(self, N, K, r):
        """K r for block sums r, shape (L_dense,)."""
        del N
        products = [
            jnp.einsum("gij,gj->gi", x, part, precision=jax.lax.Precision.HIGHEST)
            for x, part in zip(K, self._split(r), strict=True)
        ]
        return jnp.concatenate([product.reshape(-1) for product in products])

    def small_matrices(self, N, n2) -> list[jax.Array]:
        """M = N / (n nᵀ) of each bucket, shape (groups, blocks, blocks)."""
        roots = [jnp.sqrt(x) for x in self._split(n2)]
        return [x / _outer(root) for x, root in zip(N, roots, strict=True)]

    def _split(self, values):
        """Splits a vector over the blocks into (groups, blocks) for each bucket."""
        return pieces(values, list(self.blocks.buckets))


def _invert(M, n2, s, damping, floor, rounding) -> Inverted:
    """Inverts one bucket.

    Args:
      M: shape (groups, blocks, blocks).
      n2, s: n² and the sizes of blocks, shape (groups, blocks).
      damping, floor, rounding: numbers of shape ().
    """
    Lambda = _coarse_system.smoother_mean(
        s.astype(n2.dtype), jnp.diagonal(M, axis1=1, axis2=2)
    )
    eye = jnp.broadcast_to(jnp.eye(M.shape[-1], dtype=M.dtype), M.shape)
    relative = _symmetric_power.resolution(M.shape[-1], M.dtype)
    inverse = _symmetric_power.matrix_power(
        M + damping * eye, -1, floor, relative, absolute=True, null=rounding
    )
    smooth = diagonal_matrix(1 / jnp.maximum(Lambda + damping, floor))
    eigenvalues = _eigh.eigenvalues(jax.lax.stop_gradient(M))
    return Inverted(
        (inverse - smooth) / _outer(jnp.sqrt(n2)),
        Lambda,
        *_coarse_system.spectrum(eigenvalues, damping, floor, rounding),
    )


def dense_system(blocks: Partition) -> tuple[Dense, ...]:
    """A tuple with the system of a partition's dense groups, or () if it has none."""
    return (Dense(blocks.dense),) if blocks.buckets else ()


def _combinations(n2, key):
    """Random combinations of blocks, of size 1, shape (combinations, L_dense)."""
    n = jnp.sqrt(n2)
    shape = (_COMBINATIONS, *n.shape)
    positions = jnp.arange(math.prod(shape)).reshape(shape)
    weights = 0.5 + _random.uniform(key, positions, n.dtype)
    return weights * (jnp.min(n, initial=jnp.inf) / n)[None]


def _outer(root):
    """n nᵀ for n of shape (groups, blocks)."""
    return root[:, :, None] * root[:, None, :]
