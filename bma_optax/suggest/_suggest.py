"""The public function: measures, tries, and prints what it has found."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _checks, _control_flow, _names, _tree
from bma_optax.curvature import _kinds, _probing, _user_functions
from bma_optax.curvature._kinds import Curvature
from bma_optax.multilevel._two_level import TwoLevel, checked_two_level
from bma_optax.partitions._rules import Rule, per_leaf
from bma_optax.suggest import _report, _rules, _structure
from bma_optax.suggest._structure import Structure
from bma_optax.suggest._trial import Trial, trial

# Blocks cost a step a little, and a refresh some products: they must save more.
_PAYS = 1.5
# Thinner tiles are more of them, and must save steps for it: where a product is a cheap
# stencil, a step with tiles of 4 x 1 takes 2.5 times as long as one with 4 x 4, as
# `benchmarks.grids.prices` measures. The compiler's count of operations does not tell
# that: on a thin plate at 256² it says that C with slopes costs 1.3 products, not 14.
_MORE_CELLS = 2.5
# With slopes a step takes a few times as long, up to twenty where a product is a cheap
# stencil (`benchmarks.grids.prices`), and about ten steps are needed at least.
_SLOPES, _FEWEST = 3, 10
# Where block means are hardly less curved than all else, what is slow is not smooth.
_SMOOTH = 0.5


def suggest_partition(
    value_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    curvature: Curvature = _kinds.Hessian(),  # noqa: B008 - a frozen value.
    verbose: bool = True,
    key: jax.typing.ArrayLike = 0,
    **extra_args: Any,
) -> Rule:
    r"""Finds the partition of a loss by products with its curvature, before training.

    A vector that is random up to a cut across an axis and 0 behind it shows how far
    elements meet along that axis, whether across the edge too, and which arrays meet. A
    vector that is 1 on a lattice shows columns of G, and from their second moments

    .. math:: -\tfrac12 \sum_o o_i^2 \, G_{p + o, p} / |G_{pp}|

    how stiff the coupling along axis i is. Where it is far stiffer along some axes,
    tiles along those alone are tried as well, and taken if they need less than two
    fifths of the steps. Where it is 0 along all, the loss is of
    second differences, and blocks have slopes. Conjugate gradients on the quadratic
    model, with the blocks and with the diagonal alone, then tell whether blocks pay.
    Where they pay and are slow, slopes are tried as well, and taken if they need less
    than a third of the steps. The choice is by numbers of steps, never by seconds, so
    that it does not depend on the load of a machine. The table names the rules that
    were tried and not taken, with their steps and how long a step takes.

    It runs outside ``jax.jit``, and its products are compiled. It takes nine products
    at most an axis of each array, three refreshes at most, and some steps of conjugate
    gradients.

    Args:
      value_fn: the loss, called as ``value_fn(params, *args)``.
      params: the parameters, a tree of floating arrays.
      *args: more arguments of the loss.
      curvature: what G is: ``bma.Hessian()`` or another :class:`Curvature`.
      verbose: whether to print the table.
      key: a seed or a random key, for the probes and for ``bma.Fisher``.
      **extra_args: arguments for the functions that name them in their signatures, as
        those of ``update``. Arguments of the loss that are named ``key``, ``verbose``
        or ``curvature`` must come by position, or under other names.

    Returns:
      A :class:`Rule`, with its reach, for :func:`newton_bma`,
      :func:`scale_by_newton_bma` or :func:`preconditioner`. It is ``per_leaf`` where
      nothing is local or blocks do not pay; the table then says what to take instead.

    Raises:
      TypeError: if ``value_fn`` is not a function with second derivatives, or a leaf is
        not a real floating array.
      ValueError: if the gradient or the curvature is not finite at the parameters, if
        the loss needs an argument of a name that is taken, or under ``jax.jit``.

    Example:
      >>> import jax.numpy as jnp, bma_optax as bma
      >>> def f(u):
      ...     smoothness = sum(jnp.sum(jnp.diff(u, axis=i) ** 2) for i in (0, 1))
      ...     return smoothness + (u[20, 30] - 1) ** 2
      >>> bma.suggest_partition(f, jnp.zeros((64, 64)), verbose=False)
      per_tile((4, 4), reach=1)

    Source: for probing by few products, Curtis, Powell and Reid, On the estimation of
    sparse Jacobian matrices, 1974; for tiles along stiff axes (semi-coarsening),
    Trottenberg, Oosterlee and Schüller, Multigrid, 2001, section 5.1.
    """
    _checks.functions(value_fn=value_fn)
    placed = _user_functions.names_of_arguments(value_fn)[: len(args)]
    taken = "curvature", "verbose", "key"
    _user_functions.free_names(value_fn, placed, "suggest_partition", taken)
    if _control_flow.is_traced(params, args, extra_args):
        raise ValueError(
            "suggest_partition returns a rule, which is no array. Call it before "
            "jax.jit, and pass the rule on."
        )
    _kinds.check_curvature(curvature)
    _checks.random_key(key)
    _tree.parameters(params)
    for path, leaf in _names.named_leaves(params):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                f"Parameter {_names.name_of(path)!r} is a shape without numbers. Pass "
                "arrays: the curvature is measured at them."
            )
    params = _tree.arrays(params)
    loss = value_fn
    if args:
        bound = _user_functions.bind(value_fn, extra_args, "value_fn")
        loss = lambda p: bound(p, *args)  # noqa: E731
    random_key = _probing.typed_key(_probing.key_data(key))

    @jax.jit
    def product(params, v):
        return _kinds.product_at(curvature, params, random_key, loss, extra_args)(v)

    probe = _probe(product, params)
    _check_gradient(loss, params, extra_args)
    named = _names.named_leaves(params)
    found = _structure.structures(
        probe, [path for path, _ in named], [np.shape(leaf) for _, leaf in named]
    )
    if not any(array.space for array in found):
        rule, tried, all_tried = per_leaf, None, {}
    else:
        refresh = functools.partial(_refresh, curvature, random_key, loss, extra_args)
        rule, tried, all_tried = _best(found, refresh, product, params, probe.vanishes)
    if verbose:
        print(_report.report(found, rule, tried, all_tried, probe, params))
    return rule


def _probe(product, params) -> _structure.Probe:
    """Products at a point nearby, where nothing vanishes by symmetry."""
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    numbers = [np.asarray(x, float) for x in leaves]
    moved = [
        _like(x + 1e-3 * _scale(x) * rng.standard_normal(x.shape), leaf)
        for x, leaf in zip(numbers, leaves, strict=True)
    ]
    near = jax.tree.unflatten(treedef, moved)

    def at(point, v):
        v = map(_like, v, leaves)
        y = product(point, jax.tree.unflatten(treedef, v))
        return [np.asarray(x, float) for x in jax.tree.leaves(y)]

    v = [rng.uniform(0.5, 1.5, x.shape) * rng.choice([-1, 1], x.shape) for x in leaves]
    here, there = at(params, v), at(near, v)
    if not _are_finite(here):
        raise ValueError(
            "The curvature of `value_fn` is not finite at these parameters. Pass "
            "parameters at which the loss has finite second derivatives."
        )
    eps = max((float(jnp.finfo(x.dtype).eps) for x in leaves), default=1e-7)
    if not _are_finite(there):
        return _structure.Probe(lambda v: at(params, v), eps)
    curved = [sum(map(np.count_nonzero, y)) for y in (here, there)]
    vanishes, is_flat = 2 * curved[0] < curved[1], bool(leaves) and curved[1] == 0
    return _structure.Probe(lambda v: at(near, v), eps, vanishes, is_flat)


def _check_gradient(loss, params, extra_args) -> None:
    """Raises a ValueError that names a parameter whose gradient is not finite.

    The curvature can be finite where the gradient is not, as of ``jnp.nansum`` over
    data that are NaN.
    """
    gradient = jax.jit(jax.grad(_user_functions.loss(loss, extra_args)))(params)
    for path, leaf in _names.named_leaves(gradient):
        if not _are_finite([np.asarray(leaf, float)]):
            raise ValueError(
                f"The gradient of `value_fn` for {_names.name_of(path)!r} is not "
                "finite at these parameters, and one step would spread that. Pass data "
                "and parameters at which it is finite: replace NaNs in the data by a "
                "number, and weigh what is not known by 0."
            )


def _are_finite(y: _structure.Vector) -> bool:
    return all(np.all(np.isfinite(x)) for x in y)


def _like(x: np.ndarray, leaf: jax.Array) -> jax.Array:
    """An array like a leaf, without a program that would have to be compiled."""
    return jax.device_put(x.astype(leaf.dtype), leaf.sharding)


def _scale(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x)))) or 1.0 if x.size else 1.0


def _refresh(curvature, key, loss, extra_args, method: TwoLevel, params):
    product = _kinds.product_at(curvature, params, key, loss, extra_args)
    G = _probing.LinearOperator(product, params)
    # What is known to reach far gives no warning: the rule is then another one.
    words = jax.random.key_data(key)
    found = method.gather(curvature, G, words, extra_args, known_far=True)
    return found, method.invert(found, 0.0, 0.0)


def _best(found: list[Structure], refresh, product, params, vanishes: bool):
    """The rule with the fewest steps, its trial, and the trials of all rules.

    Where the curvature vanishes at the parameters the steps tell nothing of later ones.
    """
    rng = np.random.default_rng(2)
    noise = jax.tree.map(lambda x: _like(rng.standard_normal(x.shape), x), params)
    all_tried = {}

    def attempt(rule):
        method = checked_two_level(params, rule)
        refreshed = functools.partial(refresh, method)
        all_tried[rule] = trial(method, refreshed, product, params, noise)
        return all_tried[rule]

    def rule_of(strong, slopes):
        return _rules.rule_of(found, strong=strong, slopes=slopes)

    strong, rule = False, rule_of(False, False)
    tried = attempt(rule)
    if _rules.has_weak_axes(found) and tried.local:
        other = rule_of(True, False)
        if _MORE_CELLS * _order(attempt(other)) < _order(tried):
            strong, rule, tried = True, other, all_tried[other]
    other = rule_of(strong, True)
    if _is_slow(tried) and not vanishes and other not in all_tried:
        if _SLOPES * _order(attempt(other)) < _order(tried):
            rule, tried = other, all_tried[other]
    if not tried.local or not (vanishes or _pays(tried)):
        rule = per_leaf
    return rule, tried, all_tried


def _is_slow(tried: Trial) -> bool:
    """Whether blocks pay, and may take a third of the steps with slopes."""
    known = tried.local and tried.convex
    return known and _pays(tried) and _order(tried) > _SLOPES * _FEWEST


def _order(tried: Trial) -> float:
    return np.inf if tried.steps is None or not tried.convex else tried.steps


def _pays(tried: Trial) -> bool:
    if not tried.convex:
        return True  # The number of steps is not known. The table says so.
    if tried.coarse_ratio > _SMOOTH:
        return False
    if tried.steps is None:
        return tried.left < tried.left_without
    without = tried.tried if tried.steps_without is None else tried.steps_without
    return without >= _PAYS * tried.steps
