"""The coarse systems of Newton-BMA: blocks that see each other, and N on them.

Each gathers its part of N = 1ᵀ G 1 by products, and turns it into a factor with which
K r = (N^-1 - (Λ n²)^-1) r costs little: dense, or nested where G has a reach.
"""

import dataclasses
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _control_flow
from bma_optax.algebra import _symmetric_power
from bma_optax.algebra._expansions import diagonal_matrix
from bma_optax.multilevel._hierarchy import Levels
from bma_optax.multilevel._stencil import Stencil
from bma_optax.partitions._blocks import Partition
from bma_optax.partitions._grids import Grid
from bma_optax.partitions._systems import GridFields

# F has a unit diagonal: Λ, a mean of its eigenvalues, is far above this but for noise.
_MIN_LAMBDA = 1e-3


Spans = tuple[tuple[int, int], ...]  # positions of consecutive blocks


class Factor(NamedTuple):
    """What the inverse needs of one system."""

    K: jax.Array  # flat.
    inverse_Lambda: jax.Array  # damped, one a block.
    Lambda: jax.Array  # undamped.
    smallest: jax.Array  # (): the least eigenvalue of M.
    floored: jax.Array  # (), int32.


@dataclasses.dataclass(frozen=True)
class Dense:
    """Groups of equally many blocks, a dense matrix each."""

    spans: Spans
    count: int
    n: int
    sizes: tuple[tuple[int, ...], ...]

    @property
    def N_size(self) -> int:
        """The length of N."""
        return self.count * self.n**2

    K_size = N_size

    @_control_flow.compiled
    def invert(self, N, n2, damping, floor, rounding) -> Factor:
        """K by the absolute eigenvalues of the damped M."""
        shape = (self.count, self.n, self.n)
        n2 = n2.reshape(shape[:2])
        root = jnp.sqrt(n2)
        outer = root[:, :, None] * root[:, None, :]
        M = N.reshape(shape) / outer
        s = np.asarray(self.sizes).astype(n2.dtype)
        Lambda = _lambda(s, jnp.diagonal(M, axis1=1, axis2=2))
        inverse_Lambda = 1 / jnp.maximum(Lambda + damping, floor)
        eye = jnp.broadcast_to(jnp.eye(self.n, dtype=M.dtype), shape)
        relative = _symmetric_power.resolution(self.n, M.dtype)
        inverse = _symmetric_power.matrix_power(
            M + damping * eye, -1, floor, relative, absolute=True, null=rounding
        )
        eigenvalues = jnp.linalg.eigvalsh(jax.lax.stop_gradient(M))
        return Factor(
            ((inverse - diagonal_matrix(inverse_Lambda)) / outer).reshape(-1),
            inverse_Lambda.reshape(-1),
            Lambda.reshape(-1),
            *_look(eigenvalues, damping, floor, rounding),
        )

    @_control_flow.compiled
    def correct(self, K, r):
        """K r."""
        y = jnp.einsum(
            "gij,gj->gi",
            K.reshape(self.count, self.n, self.n),
            r.reshape(self.count, self.n),
            precision=jax.lax.Precision.HIGHEST,
        )
        return y.reshape(-1)


