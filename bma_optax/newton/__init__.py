"""Newton's method with block means of curvature: C -> direction -> step.

_newton, _natural       the direction C g, C refreshed every so many steps
_quadratic_model        its length and the momentum, by a model of the loss
_aliases, _masks        both in a chain; masks that follow on it
_preconditioner         C alone, for linear solvers
_diagnostics            what a state shows of its small matrices and of its update
"""
