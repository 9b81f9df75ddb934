"""Powers of small symmetric matrices (..., L, L), with derivatives of every order.

For M = R diag(l) Rᵀ, M^p = R diag(l^p) Rᵀ. The derivative of ``eigh`` is NaN where
eigenvalues are equal, as in the identity, from which every optimiser starts. The power
f(x) = x^p has finite derivatives there. By Daleckii and Krein, the n-th derivative of
f(M) along A_1, ..., A_n is

    R [sum over orders of the A's  f[l_i0, ..., l_in] (RᵀA_1R)_i0,i1 ...] Rᵀ

with divided differences f[...], which are finite where their arguments coincide.
"""

import itertools
import math
import string
from typing import NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

from bma_optax import _xla
from bma_optax.algebra import _eigh


def matrix_power(
    matrix: jax.Array,
    p: float,
    floor: jax.Array,
    relative_floor: float = 0.0,
    absolute: bool = False,
    null: jax.Array | None = None,
) -> jax.Array:
    """Returns R max(l, floor, relative_floor max|l|)^p Rᵀ of a matrix R diag(l) Rᵀ.

    Derivatives treat the floors, and eigenvalues that a floor or ``null`` replaces, as
    constants.

    Args:
      matrix: floating, shape (..., L, L); its symmetric part is used.
      p: a Python number.
      floor: broadcasts to shape (...).
      relative_floor: a Python number.
      absolute: if True, |l| takes the place of l.
      null: broadcasts to shape (...), or None. If given, 1 replaces each eigenvalue
        that is, after ``floor``, at most ``null`` or at most ``relative_floor`` max|l|.

    Returns:
      Shape (..., L, L), the dtype of ``matrix``.
    """
    symmetric = (matrix + jnp.swapaxes(matrix, -1, -2)) / 2
    floors = jnp.stack(
        [
            jnp.broadcast_to(jnp.asarray(x, matrix.dtype), matrix.shape[:-2])
            for x in (floor, 0 if null is None else null)
        ],
        axis=-1,
    )
    return _derivative(
        jax.lax.stop_gradient(floors),
        symmetric,
        p=p,
        relative_floor=relative_floor,
        absolute=absolute,
        has_null=null is not None,
    )


def resolution(size: int, dtype: jax.typing.DTypeLike) -> float:
    """Bounds the error of ``eigh``'s eigenvalues relative to the largest: 4 √L eps.

    The tests check this bound on singular matrices.
    """
    return 4 * math.sqrt(max(size, 1)) * float(jnp.finfo(dtype).eps)


# The derivative is a primitive, because ``jax.custom_jvp`` loses its rule when JAX
# transposes it: the Hessian (forward over reverse) would differentiate ``eigh`` again.
_derivative_p = jax.extend.core.Primitive("symmetric_matrix_power_derivative")


def _derivative(floors, matrix, *directions, **params):
    """Differentiates the power at ``matrix`` once along each of ``directions``.

    ``matrix``, each direction and the result have shape (..., L, L). ``floors``, shape
    (..., 2), holds ``floor`` and ``null`` of :func:`matrix_power`. Without directions
    the result is the power itself.
    """
    return _derivative_p.bind(floors, matrix, *directions, **params)


@_derivative_p.def_impl
def _derivative_impl(
    floors, matrix, *directions, p, relative_floor, absolute, has_null
):
    values, vectors = _eigh.eigh(matrix)
    transposed = jnp.swapaxes(vectors, -1, -2)
    floor, null = floors[..., 0], floors[..., 1]
    relative = relative_floor * jnp.max(jnp.abs(values), axis=-1, initial=0)
    if has_null:
        stand_in = _StandIn(floor, jnp.maximum(relative, null), absolute)
    else:
        stand_in = _StandIn(jnp.maximum(floor, relative), None, absolute)
    n = len(directions)
    if n == 0:
        power = stand_in.over(1).value(values) ** p
        return _xla.product(vectors * power[..., None, :], transposed)
    rotated = [
        _xla.product(_xla.product(transposed, direction), vectors)
        for direction in directions
    ]
    difference = _divided_difference_tensor(p, stand_in.over(n + 1), values, n)
    index = string.ascii_lowercase[: n + 1]
    terms = [f"...{i}{j}" for i, j in itertools.pairwise(index)]
    equation = ",".join([f"...{index}", *terms]) + f"->...{index[0]}{index[-1]}"
    total = sum(
        jnp.einsum(equation, difference, *order, precision=jax.lax.Precision.HIGHEST)
        for order in itertools.permutations(rotated)
    )
    return _xla.product(_xla.product(vectors, total), transposed)


@_derivative_p.def_abstract_eval
def _derivative_abstract_eval(floors, matrix, *directions, **params):
    return matrix


def _derivative_jvp(primals, tangents, **params):
    """Differentiates once more: along the matrix's tangent, and in each direction."""
    floors, matrix, *directions = primals
    _, d_matrix, *d_directions = tangents
    primal = _derivative(floors, matrix, *directions, **params)
    terms = []
    if type(d_matrix) is not ad.Zero:
        terms.append(_derivative(floors, matrix, *directions, d_matrix, **params))
    for i, d_direction in enumerate(d_directions):
        if type(d_direction) is not ad.Zero:
            varied = [*directions[:i], d_direction, *directions[i + 1 :]]
            terms.append(_derivative(floors, matrix, *varied, **params))
    # JAX calls this only if a tangent is not zero. ``terms`` is empty if that tangent
    # belongs to the floors, which are constants.
    tangent = sum(terms[1:], terms[0]) if terms else jnp.zeros_like(primal)
    return primal, tangent


