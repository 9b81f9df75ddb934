"""Small matrices, one for each cell and field, between the columns of a block.

With k columns a block they have the shape (fields k k, *cells), and vectors have the
shape (fields k, *cells). For k = 1 both are numbers of blocks.
"""

import jax.numpy as jnp

# A column is taken for a combination of others if no more than this is left of it.
_ROUNDING = 16


def num_columns(matrices, x) -> int:
    """k, from matrices and vectors like those that they multiply."""
    return len(matrices) // len(x)


def times(matrices, x):
    """The matrix of each cell times x."""
    k = num_columns(matrices, x)
    if k == 1:
        return matrices * x
    cells = x.shape[1:]
    columns, x = matrices.reshape(-1, k, k, *cells), x.reshape(-1, k, *cells)
    terms = [columns[:, :, j] * x[:, j : j + 1] for j in range(k)]
    return sum(terms[1:], terms[0]).reshape(-1, *cells)


def transpose(matrices, k):
    """The transposed matrices."""
    if k == 1:
        return matrices
    parts = matrices.reshape(-1, k, k, *matrices.shape[1:])
    return parts.swapaxes(1, 2).reshape(matrices.shape)


def gram(T, scale):
    """T D² Tᵀ of each cell, for D with the numbers ``scale`` on its diagonal."""
    k, cells = num_columns(T, scale), scale.shape[1:]
    if k == 1:
        return (T * scale) ** 2
    T = T.reshape(-1, k, k, *cells) * scale.reshape(-1, 1, k, *cells)
    terms = [T[:, :, None, j] * T[:, None, :, j] for j in range(k)]
    return sum(terms[1:], terms[0]).reshape(-1, *cells)


def inner(a, b, k):
    """Σ a_ij b_ij of each cell, numbers of blocks."""
    parts = (a * b).reshape(-1, k * k, *a.shape[1:])
    return sum((parts[:, i] for i in range(1, k * k)), parts[:, 0])


def diagonal(matrices, k):
    """The diagonals, vectors."""
    if k == 1:
        return matrices
    return matrices.reshape(-1, k * k, *matrices.shape[1:])[:, :: k + 1].reshape(
        -1, *matrices.shape[1:]
    )


def repeat(x, k):
    """Numbers of blocks, (fields, *cells), for each of k columns."""
    if k == 1:
        return x
    shape = (len(x), k, *x.shape[1:])
    return jnp.broadcast_to(x[:, None], shape).reshape(-1, *x.shape[1:])


def without(matrices, null, k):
    """The matrices with zeros in the rows and columns where the vector ``null`` is."""
    if k == 1:
        return jnp.where(null, 0, matrices)
    null = null.reshape(-1, k, *null.shape[1:])
    either = null[:, :, None] | null[:, None, :]
    return jnp.where(either.reshape(matrices.shape), 0, matrices)


def orthonormal(metric, k):
    """T with Tᵀ W T = I for each matrix W, upper triangular, by Gram and Schmidt.

    A column that is a combination of those before it, up to rounding, becomes 0; the
    first one becomes 1 where W is 0 there.

    Args:
      metric: W, symmetric and positive semi-definite.
      k: the number of columns.
    """
    if k == 1:
        return 1 / jnp.sqrt(jnp.where(metric > 0, metric, 1))
    W = _split(metric, k)
    zero = jnp.zeros_like(W[0][0])
    least = _ROUNDING * float(jnp.finfo(zero.dtype).eps)
    columns: list[list] = []
    for j in range(k):
        column, square = [zero] * k, W[j][j]
        column[j] = jnp.ones_like(zero)
        for i, other in enumerate(columns):
            terms = [other[a] * W[a][j] for a in range(i + 1)]
            along = sum(terms[1:], terms[0])
            square = square - along * along
            column = [x - along * y for x, y in zip(column, other, strict=True)]
        found = square > least * W[j][j]
        root = jnp.sqrt(jnp.where(found, square, 1))
        scale = jnp.where(found, 1 / root, float(j == 0))
        columns.append([scale * x for x in column])
    return _join([list(row) for row in zip(*columns, strict=True)])


def _split(matrices, k):
    """The entries, each of the shape (fields, *cells): a list of rows."""
    parts = matrices.reshape(-1, k, k, *matrices.shape[1:])
    return [[parts[:, i, j] for j in range(k)] for i in range(k)]


def _join(rows):
    """The inverse of :func:`_split`."""
    stacked = jnp.stack([jnp.stack(row, axis=1) for row in rows], axis=1)
    return stacked.reshape(-1, *stacked.shape[3:])
