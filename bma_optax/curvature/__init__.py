"""Curvature: what the matrix G of eq. (1) is, and entries of it by products.

_kinds             Hessian, GaussNewton, Fisher, ...: products v -> G v
_user_functions    what users' functions are given, and what they must return
_derivatives       products by differentiation, with custom rules in the model
_probing           block sums and the diagonal of G from products with vectors
_diagonal          the diagonal of G: given, or probed
"""
