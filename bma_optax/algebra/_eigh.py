"""Eigenvalues and eigenvectors of small symmetric matrices (..., L, L)."""

import jax
import jax.numpy as jnp

_MOST_JACOBI = 256  # Up to so many rows JAX takes Jacobi's method on TPU itself.


def eigenvalues(matrix: jax.Array) -> jax.Array:
    """The eigenvalues of symmetric matrices, shape (..., L), in ascending order.

    Args:
      matrix: shape (..., L, L). A matrix of one number needs no ``eigh``.
    """
    if matrix.shape[-1] == 1:
        return matrix[..., 0]
    return _for_platform(matrix, jnp.linalg.eigvalsh, lambda values, _: values)


def eigh(matrix):
    """Eigenvalues, shape (..., L), and eigenvectors, shape (..., L, L)."""
    if matrix.shape[-1] == 1:
        return eigenvalues(matrix), jnp.ones_like(matrix)
    return _for_platform(
        matrix,
        lambda x: tuple(jnp.linalg.eigh(x, symmetrize_input=False)),
        lambda values, vectors: (values, vectors),
    )


def _for_platform(matrix, f, of_both):
    """``f(matrix)``, on TPU ``of_both`` of the results of Jacobi's method.

    For more rows JAX has another one there, which takes minutes to compile.
    """

    def jacobi(matrix):
        method = jax.lax.linalg.EighImplementation.JACOBI
        vectors, values = jax.lax.linalg.eigh(
            matrix, symmetrize_input=False, implementation=method
        )
        return of_both(values, vectors)

    if matrix.shape[-1] <= _MOST_JACOBI:
        return f(matrix)
    return jax.lax.platform_dependent(matrix, tpu=jacobi, default=f)
