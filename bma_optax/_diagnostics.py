"""Numbers for a logger, from the states of a run.

:func:`diagnostics` finds the states of this library inside an optimiser's state, by
their types. The scalars of a state are numbers as they are, of shape (). The module
``_diagnostics`` of each method's folder computes numbers of the small matrices M and of
the update, as eigenvalues of M, shape (L, L), and norms over the L blocks.
"""

from typing import Any

import jax

from bma_optax import _checks, _names
from bma_optax.adaptive import _diagnostics as _adaptive
from bma_optax.adaptive import _inverse_root
from bma_optax.adaptive._adagrad import ScaleByBMAState
from bma_optax.adaptive._adam import ScaleByAdamBMAState
from bma_optax.adaptive._mini import ScaleByMiniBMAState
from bma_optax.multilevel._two_level import TwoLevel
from bma_optax.newton import _diagnostics as _newton
from bma_optax.newton._newton import ScaleByNewtonBMAState
from bma_optax.newton._quadratic_model import ScaleByQuadraticModelState
from bma_optax.partitions._blocks import Partition


def diagnostics(
    state: Any,
    blocks: Partition | None = None,
    grads: Any = None,
    *,
    estimator: str | None = None,
) -> dict[str, jax.Array]:
    """Returns numbers to log, from the states of this library inside an optimiser's state.

    ``update`` computes none of them: call this function as often as you log. It can be
    jitted, with ``blocks`` closed over.

    These numbers need the state alone:

    - ``count``: the steps so far. ``refreshes``: the factors made. ``failures``: the
      factors that were not finite.
    - ``coarse_ratio``: min eig(M) / median(Λ), over the eigenvalues that rounding tells
      from 0. It bounds what blocks can gain: they divide the number of steps by at most
      about 1/√coarse_ratio. Near or above 1 these blocks cannot help; finer or other
      blocks may, or else a diagonal method. Far below 1 they may help, as for fields on
      grids. They do not where slow directions vary inside blocks too (networks, fields
      that share a block): M does not show such directions. Below 0 the curvature is
      indefinite.
    - ``floored``: the number of eigenvalues of M that were negative, below the floor,
      or no larger than rounding. Absolute values, the floor, or along null directions
      the diagonal replaced them.
    - ``local``: whether the curvature reached no further than declared.
    - ``products``: the products with the curvature so far. With the Hessian each costs
      about two gradients. ``step_products``: the products of the step rule.
    - ``damping``: μ.
    - ``learning_rate``, ``momentum``: a and b of the last step of
      :func:`scale_by_quadratic_model`. ``backtracking``: the part of that step that was
      taken, 0 if the step was refused. ``model_error``: abs(1 - decrease / foretold
      decrease) of the whole step, at most 1: how far the curvature changes along it.

    These numbers need ``blocks``, and small matrices (nested levels have none):

    - ``min_eigenvalue``, ``max_eigenvalue``: of M, before its floor. For mini-BMA, the
      least and the largest M_i of :func:`scale_by_mini_bma` take their place.
    - ``floored_share``: the part of M's eigenvalues that the floor or the absolute
      value replaced. For mini-BMA, the part of units that do not shrink, M_i < 1.
    - ``correlations``: up to 10 of M's entries over the roots of its diagonal, those
      furthest from 0 first. ``correlated_pairs``: the two blocks of each, as positions
      in ``blocks.names``.

    These numbers need ``blocks``, and ``grads`` unless the state has a momentum:

    - ``correction``: the norm of what block means add to the update, over the norm of
      the diagonal method's update. It describes the form "left".
    - ``effective_rates``: the norm of the update in each block, over the norm of the
      gradient or the momentum there. Learning rates, later parts of the chain and
      Adam's bias correction are not in it.

    Args:
      state: the state of any optimiser, such as a chain or ``nnx.Optimizer``'s
        ``opt_state``.
      blocks: :func:`bma_optax.partition` of the parameters by the rule of the
        transformation (within "block" for mini-BMA). For Flax's nnx, the parameters are
        ``nnx.state(model, nnx.Param)``. States that ``blocks`` do not fit give the
        numbers that need no blocks.
      grads: a tree like the parameters: the gradients that the transformation is given.
      estimator: the ``estimator`` of the transformation.

    Returns:
      A dictionary of scalars, shape (), but ``correlations`` has shape (k,),
      ``correlated_pairs`` (k, 2) and ``effective_rates`` (L,). If several states have
      one type, as under ``optax.partition``, the path of the state precedes each name.

    Raises:
      ValueError: if there is no state of this library, if ``blocks`` and ``grads`` fit
        no state, or if ``grads`` come without ``blocks``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, bma_optax as bma
      >>> def f(x): return jnp.sum(x["a"] ** 2) + jnp.sum((x["a"] - x["b"]) ** 2)
      >>> tx = bma.adagrad_bma(0.5)
      >>> params = {"a": jnp.array([3.0, 1.0, 2.0]), "b": jnp.array(0.0)}
      >>> state, update = tx.init(params), jax.jit(tx.update)
      >>> for _ in range(9):
      ...     grads = jax.grad(f)(params)
      ...     updates, state = update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> blocks = bma.partition(params)
      >>> numbers = bma.diagnostics(state, blocks, grads)
      >>> print(f"{numbers['correction']:.1f}, {numbers['min_eigenvalue']:.2f}")
      0.3, 0.03
      >>> for (i, j), x in zip(numbers["correlated_pairs"], numbers["correlations"]):
      ...     print(f"{blocks.names[i]}, {blocks.names[j]}: {x:.2f}")
      a, b: -0.97
    """  # noqa: E501
    _checks.one_of(_inverse_root.ESTIMATORS, estimator=estimator)
    if not isinstance(blocks, Partition | None):
        raise TypeError(
            f"`blocks` must be a partition, got {type(blocks).__name__}. Pass "
            "bma.partition(params, rule)."
        )
    if blocks is None and grads is not None:
        raise ValueError("`grads` need `blocks`: bma.partition(params, rule).")
    found = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            state, is_leaf=lambda x: type(x) in _KINDS
        )
        if type(leaf) in _KINDS
    ]
    if not found:
        raise ValueError(
            "There is no state of a BMA transformation in this one. Pass what its "
            "`init` or `update` returns, or an optimiser's state that holds that."
        )
    kinds = [type(leaf) for _, leaf in found]
    misfits, looks = [], 0
    result: dict[str, jax.Array] = {}
    for path, boxed in found:
        fields, look = _KINDS[type(boxed)]
        state = _plain(boxed)
        numbers = {name: getattr(state, field) for name, field in fields.items()}
        if blocks is not None and look is not None:
            problem = _misfit(blocks, grads, boxed)
            if problem:
                misfits.append(problem)
            else:
                looks += 1
                leaves = None if grads is None else _in_order(grads, blocks)
                numbers |= look(state, blocks, leaves, estimator)
        prefix = f"{path}/" if kinds.count(type(boxed)) > 1 else ""
        result |= {prefix + name: number for name, number in numbers.items()}
    if misfits and not looks:
        raise ValueError(misfits[0])
    return result