def _derivative_transpose(cotangent, floors, matrix, *directions, **params):
    """Puts the cotangent B in the place of the direction A that is transposed.

    The inner product <B, D^n f[A_1, ..., A_n]> is symmetric in B and every A.
    """
    linear = [ad.is_undefined_primal(direction) for direction in directions]
    swapped = [
        cotangent if undefined else direction
        for undefined, direction in zip(linear, directions, strict=True)
    ]
    result = _derivative(floors, matrix, *swapped, **params)
    return [None, None, *(result if undefined else None for undefined in linear)]


def _derivative_batch(arguments, axes, **params):
    """Moves the batch to the first axis: every argument has leading axes already."""
    size = next(
        x.shape[axis]
        for x, axis in zip(arguments, axes, strict=True)
        if axis is not None
    )
    leading = [
        jnp.broadcast_to(x, (size, *x.shape))
        if axis is None
        else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(arguments, axes, strict=True)
    ]
    return _derivative(*leading, **params), 0


ad.primitive_jvps[_derivative_p] = _derivative_jvp
ad.primitive_transposes[_derivative_p] = _derivative_transpose
batching.primitive_batchers[_derivative_p] = _derivative_batch
mlir.register_lowering(
    _derivative_p, mlir.lower_fun(_derivative_impl, multiple_results=False)
)


class _StandIn(NamedTuple):
    """The function that replaces eigenvalues before the power is taken."""

    floor: jax.Array  # shape (...).
    null: jax.Array | None  # shape (...): values up to this count as 1.
    absolute: bool

    def over(self, axes: int) -> "_StandIn":
        """Appends ``axes`` axes of length 1 to ``floor`` and ``null``."""
        null = self.null
        if null is not None:
            null = null.reshape(null.shape + (1,) * axes)
        floor = self.floor.reshape(self.floor.shape + (1,) * axes)
        return _StandIn(floor, null, self.absolute)

    def value(self, x: jax.Array) -> jax.Array:
        """Returns max(x, floor) or max(|x|, floor), and 1 where that is null."""
        y = jnp.maximum(jnp.abs(x) if self.absolute else x, self.floor)
        return y if self.null is None else jnp.where(y <= self.null, 1, y)

    def slope(self, x: jax.Array) -> jax.Array:
        """Returns the derivative of ``value`` at x: 1, 0 or -1."""
        floor = self.floor
        if self.null is not None:
            floor = jnp.maximum(floor, self.null)
        slope = (x > floor).astype(x.dtype)
        return slope - (x < -floor).astype(x.dtype) if self.absolute else slope


def _divided_difference_tensor(p, stand_in, values, n):
    """Returns f[l_i0, ..., l_in] for all indices: shape (...) and n + 1 axes of L."""
    lead = values.ndim - 1
    size = values.shape[-1]
    shape = values.shape[:-1] + (size,) * (n + 1)
    points = [
        jnp.broadcast_to(
            jnp.expand_dims(
                values, [lead + axis for axis in range(n + 1) if axis != k]
            ),
            shape,
        )
        for k in range(n + 1)
    ]
    # A divided difference does not depend on the order of its points. Sorted points
    # lose the fewest digits, because their ends are furthest apart.
    ascending = jnp.sort(jnp.stack(points), axis=0)
    return _divided_difference(p, stand_in, list(ascending))


def _divided_difference(p, stand_in, points):
    """Returns f[x_0, ..., x_n] for f(x) = stand_in.value(x)^p and ascending points."""
    n = len(points) - 1
    low, high = points[0], points[-1]
    gap = high - low
    if n == 1:
        floored_low, floored_high = stand_in.value(low), stand_in.value(high)
        slope = jnp.where(
            gap > 0,
            (floored_high - floored_low) / jnp.where(gap > 0, gap, 1),
            stand_in.slope(high),
        )
        return slope * _power_difference(p, floored_low, floored_high)
    upper = _divided_difference(p, stand_in, points[1:])
    lower = _divided_difference(p, stand_in, points[:-1])
    # Where points lie close together, use the derivative of f at their mean. Its error
    # shrinks with the square of the gap; the quotient's rounding error grows instead.
    near = gap <= jnp.finfo(gap.dtype).eps ** (1 / 3) * jnp.abs(high)
    mean = sum(points) / (n + 1)
    falling = math.prod(p - k for k in range(n)) / math.factorial(n)
    confluent = falling * stand_in.value(mean) ** (p - n) * stand_in.slope(mean) ** n
    return jnp.where(near, confluent, (upper - lower) / jnp.where(near, 1, gap))


def _power_difference(p, low, high):
    """Returns (high^p - low^p) / (high - low) accurately, p high^(p-1) if equal."""
    log_ratio = jnp.log(low / high)
    equal = log_ratio == 0
    safe = jnp.where(equal, -1, log_ratio)
    quotient = jnp.where(equal, p, jnp.expm1(p * safe) / jnp.expm1(safe))
    return high ** (p - 1) * quotient
