"""What the states say of a run, as numbers for a logger.

A state is found by its kind in an optimiser's state. Its scalars are numbers as they
are; what its small matrices and its update show is computed beside each method.
"""

from typing import Any

import jax

from bma_optax import _names
from bma_optax.adaptive import _diagnostics as _adaptive
from bma_optax.adaptive import _inverse_root
from bma_optax.adaptive._adagrad import ScaleByBMAState
from bma_optax.adaptive._adam import ScaleByAdamBMAState
from bma_optax.adaptive._mini import ScaleByMiniBMAState
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
    r"""Numbers to log, from the states of this library inside an optimiser's state.

    Nothing of it is computed in ``update``: call it as often as you log. It can be
    jitted, with ``blocks`` closed over.

    From the state alone:

    - ``count``: steps taken. ``refreshes`` and ``failures``: factors made, and not
      finite.
    - ``coarse_ratio``, min eig(M) / median(Λ) over the eigenvalues that rounding tells
      from 0: a bound on what blocks can gain. They divide the number of steps by about
      1/√coarse_ratio at most. Near or above 1 they cannot help: finer or other blocks
      may, or else a diagonal method. Far below 1 they may, as for fields on grids; but
      not where slow directions vary inside blocks too (networks, fields that share a
      block), which M does not show. Below 0 the curvature is indefinite.
    - ``floored``: eigenvalues of M that were negative, below the floor or no larger
      than rounding, so that absolute values, the floor or, along directions that are
      null, those of the diagonal stood in their place.
    - ``local``: whether the curvature reached no further than declared.
    - ``products``: products with the curvature so far, each about two gradients for
      the Hessian. ``step_products`` are those of the step rule.
    - ``damping``.
    - ``learning_rate``, ``momentum``: a and b of the last step of
      :func:`scale_by_quadratic_model`; ``backtracking``: the part of it that was taken,
      0 if the step was refused.

    With ``blocks``, where there are small matrices (not between nested levels):

    - ``min_eigenvalue``, ``max_eigenvalue`` of M, before its floor. For mini-BMA these
      are the least and the largest M_i / Λ_i, as in all that follows.
    - ``floored_share``: the part of M's eigenvalues that the floor, or the absolute
      value, replaced; for mini-BMA the part of units that do not shrink, M_i < Λ_i.
    - ``correlations``: up to 10 of M's entries over the roots of its diagonal, those
      furthest from 0 first, and ``correlated_pairs``: the two blocks of each, as
      positions in ``blocks.names``.

    With ``blocks`` and ``grads``, or with ``blocks`` where the state has a momentum:

    - ``correction``: the norm of what block means add to the update, over that of the
      diagonal method's update; of the form "left".
    - ``effective_rates``: the norm of the update in each block, over that of the
      gradient or the momentum there; learning rates and what else the chain has come
      on top, and Adam's correction of the start is not in it.

    Args:
      state: the state of any optimiser, such as a chain or ``nnx.Optimizer``'s
        ``opt_state``.
      blocks: :func:`bma_optax.partition` of the parameters by the rule of the
        transformation (within "block" for mini-BMA); for Flax's nnx, of
        ``nnx.state(model, nnx.Param)``. States that they do not fit give the rest.
      grads: a tree like the parameters: what the transformation is given.
      estimator: that of the transformation.

    Returns:
      A dictionary of scalars, shape (); ``correlations`` has shape (k,),
      ``correlated_pairs`` (k, 2), ``effective_rates`` (L,). With several states of one
      kind, under ``optax.partition`` say, names have the path of the state before them.

    Raises:
      ValueError: if there is no state of this library, if ``blocks`` and ``grads`` fit
        none, or if ``grads`` come without ``blocks``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, bma_optax as bma
      >>> def f(x): return jnp.sum(x["a"] ** 2) + jnp.sum((x["a"] - x["b"]) ** 2)
      >>> tx = bma.adagrad_bma(0.5)
      >>> params = {"a": jnp.array([3.0, 1.0, 2.0]), "b": jnp.array(0.0)}
      >>> state = tx.init(params)
      >>> for _ in range(9):
      ...     grads = jax.grad(f)(params)
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> blocks = bma.partition(params)
      >>> numbers = bma.diagnostics(state, blocks, grads)
      >>> print(f"{numbers['correction']:.1f}, {numbers['min_eigenvalue']:.2f}")
      0.3, 0.03
      >>> for (i, j), x in zip(numbers["correlated_pairs"], numbers["correlations"]):
      ...     print(f"{blocks.names[i]}, {blocks.names[j]}: {x:.2f}")
      a, b: -0.97
    """  # noqa: E501
    _inverse_root.check_estimator(estimator)
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
    """The state with bare arrays, and with its trees as lists of their leaves.

    Flax's ``nnx.Optimizer`` boxes each array of a state, and each of the gradients in
    another kind of box.
    """
    fields = type(state).__annotations__
    return type(state)(
        *(
            jax.tree.leaves(x)[0] if fields[name] is jax.Array else jax.tree.leaves(x)
            for name, x in zip(state._fields, state, strict=True)
        )
    )


def _misfit(blocks, grads, state) -> str:
    """What to pass instead, where these are not what the state is of; else empty."""
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
        if not _newton.fits(state, blocks):
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
    """The leaves of ``grads`` in the order of the arrays of ``blocks``."""
    leaves = dict(_names.named_leaves(grads))
    return [leaves[array.path] for array in blocks.arrays]


_SEEN = (
    "the parameters that it sees; under optax.masked or optax.partition these have "
    "optax.MaskedNode in the place of others"
)


def _diagonal(state):
    """The tree like the parameters that it has."""
    fields = ("sum_of_squares", "nu", "inverse_diagonal")
    return next(getattr(state, field) for field in fields if hasattr(state, field))


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_NEWTON = "count coarse_ratio products damping floored local refreshes failures"
_STEP = _same("learning_rate", "momentum", "backtracking")
# For each kind of state: the names of its scalars, and a look at the rest.
_KINDS: dict[type, tuple[dict[str, str], Any]] = {
    ScaleByBMAState: (_same("count", "failures"), _adaptive.of_adagrad),
    ScaleByAdamBMAState: (_same("count", "failures"), _adaptive.of_adam),
    ScaleByMiniBMAState: (_same("count"), _adaptive.of_mini),
    ScaleByNewtonBMAState: (_same(*_NEWTON.split()), _newton.of_newton),
    ScaleByQuadraticModelState: (_STEP | {"step_products": "products"}, None),
}
