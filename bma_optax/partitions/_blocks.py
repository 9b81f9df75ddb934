"""The partition of a parameter pytree into blocks, and its operators E and Eᵀ.

E has a column for each of the L blocks, and Λ̄ + E (M - Λ) Eᵀ is the block mean matrix
of Lu et al. 2018, eq. (2). ``block_sums`` takes a pytree of d numbers to (L,), and
``expand`` takes (L,) back to a pytree: no array of d × L numbers exists. Vectors over
blocks are split into groups of blocks that see each other; groups of equally many
blocks lie side by side, in a *bucket*, so that one batched ``eigh`` serves them all.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _sharding, _tree, _xla
from bma_optax.partitions import _table
from bma_optax.partitions._rules import Rule, Shape
from bma_optax.partitions._systems import GridFields
from bma_optax.partitions._tiles import Tiles

_FEW_ARRAYS = 8  # Too few for compilation to take long.


@dataclasses.dataclass(frozen=True)
class Partition:
    """The blocks of a parameter pytree: a static, hashable, printable value.

    Made by :func:`partition`. It owns the operators of the mathematics on pytrees:
    :meth:`block_sums` sums over blocks and :meth:`expand` fills them. On weighted
    trees, with weights of norm 1 in each block, these are Eᵀ and E. Blocks that see
    each other form a group, with a dense matrix, or a grid where the rule gives a
    reach.

    Example:
      >>> import jax.numpy as jnp, bma_optax as bma
      >>> blocks = bma.partition({"w": jnp.ones((2, 3)), "b": jnp.ones(3)})
      >>> blocks.names, blocks.sizes, blocks.groups
      (('b', 'w'), (3, 6), ((0, 1),))
    """

    rule: Rule
    arrays: tuple[Tiles, ...]
    # (groups, blocks of each) of the dense ones, blocks ascending. They come first.
    buckets: tuple[tuple[int, int], ...]
    grids: tuple[GridFields, ...]

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """The number of elements of each block."""
        sizes = np.zeros(self.num_blocks, int)
        for array in self.arrays:
            sizes[array.start : array.start + array.num_blocks] += array.block_sizes
        return tuple(int(s) for s in sizes)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """A readable name for each block."""
        names = [""] * self.num_blocks
        for array in self.arrays:
            stop = array.start + array.num_blocks
            names[array.start : stop] = array.block_names
        return tuple(names)

    @property
    def num_blocks(self) -> int:
        """L, over all groups."""
        return self.num_dense + sum(grid.tiles.num_cells for grid in self.grids)

    @property
    def num_dense(self) -> int:
        """The number of blocks in dense groups, which come first."""
        return sum(count * blocks for count, blocks in self.buckets)

    @functools.cached_property
    def dense(self) -> "Partition":
        """The partition without its grids: their arrays have no blocks in it."""
        on_grid = {i for grid in self.grids for i in grid.positions}
        arrays = tuple(
            dataclasses.replace(a, tile=None, reach=None) if i in on_grid else a
            for i, a in enumerate(self.arrays)
        )
        return dataclasses.replace(self, arrays=arrays, grids=())

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The positions of the blocks of each group; the grids' come last."""
        bounds = np.cumsum([0] + [n for count, n in self.buckets for _ in range(count)])
        dense = [tuple(range(a, b)) for a, b in itertools.pairwise(bounds.tolist())]
        grids = [
            tuple(itertools.chain.from_iterable(range(a, b) for a, b in grid.spans))
            for grid in self.grids
        ]
        return (*dense, *grids)

    @property
    def matrix_shape(self) -> Shape:
        """The shape in which one array holds the small matrices of all dense groups.

        (L, L) for one group, else the matrices one after the other, (Σ L_group²,).
        """
        if sum(count for count, _ in self.buckets) <= 1:
            return (self.num_dense, self.num_dense)
        return (sum(count * n * n for count, n in self.buckets),)

    def block_sums(self, tree: Any) -> jax.Array:
        """Sums over the elements of each block, shape (L,).

        Args:
          tree: floating arrays, in the structure and shapes of the partition.

        Returns:
          Shape (L,), float64 if a dtype is, else float32.

        Raises:
          ValueError: if the number of arrays is another one.

        Example:
          >>> import bma_optax as bma
          >>> tree = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
          >>> print(bma.partition(tree).block_sums(tree))
          [3. 6.]
        """
        pairs = zip(self.arrays, jax.tree.leaves(tree), strict=True)
        parts = [array.sums(x) if array.num_blocks else None for array, x in pairs]
        return self.join_arrays(parts, tree)

    def join_arrays(self, parts: list[jax.Array | None], like: Any) -> jax.Array:
        """Numbers for the blocks of each array as one vector, shape (L,).

        Where arrays share a block, their numbers are added.
        """
        dtype = _tree.common_statistic_dtype(like)
        sums: dict[int, jax.Array] = {}
        for array, numbers in zip(self.arrays, parts, strict=True):
            if array.num_blocks and numbers is not None:
                part = _sharding.reshard(numbers).reshape(-1).astype(dtype)
                start = array.start
                sums[start] = sums[start] + part if start in sums else part
        ordered = [sums[start] for start in sorted(sums)]
        if not ordered:
            return jnp.zeros(0, dtype)
        return _sharding.replicate(jnp.concatenate(ordered))

    def expand(
        self,
        values: jax.Array,
        like: Any,
        default: jax.typing.ArrayLike = 0,
    ) -> Any:
        """Each block filled with its value.

        Args:
          values: shape (L,).
          like: a tree whose structure, shapes and dtypes the result takes.
          default: a number for arrays without blocks.

        Returns:
          A tree like ``like``.

        Raises:
          ValueError: if the number of arrays is another one.

        Example:
          >>> import bma_optax as bma
          >>> tree = {"w": jnp.ones((1, 2)), "b": jnp.ones(3)}
          >>> filled = bma.partition(tree).expand(jnp.array([5.0, 7.0]), tree)
          >>> print(filled["b"], filled["w"])
          [5. 5. 5.] [[7. 7.]]
        """
        leaves, treedef = jax.tree.flatten(like)
        parts = self._parts(values)
        filled = [
            array.fill_like(parts[array.start], leaf)
            if array.num_blocks
            else jnp.full(array.shape, default, leaf.dtype)
            for array, leaf in zip(self.arrays, leaves, strict=True)
        ]
        return jax.tree.unflatten(treedef, filled)

    def split_arrays(self, values: jax.Array) -> list[jax.Array | None]:
        """The inverse of :meth:`join_arrays`: None for an array without blocks."""
        parts = self._parts(values)
        return [parts[a.start] if a.num_blocks else None for a in self.arrays]

    def _parts(self, values: jax.Array) -> dict[int, jax.Array]:
        """The values of each array, by the position of its first block.

        XLA on CPU compiles a kernel for each place in a vector at which the values of
        an array begin. So the vector is cut, and a few arrays at a time take theirs
        from a part of it, at the same places as the next few. ``_xla.entries`` would
        make fewer kernels to compile, but one more to run for each array.
        """
        ends = {a.start: a.start + a.num_blocks for a in self.arrays if a.num_blocks}
        starts = sorted(ends)
        few = max(_FEW_ARRAYS, math.isqrt(len(starts)))
        batches = [starts[i : i + few] for i in range(0, len(starts), few)]
        vectors = [values[batch[0] : ends[batch[-1]]] for batch in batches]
        if len(vectors) > 1:
            finite = [jnp.where(jnp.isfinite(x), x, 0) for x in vectors]
            vectors = _xla.materialize(vectors, finite)
        return {
            start: _sharding.replicate(
                vector[start - batch[0] : ends[start] - batch[0]]
            )
            for batch, vector in zip(batches, vectors, strict=True)
            for start in batch
        }

    def check_state(self, *found: Shape, expected: tuple[Shape, ...] = ()) -> None:
        """Raises a ValueError for small matrices that another partition has made."""
        expected = expected or (self.matrix_shape,)
        if found != expected:
            pairs = itertools.zip_longest(found, expected, fillvalue="none")
            mine, theirs = next((x, y) for x, y in pairs if x != y)
            raise ValueError(
                f"The state has small matrices of shape {mine}; {self.rule} makes "
                f"{self.num_blocks} blocks and the shape {theirs}. Pass a state of the "
                "same partition instead."
            )

    def split(self, values: jax.Array) -> list[jax.Array]:
        """A vector over blocks as one (groups, blocks) array for each bucket."""
        return pieces(values, list(self.buckets))

    def split_matrix(self, packed: jax.Array) -> list[jax.Array]:
        """The array of :attr:`matrix_shape` as (groups, L, L) for each bucket."""
        return pieces(packed.reshape(-1), [(count, n, n) for count, n in self.buckets])

    def split_sizes(self) -> list[tuple[tuple[int, ...], ...]]:
        """The sizes as (groups, blocks) nested tuples for each bucket."""
        nested = pieces(np.asarray(self.sizes, int), list(self.buckets))
        return [tuple(map(tuple, sizes.tolist())) for sizes in nested]

    def outer(self, values: jax.Array) -> jax.Array:
        """The outer product within each group, as an array of :attr:`matrix_shape`."""
        products = [x[:, :, None] * x[:, None, :] for x in self.split(values)]
        return self.join(products, self.matrix_shape, values.dtype)

    def matvec(self, packed: jax.Array, values: jax.Array) -> jax.Array:
        """The small matrix of each group times its part of a vector over blocks."""
        products = [
            jnp.einsum("gij,gj->gi", matrix, x, precision=jax.lax.Precision.HIGHEST)
            for matrix, x in zip(
                self.split_matrix(packed), self.split(values), strict=True
            )
        ]
        return self.join(products, values.shape, values.dtype)

    def join(self, parts: list[jax.Array], shape: Shape, dtype: Any) -> jax.Array:
        """The inverse of :meth:`split` and :meth:`split_matrix`."""
        if not parts:
            return jnp.zeros(shape, dtype)
        return jnp.concatenate([part.reshape(-1) for part in parts]).reshape(shape)

    def __repr__(self) -> str:
        return _table.table(self)


def pieces(flat: Any, shapes: list[Shape]) -> list[Any]:
    """Consecutive pieces of a vector in these shapes."""
    bounds = itertools.accumulate(map(math.prod, shapes), initial=0)
    return [
        flat[a:b].reshape(shape)
        for (a, b), shape in zip(itertools.pairwise(bounds), shapes, strict=True)
    ]
