"""The partition of a parameter pytree into blocks, and its operators E and Eᵀ."""

import dataclasses
import functools
import itertools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _rules, _table, _trees
from bma_optax._rules import Path, Rule, Shape
from bma_optax._rules_of_rules import ByPath
from bma_optax._tiles import Tiles

_COUPLES = ("all", "array", "layer", "block")
_MANY_BLOCKS = 1000
_INDEX_LIMIT = 2**31  # LAPACK and its peers index the entries of a matrix in 32 bits.


@dataclasses.dataclass(frozen=True)
class Partition:
    """The blocks of a parameter pytree: a static, hashable, printable value.

    Made by :func:`partition`. It owns the operator E of the mathematics on pytrees,
    which entries are in a block and with which weights: :meth:`block_sums` sums over
    blocks, :meth:`expand` broadcasts back, and with ``weights`` that have norm 1 in
    each block these are Eᵀ and E. Blocks that see each other form a group, one small
    matrix each.

    Example:
      >>> import jax.numpy as jnp, bma_optax as bma
      >>> blocks = bma.partition({"w": jnp.ones((2, 3)), "b": jnp.ones(3)})
      >>> blocks.names, blocks.sizes, blocks.groups
      (('b', 'w'), (3, 6), ((0, 1),))
    """

    rule: Rule
    couple: str
    arrays: tuple[Tiles, ...]
    buckets: tuple[tuple[int, int], ...]  # (groups, blocks of each), blocks ascending.

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
        return sum(count * blocks for count, blocks in self.buckets)

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The positions of the blocks of each group."""
        bounds = np.cumsum([0] + [n for count, n in self.buckets for _ in range(count)])
        return tuple(tuple(range(a, b)) for a, b in itertools.pairwise(bounds.tolist()))

    @property
    def matrix_shape(self) -> Shape:
        """The shape in which one array holds the small matrices of all groups.

        (L, L) for one group, else the matrices one after the other, (Σ L_group²,).
        """
        if sum(count for count, _ in self.buckets) <= 1:
            return (self.num_blocks, self.num_blocks)
        return (sum(count * n * n for count, n in self.buckets),)

    def block_sums(self, tree: Any, weights: Any = None) -> jax.Array:
        """Sums over the elements of each block, shape (L,).

        Args:
          tree: floating arrays, in the structure and shapes of the partition.
          weights: a tree like it by which the elements are weighted.

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
        if weights is not None:
            tree = jax.tree.map(jnp.multiply, tree, weights)
        leaves = jax.tree.leaves(tree)
        dtype = _trees.common_statistic_dtype(tree)
        sums: dict[int, jax.Array] = {}
        for array, leaf in zip(self.arrays, leaves, strict=True):
            if array.num_blocks:
                part = array.sums(leaf).reshape(-1).astype(dtype)
                start = array.start
                sums[start] = sums[start] + part if start in sums else part
        ordered = [sums[start] for start in sorted(sums)]
        return jnp.concatenate(ordered) if ordered else jnp.zeros(0, dtype)

    def expand(
        self,
        values: jax.Array,
        like: Any,
        weights: Any = None,
        default: jax.typing.ArrayLike = 0,
    ) -> Any:
        """Each block filled with its value.

        Args:
          values: shape (L,).
          like: a tree whose structure, shapes and dtypes the result takes.
          weights: a tree like it that multiplies the result.
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
        filled = [
            array.fill(
                values[array.start : array.start + array.num_blocks].astype(leaf.dtype)
            )
            if array.num_blocks
            else jnp.full(array.shape, default, leaf.dtype)
            for array, leaf in zip(self.arrays, leaves, strict=True)
        ]
        filled = jax.tree.unflatten(treedef, filled)
        if weights is not None:
            filled = jax.tree.map(jnp.multiply, filled, weights)
        return filled

    def split(self, values: jax.Array) -> list[jax.Array]:
        """A vector over blocks as one (groups, blocks) array for each bucket."""
        return _split(values, list(self.buckets))

    def split_matrix(self, packed: jax.Array) -> list[jax.Array]:
        """The array of :attr:`matrix_shape` as (groups, L, L) for each bucket."""
        return _split(packed.reshape(-1), [(count, n, n) for count, n in self.buckets])

    def split_sizes(self) -> list[tuple[tuple[int, ...], ...]]:
        """The sizes as (groups, blocks) nested tuples for each bucket."""
        nested = _split(np.asarray(self.sizes, int), list(self.buckets))
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

    def group_of(self, array: Tiles) -> Path:
        """A name for the group that the blocks of an array are in."""
        return _group_of(array, self.couple)

    def join(self, parts: list[jax.Array], shape: Shape, dtype: Any) -> jax.Array:
        """The inverse of :meth:`split` and :meth:`split_matrix`."""
        if not parts:
            return jnp.zeros(shape, dtype)
        return jnp.concatenate([part.reshape(-1) for part in parts]).reshape(shape)

    def __repr__(self) -> str:
        return _table.table(self)


def partition(
    params: Any, rule: Rule = _rules.per_leaf, couple: str = "all"
) -> Partition:
    """The blocks that ``rule`` cuts a parameter pytree into, for a look beforehand.

    Args:
      params: a pytree of arrays, or of anything with a shape, such as
        ``jax.ShapeDtypeStruct``: nothing is allocated.
      rule: a :class:`Rule`.
      couple: which blocks see each other: "all" in one matrix, those of one "array",
        those of one "layer" (arrays whose paths differ in the last part only), or none,
        every "block" alone. A solve costs Σ L_group³.

    Returns:
      A :class:`Partition`; print it to read it as a table.

    Raises:
      TypeError: if ``rule`` is not a rule.
      ValueError: if ``couple`` is unknown, if the rule returns something other than a
        tile, if a pattern of it matches nothing, or if a small matrix could not exist.

    Warns:
      UserWarning: if more than a thousand blocks are in one group.

    Example:
      >>> import jax, bma_optax as bma
      >>> params = {"kernel": jax.ShapeDtypeStruct((784, 32), "float32"),
      ...           "bias": jax.ShapeDtypeStruct((32,), "float32")}
      >>> print(bma.partition(params, bma.per_leaf))
      Partition per_leaf, couple='all': 25,120 parameters in 2 blocks
      array   shape      tile       blocks  block size  bytes of diag H
      bias    (32,)      (32,)      1       32          128
      kernel  (784, 32)  (784, 32)  1       25,088      100,352
      small matrices: 1 of 2 × 2; float32 state 100,480 bytes of diag H and 40 of U, v and the inverse root; a solve costs O(8)
    """  # noqa: E501
    result = layout(params, rule, couple)
    largest = max((n for _, n in result.buckets), default=0)
    advice = (
        "Use coarser blocks (bma.per_leaf, larger tiles, None for an array in "
        'bma.by_path) or couple="layer", "array" or "block".'
    )
    if sum(count * n * n for count, n in result.buckets) >= _INDEX_LIMIT:
        raise ValueError(
            f"{rule} cuts the parameters into {result.num_blocks:,} blocks, up to "
            f"{largest:,} in one group: a {largest:,} × {largest:,} matrix cannot be "
            f"held. {advice}"
        )
    if largest > _MANY_BLOCKS:
        warnings.warn(
            f"{rule} puts {largest:,} blocks into one group; each step factors a "
            f"matrix of that size. {advice}",
            stacklevel=2,
        )
    return result


def layout(params: Any, rule: Rule, couple: str) -> Partition:
    """As :func:`partition`, without the checks of its size: for use in ``update``."""
    _rules.check_rule(rule)
    check_couple(couple)
    leaves = tuple(
        (path, tuple(leaf.shape)) for path, leaf in _trees.named_leaves(params)
    )
    return _layout(leaves, rule, couple)


def check_couple(couple: str) -> None:
    """Raises a ValueError for an unknown ``couple``."""
    if couple not in _COUPLES:
        raise ValueError(f"`couple` must be one of {_COUPLES}, got {couple!r}.")


@functools.lru_cache(maxsize=128)
def _layout(leaves, rule, couple) -> Partition:
    arrays = [
        Tiles(
            path,
            shape,
            _tile(rule, path, shape),
            rule.owner(path),
            stacked_axes=rule.stacked_axes(path, shape),
        )
        for path, shape in leaves
    ]
    _check_patterns(rule, [path for path, _ in leaves])
    groups: dict[Path, dict[Path, int]] = {}
    for array in arrays:
        if array.owner != array.path and array.num_blocks > 1:
            raise ValueError(
                f"{rule} merges {_trees.name_of(array.path)!r} with other arrays but "
                f"cuts it into {array.num_blocks} tiles; only whole arrays can be "
                "merged."
            )
        if array.num_blocks:
            key = _group_of(array, couple)
            groups.setdefault(key, {})[array.owner] = array.num_blocks
    # Groups of equal size lie side by side, so that one batched eigh serves them all.
    ordered = sorted(groups.values(), key=lambda owners: sum(owners.values()))
    counts = [sum(owners.values()) for owners in ordered]
    if couple == "block":
        counts = [1] * sum(counts)
    buckets = tuple((len(list(same)), n) for n, same in itertools.groupby(counts))
    starts, position = {}, 0
    for owners in ordered:
        for owner, num_blocks in owners.items():
            starts[owner] = position
            position += num_blocks
    placed = tuple(
        dataclasses.replace(array, start=starts.get(array.owner, 0)) for array in arrays
    )
    return Partition(rule, couple, placed, buckets)


def _group_of(array: Tiles, couple: str) -> Path:
    if couple == "all":
        return ()
    return array.path[:-1] if couple == "layer" else array.owner


def _tile(rule: Rule, path: Path, shape: Shape) -> Shape | None:
    tile = rule.tile(path, shape)
    if tile is None or math.prod(shape) == 0:
        return None
    valid = isinstance(tile, (tuple, list)) and all(
        isinstance(t, (int, np.integer)) and t > 0 for t in tile
    )
    if not valid or len(tile) != len(shape):
        raise ValueError(
            f"{rule} gave {tile!r} for {_trees.name_of(path)!r} of shape {shape}; a "
            f"tuple of {len(shape)} positive integers, or None, is accepted."
        )
    return tuple(min(int(t), n) for t, n in zip(tile, shape, strict=True))


def _check_patterns(rule: Rule, paths: list[Path]) -> None:
    """Raises if a pattern of ``by_path`` decides nothing.

    Optax calls ``init`` on a placeholder without leaves: nothing can match there.
    """
    if not isinstance(rule, ByPath) or not paths:
        return
    used = {rule.match(path) for path in paths}
    for i, (pattern, _) in enumerate(rule.rules):
        if i not in used:
            raise ValueError(
                f"by_path: {pattern!r} matches none of the arrays that earlier "
                f"patterns leave; there are {', '.join(map(_trees.name_of, paths))}."
            )
    for i, (_, inner) in enumerate((*rule.rules, ("", rule.default))):
        if inner is not None:
            _check_patterns(inner, [path for path in paths if rule.match(path) == i])


def _split(flat: Any, shapes: list[Shape]) -> list[Any]:
    """Consecutive pieces of a vector in these shapes."""
    bounds = itertools.accumulate(map(math.prod, shapes), initial=0)
    return [
        flat[a:b].reshape(shape)
        for (a, b), shape in zip(itertools.pairwise(bounds), shapes, strict=True)
    ]
