"""All coarse systems of a partition, and block sums with a part for each of them.

The operators E and Eᵀ of the mathematics, on trees like the parameters: numbers of
blocks are lists with a part for each system, in the system's own layout. That of a grid
is an array by cell, sharded as the arrays of the grid are; a flat vector of all blocks
would have to be gathered.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _sharding, _tree
from bma_optax.multilevel._dense import Dense, dense_system
from bma_optax.multilevel._nested import Nested, nested_systems
from bma_optax.partitions._blocks import Partition


@dataclasses.dataclass(frozen=True)
class CoarseSystems:
    """The coarse systems of one partition; static."""

    blocks: Partition

    @functools.cached_property
    def systems(self) -> tuple[Dense | Nested, ...]:
        """The coarse systems, in the order of their blocks."""
        return *dense_system(self.blocks), *nested_systems(self.blocks)

    @property
    def sizes(self) -> list[np.ndarray]:
        """The number of elements of each block, a part for each system."""
        return [system.sizes for system in self.systems]

    def block_sums(self, tree) -> list[jax.Array]:
        """Sums over the elements of each block, a part for each system."""
        leaves = jax.tree.leaves(tree)
        dtype = _tree.common_statistic_dtype(leaves)
        return [system.sums(leaves).astype(dtype) for system in self.systems]

    def expand(self, parts, like, default=0) -> Any:
        """Each block filled with its value: a tree like ``like``.

        Args:
          parts: the values of the blocks, a part for each system.
          like: a tree whose structure, shapes and dtypes the result takes.
          default: a number for arrays without blocks.
        """
        leaves = jax.tree.leaves(like)
        pairs = zip(self.systems, parts, strict=True)
        return self._joined([s.fill(x, leaves) for s, x in pairs], like, default)

    def restrict(self, tree) -> list[jax.Array]:
        """φᵀ times a tree, φ the columns of all blocks: block sums without slopes."""
        leaves = jax.tree.leaves(tree)
        dtype = _tree.common_statistic_dtype(leaves)
        return [system.restrict(leaves).astype(dtype) for system in self.systems]

    def prolong(self, parts, like) -> Any:
        """φ times vectors, a part for each system: a tree like ``like``."""
        leaves = jax.tree.leaves(like)
        pairs = zip(self.systems, parts, strict=True)
        return self._joined([s.prolong(x, leaves) for s, x in pairs], like, 0)

    def metric(self, z2) -> list[jax.Array]:
        """φᵀ Z² φ within each block, for a tree z²; block sums without slopes."""
        leaves = jax.tree.leaves(z2)
        dtype = _tree.common_statistic_dtype(leaves)
        return [system.metric(leaves).astype(dtype) for system in self.systems]

    def _joined(self, parts, like, default) -> Any:
        """The arrays of all systems, by position, as a tree like ``like``."""
        leaves, treedef = jax.tree.flatten(like)
        filled: dict[int, jax.Array] = {}
        for part in parts:
            filled |= part
        return jax.tree.unflatten(
            treedef,
            [
                filled[i] if i in filled else jnp.full(x.shape, default, x.dtype)
                for i, x in enumerate(leaves)
            ],
        )

    def replicate(self, K) -> Any:
        """K with its small matrices on all devices, where :meth:`initial` has them."""
        if not self.systems:
            return K
        pairs = zip(self.systems, K, strict=True)
        return tuple(system.replicate(part) for system, part in pairs)

    def like(self, dtype) -> tuple[Any, Any, Any]:
        """The shapes of N, K and Λ: a tuple of each, with a part for each system.

        Without systems, each is one empty array. Optax's placeholder for the parameters
        has no arrays, and its state must be a prefix of the states of other parameters.
        """
        if not self.systems:
            return (jax.ShapeDtypeStruct((0,), dtype),) * 3
        parts = [system.like(dtype) for system in self.systems]
        N, K, Lambda = zip(*parts, strict=True)
        return N, K, Lambda

    def shardings(self, params) -> tuple[Any, Any, Any]:
        """The shardings of N, K and Λ, see :meth:`like`, over explicit axes."""
        leaves = jax.tree.leaves(params)
        if not self.systems:
            return _sharding.replicated(self.like(jnp.float32), leaves)
        parts = [system.shardings(leaves) for system in self.systems]
        N, K, Lambda = zip(*parts, strict=True)
        return N, K, Lambda

    def check_state(self, *state) -> None:
        """Raises a ValueError if N, K and Λ belong to another partition."""
        found, expected = self._shapes(state)
        self.blocks.check_state(*found, expected=expected)

    def fits(self, *state) -> bool:
        """Whether N, K and Λ have the shapes that this partition makes."""
        found, expected = self._shapes(state)
        return found == expected

    def _shapes(self, state):
        """The shapes of the arrays in N, K and Λ, and those of :meth:`like`."""
        return (
            tuple(x.shape for x in jax.tree.leaves(tree))
            for tree in (state, self.like(jnp.float32))
        )
