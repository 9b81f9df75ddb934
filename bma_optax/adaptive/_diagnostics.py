"""Numbers for a logger, from the states of methods of running sums.

Each ``of_...`` function computes them from a state: the extreme eigenvalues and the
correlations of M, and the norms of the update over those of the diagonal method. The
state comes with bare arrays, and with trees as lists of their leaves. ``blocks`` is the
partition, ``grads`` such a list or None. Numbers have shape (), but ``correlations``
(k,), ``correlated_pairs`` (k, 2) and ``effective_rates`` (L,). ``of_matrices`` and
``of_updates`` serve the other methods too.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _tree
from bma_optax.adaptive import _columns, _direction, _inverse_root, _mini, _moments
from bma_optax.algebra import _eigh
from bma_optax.partitions import _units

_MOST_PAIRS = 10


def of_adagrad(state, blocks, grads, estimator):
    """Numbers of a :class:`ScaleByBMAState`."""
    numbers = _of_roots(blocks, state, estimator)
    if grads is not None:
        g = _tree.astype(grads, state.sum_of_squares)
        r = _over_root(g, state.sum_of_squares)
        numbers |= _of_root_update(blocks, state, g, r)
    return numbers


def of_adam(state, blocks, grads, estimator):
    """Numbers of a :class:`ScaleByAdamBMAState`."""
    del grads  # The transformation scales the momentum in the state.
    numbers = _of_roots(blocks, state, estimator)
    m = _tree.astype(state.mu, state.nu)
    r = _over_root(m, state.nu)
    return numbers | _of_root_update(blocks, state, m, r)


def of_mini(state, blocks, grads, estimator):
    """Numbers of a :class:`ScaleByMiniBMAState`: M_i = U_i / Λ_i are eigenvalues."""
    del grads, estimator
    ratios = [jnp.zeros(0, _tree.common_statistic_dtype(state.nu))]

    def look(units, mu, nu, input_nu, mean_nu, direction):
        """Momentum, diagonal update and full update of one array."""
        mu = mu.astype(nu.dtype)
        if units is None:
            r = _moments.over_root(mu, nu, 0.0)
            return Updates(mu, r, r)
        m = units.split(mu)
        q = units.direction(direction)
        share, Lambda = _mini.second_moment(units, nu, input_nu, q)
        known = nu > 0
        ratio = jnp.where(known, mean_nu, 1) / jnp.where(known, Lambda, 1)
        ratios.append(ratio.reshape(-1).astype(ratios[0].dtype))
        r = _moments.over_root(m / share, nu, 0.0)
        along = _direction.shrink(mean_nu, Lambda) - 1
        update = r + along * units.times(r, q) * q
        return Updates(mu, units.join(r, mu), units.join(update, mu))

    trees = _units.map_arrays(Updates, look, blocks.arrays, *state[1:])
    numbers = of_updates(blocks, *trees)
    every = jnp.concatenate(ratios)
    if not every.size:
        return numbers
    return numbers | {
        "min_eigenvalue": jnp.min(every),
        "max_eigenvalue": jnp.max(every),
        "floored_share": jnp.mean(every < 1),
    }


class Updates(NamedTuple):
    """Trees: what is scaled, the diagonal method's update, and the full update."""

    given: Any
    diagonal: Any
    full: Any


def _of_roots(blocks, state, estimator):
    """Numbers of M, built from the statistics, and of the inverse root in use.

    In the state ``U`` and ``inverse_root`` hold the groups' matrices, ``v`` has shape
    (L,).
    """
    U, v, inverse_root = state.U, state.v, state.inverse_root
    if state.direction is not None:
        estimator = "projection"  # Learned weights have no other estimator.
    M = [
        _inverse_root.small_matrix(*parts)
        for parts in zip(
            blocks.split_matrix(U),
            blocks.split(v),
            blocks.split_sizes(),
            _inverse_root.by_bucket(estimator, blocks),
            strict=True,
        )
    ]
    numbers = of_matrices(blocks, M)
    if M:
        raised = jnp.zeros((), jnp.int32)
        for matrix, root in zip(M, blocks.split_matrix(inverse_root), strict=True):
            # The largest eigenvalue of M^-½ gives the least one of M in use: the floor,
            # where it replaced smaller ones.
            least = _eigh.eigenvalues(root)[:, -1:] ** -2
            below = _eigh.eigenvalues(matrix) < 0.999 * least
            raised = raised + jnp.sum(below, dtype=jnp.int32)
        numbers["floored_share"] = raised / blocks.num_blocks
    return numbers


def of_matrices(blocks, matrices):
    """The extreme eigenvalues of M, and its entries of largest correlation.

    Args:
      blocks: the partition.
      matrices: M of each bucket of ``blocks.buckets``, shape (groups, n, n).
    """
    if not matrices:
        return {}
    values = jnp.concatenate([_eigh.eigenvalues(M).reshape(-1) for M in matrices])
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
    """Each x / √h, and 0 where h is 0, for trees of one structure."""
    return jax.tree.map(lambda x, h: _moments.over_root(x, h, 0.0), tree, h)


def _of_root_update(blocks, state, given, r):
    """Numbers of the update r + E (M^-½ - I) Eᵀ r; given and r are trees.

    Learned weights are those of the next step.
    """
    columns = _columns.Columns(blocks, state.direction)
    along = _inverse_root.correction(blocks, state.inverse_root, columns.sums(r))
    shift = columns.expand(along, r)
    return of_updates(blocks, given, r, jax.tree.map(jnp.add, r, shift))


def of_updates(blocks, given, diagonal, full):
    """Norms of an update, for trees like the parameters.

    Returns ``correction``, the norm of full - diagonal over the norm of diagonal, and
    ``effective_rates``, the norm of full over the norm of given in each block.
    """

    def squares(tree):
        return jax.tree.map(jnp.square, tree)

    def root_ratio(above, below):
        """√(above / below), and 0 where below is 0."""
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
