"""What the states say of a run, as numbers for a logger."""

from typing import Any

import jax

from bma_optax import _looks
from bma_optax.adaptive import _inverse_root
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
            state, is_leaf=lambda x: type(x) in _looks.KINDS
        )
        if type(leaf) in _looks.KINDS
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
        fields, look = _looks.KINDS[type(boxed)]
        state = _looks.plain(boxed)
        numbers = {name: getattr(state, field) for name, field in fields.items()}
        if blocks is not None and look is not None:
            misfit = _looks.misfit(blocks, grads, boxed)
            if misfit:
                misfits.append(misfit)
            else:
                looks += 1
                leaves = None if grads is None else _looks.in_order(grads, blocks)
                numbers |= look(state, blocks, leaves, estimator)
        prefix = f"{path}/" if kinds.count(type(boxed)) > 1 else ""
        result |= {prefix + name: number for name, number in numbers.items()}
    if misfits and not looks:
        raise ValueError(misfits[0])
    return result
