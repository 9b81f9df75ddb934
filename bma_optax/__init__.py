"""Block mean approximation for JAX: optimisers that see how parameters pull together.

>>> import bma_optax as bma, optax
>>> tx = optax.chain(bma.scale_by_bma(), optax.scale(-0.1))
"""

from bma_optax._diagnostics import diagnostics
from bma_optax.adaptive._adagrad import ScaleByBMAState, scale_by_bma
from bma_optax.adaptive._adam import ScaleByAdamBMAState, scale_by_adam_bma
from bma_optax.adaptive._aliases import adagrad_bma, adam_bma, mini_bma
from bma_optax.adaptive._mini import ScaleByMiniBMAState, scale_by_mini_bma
from bma_optax.algebra._block_mean_matrix import BlockMeanMatrix
from bma_optax.curvature import (
    Curvature,
    Fisher,
    GaussNewton,
    Hessian,
    Operator,
)
from bma_optax.newton._aliases import natural_bma, newton_bma
from bma_optax.newton._natural import scale_by_natural_bma
from bma_optax.newton._newton import ScaleByNewtonBMAState, scale_by_newton_bma
from bma_optax.newton._preconditioner import Preconditioner, preconditioner
from bma_optax.newton._quadratic_model import (
    ScaleByQuadraticModelState,
    scale_by_quadratic_model,
)
from bma_optax.partitions._blocks import Partition
from bma_optax.partitions._build import partition
from bma_optax.partitions._combinators import by_path, stacked, within
from bma_optax.partitions._rules import Rule, per_layer, per_leaf
from bma_optax.partitions._tile_rules import by_function, per_element, per_tile
from bma_optax.partitions._unit_rules import per_column, per_row, per_unit, units
from bma_optax.suggest._suggest import suggest_partition

__version__ = "0.1.0"

__all__ = [
    "BlockMeanMatrix",
    "Curvature",
    "Fisher",
    "GaussNewton",
    "Hessian",
    "Operator",
    "Partition",
    "Preconditioner",
    "Rule",
    "ScaleByAdamBMAState",
    "ScaleByBMAState",
    "ScaleByMiniBMAState",
    "ScaleByNewtonBMAState",
    "ScaleByQuadraticModelState",
    "adagrad_bma",
    "adam_bma",
    "by_function",
    "by_path",
    "diagnostics",
    "mini_bma",
    "natural_bma",
    "newton_bma",
    "partition",
    "per_column",
    "per_element",
    "per_layer",
    "per_leaf",
    "per_row",
    "per_tile",
    "per_unit",
    "preconditioner",
    "scale_by_adam_bma",
    "scale_by_bma",
    "scale_by_mini_bma",
    "scale_by_natural_bma",
    "scale_by_newton_bma",
    "scale_by_quadratic_model",
    "stacked",
    "suggest_partition",
    "units",
    "within",
]
