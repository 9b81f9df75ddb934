"""Curvature: the matrix G of eq. 1 (Lu et al. 2018), known by products v -> G v.

The step of eq. 1 is θ <- θ - η G^-1 ∇f(θ). G is d x d and never built: all that later
folders need (its diagonal, block sums) comes from products with trees like params.

_kinds             Hessian, GaussNewton, Fisher, Operator: each gives v -> G v
_user_functions    checks of what users' functions are given, and of what they return
_derivatives       products by differentiation, also for models with custom rules
_probing           block sums and the diagonal of G, from products with chosen vectors
_diagonal          the diagonal of G: given by the curvature, or probed
_symmetry          whether G is symmetric, by products with random vectors
"""

from bma_optax.curvature._kinds import (
    Curvature,
    Fisher,
    GaussNewton,
    Hessian,
    Operator,
)

__all__ = ["Curvature", "Fisher", "GaussNewton", "Hessian", "Operator"]
