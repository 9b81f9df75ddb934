"""The inverse of a block mean of curvature, Lu et al. 2018, eq. 3, from products.

With z² = |diag G| and F = Z^-1 G Z^-1, column i of E is z on block i, normalised. Z^-1
E then represents constants: it is the indicator of each block over ‖z‖ there. So

    M = Eᵀ F E = N / (n nᵀ),   n_i² = Σ_block z²,   Λ_i = (s_i - M_ii) / (s_i - 1),
    C = Z^-1 [Λ̄^-1 (I - E Eᵀ) + E M^-1 Eᵀ] Z^-1 = (Λ̄ z²)^-1 + 1 K 1ᵀ

with the indicators 1 of L blocks, N = 1ᵀ G 1 and K = (M^-1 - Λ^-1) / (n nᵀ), L x L. The
first term of C is a diagonal smoother on trees like the parameters, the second a coarse
correction of block sums.
"""

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bma_optax import _control_flow, _random, _sharding, _tree, _warnings
from bma_optax.curvature import _diagonal
from bma_optax.curvature._probing import LinearOperator, Probed
from bma_optax.multilevel import _coarse_system, _local_entries
from bma_optax.multilevel._smoother import positive
from bma_optax.multilevel._systems import CoarseSystems
from bma_optax.partitions import _build, _sizes
from bma_optax.partitions._rules import Rule


class Gathered(NamedTuple):
    """The measurements of a curvature G that a refresh makes."""

    N: Any  # a part for each system, see TwoLevel.like.
    diagonal: Any  # like params: |diag G|.
    rounding: tuple[jax.Array, ...]  # rounding of M, one a system, shape ().
    local: jax.Array  # shape (), bool: whether G reaches no further than declared.
    products: jax.Array  # shape (), int32.


class Factor(NamedTuple):
    """C = diag(inverse_diagonal) + 1 K 1ᵀ, and what it shows of the curvature."""

    inverse_diagonal: Any  # like params: 1 / (Λ̄ z²), with the damped Λ.
    Lambda: Any  # Λ + damping: a part for each system, see TwoLevel.like.
    K: Any  # a part for each system.
    coarse_ratio: jax.Array  # shape (): min eig(M) / median(Λ), both undamped.
    floored: jax.Array  # shape (), int32: eigenvalues of M negative or below the floor.


