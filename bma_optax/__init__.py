"""Block mean approximation for JAX: optimisers that see how parameters pull together.

>>> import bma_optax as bma, optax
>>> tx = optax.chain(bma.scale_by_bma(), optax.scale(-0.1))
"""

from bma_optax._adagrad import ScaleByBMAState, adagrad_bma, scale_by_bma
from bma_optax._block_mean_matrix import BlockMeanMatrix
from bma_optax._partition import Partition, partition
from bma_optax._rules import (
    Rule,
    by_function,
    by_path,
    per_element,
    per_layer,
    per_leaf,
    per_tile,
    per_unit,
)

__version__ = "0.1.0"

__all__ = [
    "BlockMeanMatrix",
    "Partition",
    "Rule",
    "ScaleByBMAState",
    "adagrad_bma",
    "by_function",
    "by_path",
    "partition",
    "per_element",
    "per_layer",
    "per_leaf",
    "per_tile",
    "per_unit",
    "scale_by_bma",
]
