"""Newton-BMA as a preconditioner of a linear operator A, known by its products.

    C = Z^-1 [Λ̄^-1 (I - E Eᵀ) + E M^-1 Eᵀ] Z^-1

as in ``_newton``, from one refresh without an optimiser: C preconditions conjugate
gradients on A x = b, where x and b are trees of arrays like ``like``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bma_optax import _checks, _tree, _warnings
from bma_optax.curvature import _kinds, _probing, _symmetry, _user_functions
from bma_optax.curvature._probing import LinearOperator
from bma_optax.multilevel import _smoother, _two_level
from bma_optax.partitions import _rules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Preconditioner:
    """The symmetric positive definite C of Newton-BMA; a pytree, called like a function.

    :func:`preconditioner` makes it. C is linear, and its own transpose and adjoint:
    take C itself where ``jax.linear_transpose`` cannot transpose its operations.

    Example:
      >>> import jax.numpy as jnp, bma_optax as bma
      >>> C = bma.preconditioner(lambda v: 4 * v, jnp.zeros(3))
      >>> print(C(jnp.ones(3)))
      [0.25 0.25 0.25]
    """  # noqa: E501

    inverse_diagonal: Any
    N: Any
    K: Any
    local: jax.Array  # shape (), bool: whether the operator is as local as declared.
    method: _two_level.TwoLevel = dataclasses.field(metadata={"static": True})

    def __call__(self, x: Any) -> Any:
        """Returns C x, in the dtypes of x.

        Args:
          x: one vector, a tree of the structure and shapes of ``like``. For several
            vectors use ``jax.vmap(C)``.

        Returns:
          A tree like x.

        Raises:
          TypeError: if a leaf of x is not a real floating array.
          ValueError: if x has another structure or other shapes.

        Example:
          >>> import jax.numpy as jnp, bma_optax as bma
          >>> print(bma.preconditioner(lambda v: 4 * v, jnp.zeros(3))(jnp.ones(3)))
          [0.25 0.25 0.25]
        """
        _tree.check_vectors(x, "The vector at")
        difference = _tree.unlike(x, self.inverse_diagonal)
        if difference is not None:
            name, new, old = difference
            shapes = ["none" if v is None else str(np.shape(v)) for v in (new, old)]
            raise ValueError(
                f"The vector at {name!r} has shape {shapes[0]}; the preconditioner is "
                f"of {shapes[1]}. Pass one vector of the structure and shapes of "
                "`like`; for several right-hand sides jax.vmap(C)."
            )
        x = _tree.arrays(_tree.in_order(x, self.inverse_diagonal))
        y = self.method.apply(self.inverse_diagonal, self.N, self.K, x)
        return _tree.astype(y, x)

    def as_lineax(self) -> Any:
        """C as a ``lineax.FunctionLinearOperator``, tagged positive semi-definite.

        Pass it to ``lineax.CG`` in ``options={"preconditioner": ...}``. lineax is an
        optional dependency: ``pip install "bma-optax[lineax]"``.

        Example:
          >>> import jax.numpy as jnp, bma_optax as bma
          >>> C = bma.preconditioner(lambda v: 4 * v, jnp.zeros(3)).as_lineax()
          >>> print(C.mv(jnp.ones(3)))
          [0.25 0.25 0.25]
        """
        import lineax

        structure = jax.eval_shape(lambda: self.inverse_diagonal)
        return lineax.FunctionLinearOperator(
            self, structure, lineax.positive_semidefinite_tag
        )


def preconditioner(
    product_fn: Callable[[Any], Any],
    like: Any,
    partition: _rules.Rule = _rules.per_leaf,
    *,
    diagonal: Any = None,
    damping: jax.typing.ArrayLike = 0.0,
    min_eigenvalue: jax.typing.ArrayLike = 0.0,
    num_probes: int = 32,
    key: jax.typing.ArrayLike = 0,
) -> Preconditioner:
    r"""Computes the inverse of a block mean of a symmetric operator A.

    .. math:: C = Z^{-1} [\bar\Lambda^{-1} (I - E E^T) + E M^{-1} E^T] Z^{-1}

    C preconditions A. It is the C of :func:`scale_by_newton_bma` for G = A, and takes L
    products with A, and up to ``num_probes`` more for the diagonal.

    Args:
      product_fn: the function ``v -> A v`` on trees like ``like``, which JAX can trace.
      like: a tree of floating arrays. Only their shapes and dtypes matter.
      partition: the rule that cuts the tree into blocks. A ``reach`` in it declares how
        far apart the elements can be that A connects.
      diagonal: the diagonal of A, a tree like ``like``, if it is known.
      damping: μ, a number >= 0, added to M's eigenvalues and to Λ.
      min_eigenvalue: the floor of M's absolute eigenvalues, a number >= 0. The damping
        and the resolution of the dtype are floors too.
      num_probes: the largest number of products for the diagonal; see
        :class:`Curvature`.
      key: a seed or a random key, for the probes.

    Returns:
      A :class:`Preconditioner`. Along directions that A maps to 0, up to rounding, C
      has only its diagonal part, so that conjugate gradients can solve singular
      systems. The field ``local`` tells whether A reaches no further than declared. If
      it does reach further, then under ``jax.jit``, where nothing can be raised, C is
      the inverse of the diagonal.

    Raises:
      TypeError, ValueError: for the reasons that :func:`scale_by_newton_bma` lists; a
        ValueError also if C is not finite, if A reaches further than declared, or if
        products with random vectors show that A is not symmetric, to a hundredth.

    Warns:
      UserWarning: at run time under ``jax.jit``, for the last three reasons.

    Example:
      >>> import jax, jax.numpy as jnp, bma_optax as bma
      >>> A = lambda v: 2 * v + jnp.sum(v)
      >>> b = jnp.arange(4.0)
      >>> C = bma.preconditioner(A, b)
      >>> x, _ = jax.scipy.sparse.linalg.cg(A, b, M=C, maxiter=1)
      >>> print(A(x))
      [0. 1. 2. 3.]

    Source: Lu et al., `Block Mean Approximation for Efficient Second Order Optimization
    <https://arxiv.org/abs/1804.05484>`_, 2018, eq. 3.
    """
    _checks.not_negative(damping=damping, min_eigenvalue=min_eigenvalue)
    _checks.functions("lambda v: A @ v", product_fn=product_fn)
    _checks.random_key(key)
    like = _tree.parameters(like)
    if diagonal is not None:
        diagonal = _user_functions.like_params(diagonal, like, "diagonal")
    product = _user_functions.product(product_fn, like, "product_fn")
    curvature = _kinds.Operator(
        lambda _: product_fn,
        diagonal_fn=None if diagonal is None else lambda _: diagonal,
        num_probes=num_probes,
    )
    method = _two_level.checked_two_level(like, partition)
    key = _probing.key_data(key)
    G = LinearOperator(product, _tree.zeros_like(like))
    found = method.gather(curvature, G, key, {})
    factor = method.invert(found, damping, min_eigenvalue)
    _warnings.raise_or_warn(
        ~_tree.all_finite((factor, found.N, found.diagonal)),
        lambda: (
            "`product_fn` gives numbers that are not finite, and so does the "
            "preconditioner. Pass an operator whose products with finite vectors are."
        ),
    )
    if jax.tree.leaves(like):
        _symmetry.check(G, _smoother.positive(method, found.diagonal), key)
    return Preconditioner(
        factor.inverse_diagonal, found.N, factor.K, found.local, method
    )