def _plain(state):
    """Returns the state with bare arrays, and with its trees as lists of their leaves.

    Flax's ``nnx.Optimizer`` puts each array of a state in a box, and each gradient in a
    box of another type.
    """
    fields = type(state).__annotations__

    def plain(name, x):
        if x is None:
            return None
        leaves = jax.tree.leaves(x)
        return leaves[0] if fields[name] is jax.Array else leaves

    return type(state)(*map(plain, state._fields, state))


def _misfit(blocks, grads, state) -> str:
    """Says what to pass instead if these do not fit the state, else nothing."""
    kind = type(state).__name__
    tree = state[1] if isinstance(state, ScaleByMiniBMAState) else _diagonal(state)
    shapes = {path: leaf.shape for path, leaf in _names.named_leaves(tree)}
    fits = {array.path: array.shape for array in blocks.arrays} == shapes
    packed = getattr(state, "U", None)
    if packed is not None:
        fits = fits and jax.tree.leaves(packed)[0].shape == blocks.matrix_shape
    if not fits:
        return (
            f"`blocks` do not fit a {kind}. Pass bma.partition(params, rule) with the "
            f"rule of the transformation, and {_SEEN}."
        )
    if isinstance(state, ScaleByNewtonBMAState):
        if not TwoLevel(blocks).fits(state.N, state.K, state.Lambda):
            return (
                f"`blocks` do not fit a {kind}. Pass bma.partition(params, rule) with "
                "the rule of the transformation, its reach included."
            )
    given = {} if grads is None else dict(_names.named_leaves(grads))
    for path in {**given, **shapes} if grads is not None else ():
        if path not in shapes or getattr(given.get(path), "shape", ()) != shapes[path]:
            return (
                f"{_names.name_of(path)!r}: `grads` do not fit a {kind}. Pass the "
                f"gradients of {_SEEN}."
            )
    return ""


def _in_order(grads, blocks):
    """The leaves of ``grads``, in the order of the arrays of ``blocks``."""
    leaves = dict(_names.named_leaves(grads))
    return [leaves[array.path] for array in blocks.arrays]


_SEEN = (
    "the parameters that it sees; under optax.masked or optax.partition these have "
    "optax.MaskedNode in the place of others"
)


def _diagonal(state):
    """The tree like the parameters that a state has."""
    fields = ("sum_of_squares", "nu", "inverse_diagonal")
    return next(getattr(state, field) for field in fields if hasattr(state, field))


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_NEWTON = "count coarse_ratio products damping floored local refreshes failures"
_STEP = _same("learning_rate", "momentum", "backtracking", "model_error")
# For each type of state: the fields of its scalars, and the function for the rest.
_KINDS: dict[type, tuple[dict[str, str], Any]] = {
    ScaleByBMAState: (_same("count", "failures"), _adaptive.of_adagrad),
    ScaleByAdamBMAState: (_same("count", "failures"), _adaptive.of_adam),
    ScaleByMiniBMAState: (_same("count"), _adaptive.of_mini),
    ScaleByNewtonBMAState: (_same(*_NEWTON.split()), _newton.of_newton),
    ScaleByQuadraticModelState: (_STEP | {"step_products": "products"}, None),
}
