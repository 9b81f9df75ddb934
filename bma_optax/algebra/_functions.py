"""Functions of the block mean matrix, eq. 3 and 4 of Lu et al. 2018, from Λ and M.

Λ is a vector of shape (..., L) and M a symmetric matrix of shape (..., L, L); together
they stand for a d x d matrix with M's eigenvalues, and each Λ_i s_i - 1 times. So

    f(Λ̄ + B̄) = f(Λ)‾ + E (f(M) - f(Λ)) Eᵀ

for any function f of the eigenvalues, at the cost of f(M): O(L³).
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax.algebra import _eigh, _symmetric_power


@dataclasses.dataclass(frozen=True, eq=False)
class Functions:
    """The numbers that define a :class:`BlockMeanMatrix`, and its functions."""

    Lambda: jax.Array
    M: jax.Array
    sizes: tuple[Any, ...] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (d, d) of the matrix that this object stands for."""
        d = int(np.sum(self.sizes, axis=-1).reshape(-1)[0])
        return (d, d)

    def power(
        self,
        p: float,
        *,
        min_eigenvalue: jax.typing.ArrayLike | None = None,
        absolute: bool = False,
    ) -> Self:
        r"""Raises the matrix to a power: (Λ̄ + B̄)^p = (Λ^p)‾ + E (M^p - Λ^p) Eᵀ.

        Args:
          p: a Python number. A whole number works for any symmetric matrix (any
            invertible one if p < 0). Another number needs a positive definite matrix or
            ``min_eigenvalue``.
          min_eigenvalue: a floor: smaller eigenvalues of M and entries of Λ are raised
            to it. Eigenvalues of M are also raised to 4 √L eps times the largest, the
            least that their dtype resolves. Derivatives treat both floors as constants.
          absolute: if True, the absolute values of the eigenvalues take their place, so
            that an indefinite matrix has a positive definite power.

        Returns:
          A :class:`BlockMeanMatrix` with the same sizes.

        Raises:
          TypeError: if ``p`` is not a Python number.

        Example:
          >>> import bma_optax as bma
          >>> matrix = bma.BlockMeanMatrix.project(4 * jnp.eye(3), (2, 1))
          >>> print(matrix.power(0.5).to_dense())
          [[2. 0. 0.]
           [0. 2. 0.]
           [0. 0. 2.]]
        """
        if not isinstance(p, (int, float)):
            raise TypeError(f"`p` must be a Python number, got {type(p).__name__}.")
        # Λ acts on no direction of a block of one element: keep f finite there.
        Lambda = jnp.abs(self.Lambda) if absolute else self.Lambda
        irrelevant = (self._sizes == 1) & ~(Lambda > 0)
        Lambda = jnp.where(irrelevant, 1, Lambda)
        if min_eigenvalue is None and not absolute and float(p).is_integer():
            return self._replace(Lambda**p, jnp.linalg.matrix_power(self.M, int(p)))
        if min_eigenvalue is None:
            floor, relative_floor = jnp.zeros((), self.M.dtype), 0.0
        else:
            floor = jnp.asarray(min_eigenvalue).astype(self.M.dtype)
            relative_floor = _symmetric_power.resolution(self.M.shape[-1], self.M.dtype)
            Lambda = jnp.maximum(Lambda, floor)
        M = _symmetric_power.matrix_power(self.M, p, floor, relative_floor, absolute)
        return self._replace(Lambda**p, M)

    def inverse(self) -> Self:
        """Returns (Λ̄ + B̄)^-1, eq. 3, for O(L³): one inverse of M.

        Example:
          >>> import bma_optax as bma
          >>> matrix = bma.BlockMeanMatrix.project(4 * jnp.eye(3), (2, 1))
          >>> print(matrix.inverse().trace())
          0.75
        """
        return self.power(-1)

    def inverse_sqrt(
        self, *, min_eigenvalue: jax.typing.ArrayLike | None = None
    ) -> Self:
        """Returns (Λ̄ + B̄)^-½, eq. 4, for O(L³): one ``eigh`` of M.

        Args:
          min_eigenvalue: a floor for the eigenvalues, see :meth:`power`.

        Example:
          >>> import bma_optax as bma
          >>> matrix = bma.BlockMeanMatrix.project(4 * jnp.eye(3), (2, 1))
          >>> print(matrix.inverse_sqrt().trace())
          1.5
        """
        return self.power(-0.5, min_eigenvalue=min_eigenvalue)

    def eigenvalues(self) -> jax.Array:
        """Returns all d eigenvalues, ascending: M's own, and each Λ_i s_i - 1 times.

        Where an eigenvalue repeats, it has no second derivative. Symmetric functions of
        the eigenvalues do, see :meth:`logdet` and :meth:`power`.

        Returns:
          Shape (d,).

        Raises:
          ValueError: if the matrix is a batch.

        Example:
          >>> import bma_optax as bma
          >>> matrix = bma.BlockMeanMatrix.from_expansions(
          ...     jnp.array([2.0]), jnp.array([[1.0]]), (4,))
          >>> print(matrix.eigenvalues())
          [2. 2. 2. 6.]
        """
        self._check_single()
        values = jnp.concatenate([_eigh.eigenvalues(self.M), self.Lambda])
        counts = np.concatenate([np.ones_like(self.sizes), np.subtract(self.sizes, 1)])
        order = jnp.argsort(values)
        return jnp.repeat(
            values[order],
            jnp.asarray(counts)[order],
            total_repeat_length=self.shape[0],
        )

    def logdet(self) -> jax.Array:
        """Returns Σ (s_i - 1) log Λ_i + log det M, NaN if det M or a Λ_i is negative.

        Example:
          >>> import bma_optax as bma
          >>> print(bma.BlockMeanMatrix.project(jnp.eye(3), (2, 1)).logdet())
          0.0
        """
        inner = self._sizes > 1
        logs = jnp.log(jnp.where(inner, self.Lambda, 1))
        sign, log_abs = jnp.linalg.slogdet(self.M)
        small = jnp.where(sign < 0, jnp.nan, log_abs)
        return jnp.sum((self._sizes - 1) * logs, axis=-1) + small

    def trace(self) -> jax.Array:
        """Returns the trace Σ (s_i - 1) Λ_i + tr M.

        Example:
          >>> import bma_optax as bma
          >>> print(bma.BlockMeanMatrix.project(jnp.eye(3), (2, 1)).trace())
          3.0
        """
        inner = jnp.sum((self._sizes - 1) * self.Lambda, axis=-1)
        return inner + jnp.trace(self.M, axis1=-2, axis2=-1)

    @property
    def _sizes(self) -> np.ndarray:
        sizes = np.asarray(self.sizes).astype(self.M.dtype)
        return np.broadcast_to(sizes, self.Lambda.shape)

    def _check_single(self) -> None:
        if self.M.ndim != 2:
            raise ValueError(
                f"`M` must have two axes here, got {self.M.shape}. Use jax.vmap over a "
                "batch of matrices."
            )

    def _replace(self, Lambda, M) -> Self:
        return dataclasses.replace(self, Lambda=Lambda, M=M)
