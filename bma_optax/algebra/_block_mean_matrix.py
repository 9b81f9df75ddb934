"""The block mean matrix Λ̄ + B̄ of Lu et al. 2018: eq. 2, 3, 4 and figure 1.

The class keeps Λ, shape (..., L), and M = Λ + S^½ B S^½, shape (..., L, L), because
they give every function of the d x d matrix:

    f(Λ̄ + B̄) = f(Λ)‾ + E (f(M) - f(Λ)) Eᵀ

with E the d x L matrix of normalised block indicators. f(x) = 1/x gives eq. 3 and
f(x) = x^-½ gives eq. 4. Sizes of blocks are static: shapes are known at trace time.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _xla
from bma_optax.algebra._expansions import (
    block_sums,
    check_sizes,
    diagonal_matrix,
    expand,
    floating,
    root_outer,
    unit_weights,
)
from bma_optax.algebra._functions import Functions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockMeanMatrix(Functions):
    r"""A symmetric d x d matrix Λ̄ + B̄, kept as two small ones: the pair (Λ, M).

    A partition cuts d indices into L blocks of sizes s. Let S = diag(s), and let E be
    the d x L matrix whose column i is 1/√s_i on block i and 0 elsewhere; other weights,
    normalised in each block, may stand in the place of 1/√s_i. The matrix is

    .. math:: \bar\Lambda + \bar B = \bar\Lambda (I - E E^T) + E M E^T,
              \qquad M = \Lambda + S^{1/2} B S^{1/2}.

    On vectors that sum to zero inside each block (Eᵀ x = 0) it multiplies block i by
    Λ_i; on block means it acts as the small matrix M. Therefore any function of the
    matrix is a function of the pair:
    :math:`f(\bar\Lambda + \bar B) = \overline{f(\Lambda)} + E (f(M) - f(\Lambda)) E^T`.
    Only :meth:`to_dense` builds a d x d array.

    The class is a pytree with the leaves ``Lambda`` and ``M``; ``sizes`` is static.
    Leading axes of the leaves are a batch, and ``sizes`` may be nested to match them.
    :meth:`matvec` and :meth:`eigenvalues` take one matrix: use ``jax.vmap`` for a
    batch. Derivatives of every order are finite, also where eigenvalues repeat.

    Args:
      Lambda: the diagonal of Λ, floating, shape (..., L). The entry of a block of one
        element is not used.
      M: the small matrix M, floating and symmetric, shape (..., L, L).
      sizes: L positive integers, the number of elements of each block.

    Raises:
      ValueError: if the shapes do not agree or a size is not a positive integer.

    Example:
      >>> import jax.numpy as jnp
      >>> import bma_optax as bma
      >>> dense = jnp.diag(jnp.array([1.0, 2.0, 3.0, 4.0])) + 1
      >>> matrix = bma.BlockMeanMatrix.project(dense, (4,))
      >>> print(matrix.to_dense()[0], matrix.inverse().trace())
      [3.5 1.  1.  1. ] 1.3538462

    Source: Lu, Harandi, Hartley and Pascanu, `Block Mean Approximation for Efficient
    Second Order Optimization <https://arxiv.org/abs/1804.05484>`_, 2018, eq. 2 to 4
    and figure 1.
    """

    def __post_init__(self):
        # JAX's transformations build this class with leaves that are no arrays.
        if not (hasattr(self.Lambda, "shape") and hasattr(self.M, "shape")):
            return
        if np.any(np.asarray(self.sizes) < 1):
            raise ValueError(f"`sizes` must be positive integers, got {self.sizes}.")
        blocks = np.shape(self.sizes)[-1]
        if self.M.shape[-2:] != (blocks, blocks) or self.Lambda.shape[-1:] != (blocks,):
            raise ValueError(
                f"`Lambda` and `M` must end in the shapes ({blocks},) and ({blocks}, "
                f"{blocks}) for {blocks} block sizes, got {self.Lambda.shape} and "
                f"{self.M.shape}."
            )

    @classmethod
    def project(
        cls,
        dense: jax.Array,
        sizes: Sequence[int],
        weights: jax.Array | None = None,
    ) -> "BlockMeanMatrix":
        r"""Projects a symmetric matrix G to its nearest block mean matrix, eq. 2.

        .. math:: \arg\min_{B, \Lambda} \| G - (\bar\Lambda + \bar B) \|_F^2

        The minimum is M = Eᵀ G E and Λ_i = (tr G_ii - M_ii) / (s_i - 1); a block of one
        element has Λ_i = G_ii. A positive semi-definite G has a positive semi-definite
        projection.

        Args:
          dense: G, symmetric, floating, shape (d, d).
          sizes: L positive integers that sum to d.
          weights: shape (d,), the entries of E before each block is normalised, not all
            zero in any block; None takes the same weight everywhere. The result does
            not hold the weights: pass them again to :meth:`matvec` and
            :meth:`to_dense`.

        Returns:
          A :class:`BlockMeanMatrix` of the dtype of ``dense``.

        Raises:
          ValueError: if ``sizes`` are not positive integers that sum to d, or
            ``weights`` do not have shape (d,).

        Example:
          >>> dense = jnp.diag(jnp.array([1.0, 2.0, 3.0, 4.0, 7.0])) + 1
          >>> matrix = BlockMeanMatrix.project(dense, (4, 1))
          >>> print(matrix.Lambda, matrix.B)
          [2.5 8. ] [[1. 1.]
           [1. 0.]]
        """
        sizes = check_sizes(sizes)
        dense = floating(dense)
        d = sum(sizes)
        if dense.shape != (d, d):
            raise ValueError(
                f"`dense` must have shape ({d}, {d}), the sum of `sizes`, got "
                f"{dense.shape}."
            )
        s = np.asarray(sizes)
        w = None if weights is None else unit_weights(weights, sizes, dense.dtype)
        weighted = dense if w is None else dense * jnp.outer(w, w)
        totals = block_sums(block_sums(weighted, s).T, s)
        M = totals / root_outer(sizes, totals) if w is None else totals
        traces = block_sums(jnp.diagonal(dense), s)
        rest = (traces - jnp.diagonal(M)) / np.maximum(s - 1, 1).astype(dense.dtype)
        return cls(jnp.where(s == 1, traces, rest), M, sizes)

    @classmethod
    def from_expansions(
        cls, Lambda: jax.Array, B: jax.Array, sizes: Sequence[int]
    ) -> "BlockMeanMatrix":
        r"""Builds Λ̄ + B̄ from the pair (Λ, B) of figure 1.

        Args:
          Lambda: the diagonal of Λ, shape (..., L), floating.
          B: symmetric, shape (..., L, L), floating.
          sizes: L positive integers.

        Returns:
          The :class:`BlockMeanMatrix` with M = Λ + S^½ B S^½.

        Raises:
          ValueError: if the shapes do not agree or a size is not a positive integer.

        Example:
          >>> matrix = BlockMeanMatrix.from_expansions(
          ...     jnp.array([2.0]), jnp.array([[1.0]]), (4,))
          >>> print(matrix.M)
          [[6.]]
        """
        sizes = check_sizes(sizes)
        Lambda, B = floating(Lambda), floating(B)
        M = diagonal_matrix(Lambda) + B * root_outer(sizes, B)
        return cls(Lambda, M, sizes)

    @property
    def B(self) -> jax.Array:
        """Figure 1's B = S^-½ (M - Λ) S^-½, shape (..., L, L)."""
        return self.correction / root_outer(self.sizes, self.M)

    @property
    def correction(self) -> jax.Array:
        """M - Λ, shape (..., L, L): the full matrix is Λ̄ + E (M - Λ) Eᵀ."""
        return self.M - diagonal_matrix(self.Lambda)

    def to_dense(self, weights: jax.Array | None = None) -> jax.Array:
        """Builds the d x d matrix by figure 1's expansions, for tests and pictures.

        Args:
          weights: the weights that :meth:`project` took, shape (d,), or None.

        Returns:
          Shape (..., d, d).

        Example:
          >>> pair = jnp.array([1.0, 2.0]), jnp.array([[0.0, 3.0], [3.0, 1.0]])
          >>> print(BlockMeanMatrix.from_expansions(*pair, (1, 4)).to_dense())
          [[1. 3. 3. 3. 3.]
           [3. 3. 1. 1. 1.]
           [3. 1. 3. 1. 1.]
           [3. 1. 1. 3. 1.]
           [3. 1. 1. 1. 3.]]
        """
        small = self.B if weights is None else self.correction
        full = expand(expand(small, self.sizes), self.sizes, axis=-2)
        if weights is not None:
            w = unit_weights(weights, self.sizes, self.M.dtype)
            full = full * jnp.broadcast_to(jnp.outer(w, w), full.shape)
        return full + diagonal_matrix(expand(self.Lambda, self.sizes))

    def matvec(self, x: jax.Array, weights: jax.Array | None = None) -> jax.Array:
        """Multiplies a vector: (Λ̄ + B̄) x = Λ̄ x + E (M - Λ) Eᵀ x, in O(d + L²).

        Args:
          x: shape (d,), the blocks one after the other.
          weights: the weights that :meth:`project` took, shape (d,), or None.

        Returns:
          Shape (d,).

        Raises:
          ValueError: if ``x`` does not have shape (d,), or the matrix is a batch.

        Example:
          >>> matrix = BlockMeanMatrix.from_expansions(
          ...     jnp.array([2.0]), jnp.array([[1.0]]), (4,))
          >>> print(matrix.matvec(jnp.array([1.0, 0.0, 0.0, 0.0])))
          [3. 1. 1. 1.]
        """
        self._check_single()
        if x.shape != (self.shape[0],):
            raise ValueError(f"`x` must have shape ({self.shape[0]},), got {x.shape}.")
        w = unit_weights(weights, self.sizes, self.M.dtype)
        shift = _xla.product(self.correction, block_sums(w * x, np.asarray(self.sizes)))
        return expand(self.Lambda, self.sizes) * x + w * expand(shift, self.sizes)