@dataclasses.dataclass(frozen=True)
class TwoLevel(CoarseSystems):
    """The two-level method on one partition; static.

    N, K and Λ are arrays beside it, in a state; :meth:`like` tells their shapes.
    """

    def initial(self, params) -> tuple[Any, Factor]:
        """N = 0, and the factor of C = I without damping."""
        zeros = _tree.zeros_like(params, _tree.statistic_dtype)
        return _sharding.automatic(
            self._initial, zeros, out=lambda: self._shardings(zeros)
        )

    @_control_flow.compiled
    def _initial(self, zeros) -> tuple[Any, Factor]:
        """Does what :meth:`initial` does, from zeros like the parameters.

        Everything is made of them as a refresh makes it of the parameters, so that it
        lies where a refresh leaves it.
        """
        # XLA makes what comes from constants anew at each use, and shards it in its own
        # way. A barrier hides that these are constants.
        zeros = jax.lax.optimization_barrier(zeros)
        zero = _tree.vdot(zeros, zeros)
        ones = jax.tree.map(lambda x: x + 1, zeros)
        sums = zip(self.systems, self.block_sums(zeros), strict=True)
        parts = [system.initial(x) for system, x in sums]
        empty = zero + jnp.zeros(0, zero.dtype)
        N, K, Lambda = zip(*parts, strict=True) if parts else (empty, empty, empty)
        return N, Factor(ones, Lambda, K, zero + 1, zero.astype(jnp.int32))

    def gather(
        self, curvature, G: LinearOperator, key, extra_args, known_far=False
    ) -> Gathered:
        """Gathers N and |diag G| by products with G, and checks a declared reach.

        If the reach is too small, this raises an error; if traced, it warns, unless
        that was known before. The diagonal then comes from probes that need no reach.

        Args:
          curvature: the :class:`Curvature`, which may know its diagonal. It bounds the
            number of products for the diagonal otherwise.
          G: the curvature at the parameters.
          key: the numbers of a random key for the probes, uint32 of shape (2,).
          extra_args: arguments for the functions of the curvature.
          known_far: whether an earlier check has found the reach too small.
        """
        given = _diagonal.given(curvature, G.params, extra_args)
        product = _sharding.explicit(G.product, G.params)

        def gather(params, given, key, known_far):
            G = LinearOperator(product, params)
            return self._gather(curvature, G, given, key, known_far)

        def shardings():
            N, factor = self._shardings(G.params)
            one = factor.coarse_ratio
            rounding = (one,) * len(self.systems)
            return Gathered(N, factor.inverse_diagonal, rounding, one, one)

        arrays = G.params, given, key, jnp.asarray(known_far)
        return _sharding.automatic(gather, *arrays, out=shardings)

    def _gather(self, curvature, G, given, key, known_far) -> Gathered:
        """Gathers as :meth:`gather` does, with the diagonal that is given, or None."""
        key_diagonal, key_rounding = (
            _random.fold(key, len(self.systems) + i) for i in (0, 1)
        )
        dtype = _tree.common_statistic_dtype(G.params)
        # Systems that do not give the diagonal are measured when it is known.
        early = {
            number: system.measure(G, _random.fold(key, number), given is None)
            for number, system in enumerate(self.systems)
            if system.has_diagonal
        }
        if given is None:
            diagonal, products = _whole_diagonal(
                curvature, G, early.values(), key_diagonal
            )
        else:
            diagonal, products = given, jnp.int32(0)
        products = sum((x.products for x in early.values()), start=products)
        checks = [x.check for x in early.values() if x.check is not None]
        local = jnp.asarray(True)
        if checks:
            check = _local_entries.worst(checks)
            local = check.error <= check.tolerance
            # If N is not finite, the curvature has failed, not its reach.
            known = _tree.all_finite([x.N for x in early.values()])
            reaches_far = ~local & known & ~known_far
            _warnings.raise_or_warn(reaches_far, _local_entries.reaches_far, *check)
            if given is None:

                def without_a_reach():
                    """The diagonal by probes alone, and all products so far."""
                    every = [True] * len(jax.tree.leaves(G.params))
                    found, more = _diagonal.probed(curvature, G, every, key_diagonal)
                    return found, products + more

                with jax.named_scope("more_probes"):
                    diagonal, products = _control_flow.cond(
                        local, lambda: (diagonal, products), without_a_reach
                    )
        diagonal = jax.tree.map(jnp.abs, diagonal)
        metrics = self.metric(positive(self, diagonal))
        parts, rounding = [], []
        for number, system in enumerate(self.systems):
            metric, part = metrics[number], early.get(number)
            if part is None:
                part = system.measure(G, key_rounding, False, metric)
                products = products + part.products
            parts.append(part)
            rounding.append(system.rounding(G, part, metric, key_rounding))
        return Gathered(
            tuple(_cast(x.N, dtype) for x in parts) or jnp.zeros(0, dtype),
            diagonal,
            tuple(x.value for x in rounding),
            local,
            sum((x.products for x in rounding), start=products),
        )

    def invert(self, found: Gathered, damping, min_eigenvalue) -> Factor:
        """Inverts the block mean of G + damping Z²; the inverse is positive definite.

        The absolute eigenvalues of M + damping I replace its eigenvalues. They are at
        least ``min_eigenvalue`` and ``damping``. Along directions where they are no
        larger than rounding, C has its diagonal part alone. If G reaches further than
        declared, C is its diagonal part everywhere.
        """
        return _sharding.automatic(
            self._invert,
            *(found, jnp.asarray(damping), jnp.asarray(min_eigenvalue)),
            out=lambda: self._shardings(found.diagonal)[1],
        )

    def _invert(self, found, damping, min_eigenvalue) -> Factor:
        z2 = positive(self, found.diagonal)
        dtype = _tree.common_statistic_dtype(z2)
        damping = damping.astype(dtype)
        floor = jnp.maximum(min_eigenvalue.astype(dtype), damping)
        of_systems = zip(
            self.systems, found.N, self.metric(z2), found.rounding, strict=True
        )
        parts = [
            system.invert(N, metric, damping, floor, rounding)
            for system, N, metric, rounding in of_systems
        ]
        if not parts:
            factor = self._initial(z2)[1]
            Lambda, K, ratio, floored = factor[1:]
        else:
            Lambda = tuple(
                jnp.where(
                    found.local, jnp.maximum(part.Lambda + damping, floor), 1 + damping
                )
                for part in parts
            )
            K = tuple(part.K for part in parts)
            K = jax.tree.map(lambda x: jnp.where(found.local, x, 0), K)
            smallest = jnp.min(jnp.stack([part.smallest for part in parts]))
            samples = [_coarse_system.sample(part.Lambda) for part in parts]
            # If every direction is null, there is nothing to correct.
            ratio = smallest / _coarse_system.median(jnp.concatenate(samples))
            ratio = jnp.where(jnp.isinf(smallest), 1, ratio)
            floored = sum(part.floored for part in parts)
        inverse_diagonal = jax.tree.map(
            jnp.divide, self._smoother(Lambda, z2, damping), z2
        )
        return Factor(inverse_diagonal, Lambda, K, ratio, floored)

    def apply(self, inverse_diagonal, N, K, g):
        """C g for a tree g like the parameters, in the dtypes of statistics."""
        g = _tree.astype(g, inverse_diagonal)
        arrays = inverse_diagonal, N, K, g
        return _sharding.automatic(
            self._apply, *arrays, out=lambda: _sharding.of(inverse_diagonal)
        )

    def _apply(self, inverse_diagonal, N, K, g):
        # Without systems N and K are empty arrays.
        parts = zip(self.systems, N, K, self.restrict(g), strict=False)
        shift = self.prolong([system.correct(*part) for system, *part in parts], g)
        return jax.tree.map(lambda d, g, c: d * g + c, inverse_diagonal, g, shift)

    def diagonal(self, inverse_diagonal, Lambda, damping):
        """z², recovered from the factor that was computed from it."""

        def divide(inverse_diagonal, Lambda, damping):
            scale = self._smoother(Lambda, inverse_diagonal, damping)
            return jax.tree.map(jnp.divide, scale, inverse_diagonal)

        arrays = inverse_diagonal, Lambda, jnp.asarray(damping)
        return _sharding.automatic(
            divide, *arrays, out=lambda: _sharding.of(inverse_diagonal)
        )

    def _shardings(self, params) -> tuple[Any, Factor]:
        """The shardings of what :meth:`initial` returns, over explicit axes."""
        N, K, Lambda = self.shardings(params)
        one = _sharding.replicated(jax.ShapeDtypeStruct((), bool), params)
        return N, Factor(_sharding.of(params), Lambda, K, one, one)

    def _smoother(self, Lambda, like, damping):
        """Λ̄^-1, a tree like ``like``."""
        parts = [1 / x for _, x in zip(self.systems, Lambda, strict=False)]
        return self.expand(parts, like, default=1 / (1 + damping))

    def small_matrices(self, N, z2) -> list[jax.Array]:
        """M of each bucket of dense groups, shape (groups, blocks, blocks)."""
        parts = zip(self.systems, N, self.metric(z2), strict=False)
        matrices = [system.small_matrices(*part) for system, *part in parts]
        return list(itertools.chain(*matrices))


