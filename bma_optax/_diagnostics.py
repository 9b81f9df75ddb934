"""What the states say of a run, as numbers for a logger."""

from typing import Any

import jax

from bma_optax._adagrad import ScaleByBMAState
from bma_optax._adam import ScaleByAdamBMAState
from bma_optax._newton import ScaleByNewtonBMAState
from bma_optax._steps import ScaleByQuadraticModelState

_FIELDS: dict[type, tuple[str, ...]] = {
    ScaleByBMAState: ("count", "failures"),
    ScaleByAdamBMAState: ("count", "failures"),
    ScaleByNewtonBMAState: (
        "count",
        "coarse_ratio",
        "products",
        "damping",
        "floored",
        "local",
        "refreshes",
        "failures",
    ),
    ScaleByQuadraticModelState: (
        "learning_rate",
        "momentum",
        "backtracking",
        "products",
    ),
}


def diagnostics(state: Any) -> dict[str, jax.Array]:
    r"""Numbers to log, from the states of this library inside an optimiser's state.

    - ``coarse_ratio``, min eig(M) / median(Λ): will it pay? Where it is much below 1
      (0.01, say) the slow directions are nearly constant on blocks and the coarse
      correction speeds them up by about its inverse. Near or above 1 it cannot help:
      finer or other blocks may, or else a diagonal method. Below 0 the curvature is
      indefinite.
    - ``floored``: eigenvalues of M that were negative or below the floor, so that
      absolute values or the floor stood in their place.
    - ``local``: whether the curvature reached no further than declared.
    - ``products``: products with the curvature so far, each about two gradients for
      the Hessian. ``step_products`` are those of the step rule.
    - ``damping``; ``refreshes`` and ``failures``: factors made, and not finite.
    - ``learning_rate``, ``momentum``: a and b of the last step of
      :func:`scale_by_quadratic_model`; ``backtracking``: the part of it that was taken,
      0 if the step was refused.

    Args:
      state: the state of any optimiser, such as a chain.

    Returns:
      A dictionary of scalars, shape (). With several states of one kind, under
      ``optax.partition`` say, names have the path of the state before them.

    Example:
      >>> import jax, jax.numpy as jnp, bma_optax as bma
      >>> f = lambda x: jnp.sum(jnp.diff(x) ** 2) + x[0] ** 2
      >>> tx = bma.newton_bma(partition=bma.per_tile((4,)))
      >>> x = jnp.ones(32)
      >>> _, state = tx.update(jax.grad(f)(x), tx.init(x), x, value_fn=f)
      >>> numbers = bma.diagnostics(state)
      >>> print(f"{numbers['coarse_ratio']:.4f}, {numbers['products']} products")
      0.0035, 40 products
    """
    found = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            state, is_leaf=lambda x: type(x) in _FIELDS
        )
        if type(leaf) in _FIELDS
    ]
    kinds = [type(leaf) for _, leaf in found]
    result = {}
    for path, leaf in found:
        prefix = f"{path}/" if kinds.count(type(leaf)) > 1 else ""
        for field in _FIELDS[type(leaf)]:
            step_rule = isinstance(leaf, ScaleByQuadraticModelState)
            name = "step_products" if step_rule and field == "products" else field
            result[prefix + name] = getattr(leaf, field)
    return result
