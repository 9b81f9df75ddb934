"""Names of the arrays in a parameter pytree.

A path is a tuple of strings, ("layer", "kernel"); a name is the path as people read it,
"layer/kernel". Rules and error messages use both. Flax puts an array into a box with a
field ``value`` in some calls and not in others; both spellings give the same path here,
so that a partition cannot change between ``init`` and ``update``.
"""

import functools
import sys
from typing import Any

import jax
from jax.tree_util import GetAttrKey

Path = tuple[str, ...]

_BOXES = (
    ("flax.nnx", "Variable"),
    ("flax.nnx", "VariableState"),
    ("flax.core.meta", "AxisMetadata"),
)


def path_of(keys: tuple) -> Path:
    """Returns JAX's path of a leaf as plain strings."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def name_of(path: Path) -> str:
    """Returns a path as people read it: "layer/kernel"."""
    return "/".join(path) or "params"


def named_leaves(tree) -> list[tuple[Path, Any]]:
    """Returns (path, leaf) of each array; the field ``value`` of a box adds no name."""
    if "flax" not in sys.modules:
        found = jax.tree_util.tree_leaves_with_path(tree)
        return [(path_of(keys), leaf) for keys, leaf in found]
    leaves: list[tuple[Path, Any]] = []
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_box)
    for keys, leaf in found:
        path = path_of(keys)
        if not _is_box(leaf):
            leaves.append((path, leaf))
            continue
        # A box has one child, its field. The field may hold a tree of arrays.
        for (key,), inside in jax.tree_util.tree_leaves_with_path(
            leaf, is_leaf=lambda x, box=leaf: x is not box
        ):
            field = () if key == GetAttrKey("value") else path_of((key,))
            leaves += [(path + field + p, x) for p, x in named_leaves(inside)]
    return leaves


def containers(tree) -> list[tuple[str, ...]]:
    """The types of the containers that each leaf is in, from the innermost on."""
    children = jax.tree.leaves(tree, is_leaf=lambda x: x is not tree)
    if len(children) == 1 and children[0] is tree:
        return [()]
    kind = type(tree).__name__
    return [(*inner, kind) for child in children for inner in containers(child)]


def _is_box(x) -> bool:
    kind: Any = type(x)
    return _is_box_type(kind)


@functools.lru_cache(maxsize=1024)
def _is_box_type(kind) -> bool:
    """Whether Flax boxes parameters in objects of this type.

    Only modules that are already imported are asked, because Flax is no dependency.
    """
    found = [
        vars(sys.modules[module]).get(name)
        for module, name in _BOXES
        if module in sys.modules
    ]
    return issubclass(kind, tuple(box for box in found if isinstance(box, type)))
