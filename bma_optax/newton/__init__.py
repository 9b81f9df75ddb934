"""Newton's method with block means of curvature: C -> direction -> step.

_newton             the direction C g, with a new C every so many steps
_natural            the direction for the information matrix
_quadratic_model    the step rule: length and momentum from a model of the loss
_backtracking       how much of a step to take, from the loss alone
_aliases            direction and step rule in a chain
_masks              finds the arrays that a later mask freezes
_preconditioner     C alone, for linear solvers
_diagnostics        numbers of a state for a logger
"""
