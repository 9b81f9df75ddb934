"""What each kind of state shows of its small matrices and of its update."""

from typing import Any

import jax

from bma_optax import _names
from bma_optax.adaptive import _diagnostics
from bma_optax.adaptive._adagrad import ScaleByBMAState
from bma_optax.adaptive._adam import ScaleByAdamBMAState
from bma_optax.adaptive._mini import ScaleByMiniBMAState
from bma_optax.newton import _diagnostics as _newton_diagnostics
from bma_optax.newton._newton import ScaleByNewtonBMAState
from bma_optax.newton._quadratic_model import ScaleByQuadraticModelState


def plain(state):
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


def misfit(blocks, grads, state) -> str:
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
        if not _newton_diagnostics.fits(state, blocks):
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


def in_order(grads, blocks):
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
KINDS: dict[type, tuple[dict[str, str], Any]] = {
    ScaleByBMAState: (_same("count", "failures"), _diagnostics.of_adagrad),
    ScaleByAdamBMAState: (_same("count", "failures"), _diagnostics.of_adam),
    ScaleByMiniBMAState: (_same("count"), _diagnostics.of_mini),
    ScaleByNewtonBMAState: (_same(*_NEWTON.split()), _newton_diagnostics.of_newton),
    ScaleByQuadraticModelState: (_STEP | {"step_products": "products"}, None),
}