def two_level(params, rule: Rule) -> TwoLevel:
    """The two-level method of a rule on these parameters, for use in ``update``."""
    return TwoLevel(_build.layout(params, rule))


def checked_two_level(params, rule: Rule) -> TwoLevel:
    """The two-level method of a rule on these parameters, for use in ``init``.

    Raises an error for matrices that are too large, and warns of guesses and of shards
    that are not whole tiles.
    """
    blocks = _build.partition(params, rule)
    _sizes.warn_of_shards(blocks, params)
    return TwoLevel(blocks)


def _whole_diagonal(curvature, G, parts, key) -> Probed:
    """diag G: from what the systems have measured, and probed where they have not."""
    zeros = _tree.zeros_like(G.params, _tree.statistic_dtype)
    leaves, treedef = jax.tree.flatten(zeros)
    rest, products = [True] * len(leaves), jnp.int32(0)
    for part in parts:
        for position, values in part.diagonal.items():
            zero, rest[position] = leaves[position], False
            leaves[position] = zero + values.astype(zero.dtype)
    if any(x.size for x, on in zip(leaves, rest, strict=True) if on):
        probed, products = _diagonal.probed(curvature, G, rest, key)
        added = zip(leaves, jax.tree.leaves(probed), strict=True)
        leaves = [x + y for x, y in added]
    return Probed(jax.tree.unflatten(treedef, leaves), products)


def _cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)