@dataclasses.dataclass(frozen=True)
class Nested:
    """Arrays on one grid of tiles, whose curvature has a reach."""

    spans: Spans
    arrays: tuple[int, ...]
    sizes: tuple[int, ...]
    elements: Stencil  # its cells are the elements.
    tiles: Stencil  # its cells are the blocks.
    levels: Levels

    @property
    def N_size(self) -> int:
        """The length of N."""
        return math.prod(self.tiles.shape)

    @property
    def K_size(self) -> int:
        """The length of K."""
        return self.tiles.num_cells + self.levels.packed_size

    @property
    def num_products(self) -> int:
        """The products that N costs, but for the check of the reach."""
        return self.tiles.fields * math.prod(self.tiles.width)

    @_control_flow.compiled
    def invert(self, N, n2, damping, floor, rounding) -> Factor:
        """The nested levels of the damped N; eigenvalues are those of the last one."""
        shape = (self.tiles.fields, *self.tiles.grid)
        n2 = n2.reshape(shape)
        S = N.reshape(self.tiles.shape)
        s = np.asarray(self.sizes).reshape(shape).astype(n2.dtype)
        Lambda = _lambda(s, self.tiles.diagonal(S) / n2)
        damped = self.tiles.add_diagonal(S, damping * n2)
        # A block without any curvature has no part in the metric of coarser levels.
        metric = jnp.where(self.tiles.diagonal(S) == 0, 0, n2)
        packed, eigenvalues = self.levels.pack(damped, metric, floor, rounding)
        damped_Lambda = jnp.maximum(Lambda + damping, floor)
        smoother = damped_Lambda * n2
        return Factor(
            jnp.concatenate([smoother.reshape(-1), packed]),
            (1 / damped_Lambda).reshape(-1),
            Lambda.reshape(-1),
            *_look(eigenvalues - damping, damping, floor, rounding),
        )

    @_control_flow.compiled
    def correct(self, K, r):
        """K r; 0 where an indefinite matrix would have made it an ascent direction.

        rᵀ(N^-1 - (Λn²)^-1)r + gᵀ(Λ̄z²)^-1g is at least rᵀN^-1r for the block sums r of
        g, by Cauchy and Schwarz.
        """
        shape = (self.tiles.fields, *self.tiles.grid)
        split = self.tiles.num_cells
        smoother = K[:split].reshape(shape)
        r = r.reshape(shape)
        x = self.levels.solve(K[split:], r)
        used = (jnp.sum(r * x) >= 0) & (smoother > 0)  # K is 0 for another reach.
        # x - r / smoother, to end in a division: XLA would compute anything cheaper,
        # and the block sums r with it, again for each element of a block.
        x = jnp.where(used, smoother * x - r, 0) / jnp.where(used, smoother, 1)
        return x.reshape(-1)


System = Dense | Nested


def systems(blocks: Partition) -> tuple[System, ...]:
    """The coarse systems of a partition."""
    return tuple(
        _nested(system)
        if isinstance(system, GridFields)
        else Dense(system.spans, system.count, system.n, system.sizes)
        for system in blocks.systems
    )


def _nested(fields: GridFields) -> Nested:
    levels, bottom = fields.levels
    return Nested(
        fields.spans,
        fields.positions,
        tuple(fields.sizes.ravel().tolist()),
        _stencil(fields.elements),
        _stencil(fields.tiles),
        Levels(
            tuple((_stencil(grid), tile) for grid, tile in levels), _stencil(bottom)
        ),
    )


def _stencil(grid: Grid) -> Stencil:
    return Stencil(grid.fields, grid.grid, grid.reach)


def take(system: System, values):
    """The part of a vector over all blocks that belongs to a system."""
    parts = [values[a:b] for a, b in system.spans]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def assemble(systems, parts, like):
    """The inverse of ``take`` for all systems."""
    pieces = {}
    for system, part in zip(systems, parts, strict=True):
        offset = 0
        for a, b in system.spans:
            pieces[a] = part[offset : offset + b - a]
            offset += b - a
    ordered = [pieces[a] for a in sorted(pieces)]
    if not ordered:
        return jnp.zeros_like(like)
    return ordered[0] if len(ordered) == 1 else jnp.concatenate(ordered)


def split(systems, packed, size):
    """The part of each system of a vector that holds them one after the other."""
    bounds = itertools.accumulate((size(system) for system in systems), initial=0)
    flat = packed.reshape(-1)
    return [flat[a:b] for a, b in itertools.pairwise(bounds)]


def _lambda(s, M_diagonal):
    Lambda = (s - M_diagonal) / np.maximum(s - 1, 1)
    return jnp.where(s == 1, 1, jnp.maximum(Lambda, _MIN_LAMBDA))


def _look(eigenvalues, damping, floor, null):
    """The least eigenvalue of M that is not null, and how many were replaced."""
    largest = jnp.max(jnp.abs(eigenvalues), axis=-1, keepdims=True, initial=0)
    resolution = _symmetric_power.resolution(eigenvalues.shape[-1], eigenvalues.dtype)
    null = jnp.maximum(resolution * largest, null)
    known = jnp.where(jnp.abs(eigenvalues) > null, eigenvalues, jnp.inf)
    floored = eigenvalues + damping < jnp.maximum(floor, null)
    return jnp.min(known, initial=jnp.inf), jnp.sum(floored, dtype=jnp.int32)
