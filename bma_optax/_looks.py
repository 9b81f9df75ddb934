"""What each kind of state shows of its small matrices and of its update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _names, _tree
from bma_optax.adaptive import _inverse_root, _mini, _moments
from bma_optax.adaptive._adagrad import ScaleByBMAState
from bma_optax.adaptive._adam import ScaleByAdamBMAState
from bma_optax.adaptive._mini import ScaleByMiniBMAState
from bma_optax.multilevel import _coarse_systems, _two_level
from bma_optax.newton._newton import ScaleByNewtonBMAState
from bma_optax.newton._quadratic_model import ScaleByQuadraticModelState
from bma_optax.partitions import _units

_MOST_PAIRS = 10


class Options(NamedTuple):
    """What a transformation was made with and its state does not say."""

    estimator: str


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


def misfit(blocks, grads, state, options) -> str:
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
        systems = _coarse_systems.systems(blocks)
        known = plain(state)
        if _two_level.shapes(systems) != (known.N.shape, known.K.shape):
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


def _of_adagrad(state, blocks, grads, options):
    numbers = _of_roots(blocks, state.U, state.v, state.inverse_root, options)
    if grads is not None:
        g = _tree.astype(grads, state.sum_of_squares)
        r = _over_root(g, state.sum_of_squares)
        numbers |= _of_root_update(blocks, state.inverse_root, g, r)
    return numbers


def _of_adam(state, blocks, grads, options):
    del grads  # The momentum is what is scaled.
    numbers = _of_roots(blocks, state.U, state.v, state.inverse_root, options)
    m = _tree.astype(state.mu, state.nu)
    r = _over_root(m, state.nu)
    return numbers | _of_root_update(blocks, state.inverse_root, m, r)


def _of_mini(state, blocks, grads, options):
    del grads, options
    ratios = [jnp.zeros(0, _tree.common_statistic_dtype(state.nu))]

    def look(units, mu, nu, mean_nu, direction):
        mu = mu.astype(nu.dtype)
        if units is None:
            r = _moments.over_root(mu, nu, 0.0)
            return _Updates(mu, r, r)
        m = units.split(mu)
        constant = direction.size == 1
        q = units.constant(m) if constant else units.direction(direction)
        Lambda = _mini.rest(nu, mean_nu, units.num_inputs)
        known = nu > 0
        ratio = jnp.where(known, mean_nu, 1) / jnp.where(known, Lambda, 1)
        ratios.append(ratio.reshape(-1).astype(ratios[0].dtype))
        r = _moments.over_root(m, Lambda, 0.0)
        along = _mini.shrink(mean_nu, Lambda) - 1
        update = r + along * units.times(r, q) * q
        return _Updates(mu, units.join(r, mu), units.join(update, mu))

    trees = _units.map_arrays(_Updates, look, blocks.arrays, *state[1:])
    numbers = _of_updates(blocks, *trees)
    every = jnp.concatenate(ratios)
    if not every.size:
        return numbers
    return numbers | {
        "min_eigenvalue": jnp.min(every),
        "max_eigenvalue": jnp.max(every),
        "floored_share": jnp.mean(every < 1),
    }


def _of_newton(state, blocks, grads, options):
    systems = _coarse_systems.systems(blocks)
    numbers = {}
    if all(isinstance(system, _coarse_systems.Dense) for system in systems):
        z2 = _two_level.diagonal_of(
            blocks, state.inverse_diagonal, state.Lambda, state.damping
        )
        n = jnp.sqrt(blocks.block_sums(z2))
        outer = blocks.split_matrix(blocks.outer(n))
        N = blocks.split_matrix(state.N)
        M = [x / y for x, y in zip(N, outer, strict=True)]
        numbers = _of_matrices(blocks, M)
        if blocks.num_blocks:
            numbers["floored_share"] = state.floored / blocks.num_blocks
    if grads is not None:
        D, K = state.inverse_diagonal, state.K
        g = _tree.astype(grads, D)
        r = jax.tree.map(jnp.multiply, D, g)
        update = _two_level.apply(systems, blocks, D, K, g)
        numbers |= _of_updates(blocks, g, r, update)
    return numbers


class _Updates(NamedTuple):
    """Trees: what is scaled, by the diagonal method, and by the transformation."""

    given: Any
    diagonal: Any
    full: Any


def _of_roots(blocks, U, v, inverse_root, options):
    """From the statistics as they are now, and the root in use."""
    M = [
        _inverse_root.small_matrix(*parts, options.estimator)
        for parts in zip(
            blocks.split_matrix(U), blocks.split(v), blocks.split_sizes(), strict=True
        )
    ]
    numbers = _of_matrices(blocks, M)
    if M:
        raised = jnp.zeros((), jnp.int32)
        for matrix, root in zip(M, blocks.split_matrix(inverse_root), strict=True):
            # The least eigenvalue that is in use; the floor, where it did something.
            least = jnp.linalg.eigvalsh(root)[:, -1:] ** -2
            below = jnp.linalg.eigvalsh(matrix) < 0.999 * least
            raised = raised + jnp.sum(below, dtype=jnp.int32)
        numbers["floored_share"] = raised / blocks.num_blocks
    return numbers


def _of_matrices(blocks, matrices):
    """The extreme eigenvalues, and the strongest pairs."""
    if not matrices:
        return {}
    values = jnp.concatenate([jnp.linalg.eigvalsh(M).reshape(-1) for M in matrices])
    found, pairs, start = [], [], 0
    for M, (count, n) in zip(matrices, blocks.buckets, strict=True):
        diagonal = jnp.abs(jnp.diagonal(M, axis1=1, axis2=2))
        root = jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1))
        correlation = M / root[:, :, None] / root[:, None, :]
        i, j = np.triu_indices(n, 1)
        group = start + n * np.arange(count)[:, None]
        found.append(correlation[:, i, j].reshape(-1))
        every = np.stack([group + i, group + j], axis=-1)
        pairs.append(every.reshape(-1, 2))
        start += count * n
    correlations, both = jnp.concatenate(found), jnp.asarray(np.concatenate(pairs))
    most = min(_MOST_PAIRS, len(correlations))
    _, best = jax.lax.top_k(jnp.abs(correlations), most)
    return {
        "min_eigenvalue": jnp.min(values),
        "max_eigenvalue": jnp.max(values),
        "correlations": correlations[best],
        "correlated_pairs": both[best],
    }


def _over_root(tree, h):
    return jax.tree.map(lambda x, h: _moments.over_root(x, h, 0.0), tree, h)


def _of_root_update(blocks, inverse_root, given, r):
    sums = blocks.block_sums(r)
    shift = blocks.expand(_inverse_root.correction(blocks, inverse_root, sums), r)
    return _of_updates(blocks, given, r, jax.tree.map(jnp.add, r, shift))


def _of_updates(blocks, given, diagonal, full):
    """Norms: of the difference over that of the diagonal method; of each block."""

    def squares(tree):
        return jax.tree.map(jnp.square, tree)

    def root_ratio(above, below):
        usable = below > 0
        return jnp.sqrt(jnp.where(usable, above, 0) / jnp.where(usable, below, 1))

    change = jax.tree.map(jnp.subtract, full, diagonal)
    return {
        "correction": root_ratio(
            _tree.vdot(change, change), _tree.vdot(diagonal, diagonal)
        ),
        "effective_rates": root_ratio(
            blocks.block_sums(squares(full)), blocks.block_sums(squares(given))
        ),
    }


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_NEWTON = "count coarse_ratio products damping floored local refreshes failures"
_STEP = _same("learning_rate", "momentum", "backtracking")
# For each kind of state: the names of its scalars, and a look at the rest.
KINDS: dict[type, tuple[dict[str, str], Any]] = {
    ScaleByBMAState: (_same("count", "failures"), _of_adagrad),
    ScaleByAdamBMAState: (_same("count", "failures"), _of_adam),
    ScaleByMiniBMAState: (_same("count"), _of_mini),
    ScaleByNewtonBMAState: (_same(*_NEWTON.split()), _of_newton),
    ScaleByQuadraticModelState: (_STEP | {"step_products": "products"}, None),
}
