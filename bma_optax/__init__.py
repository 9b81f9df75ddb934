"""Block mean approximation for JAX: optimisers that see how parameters pull together.

>>> import bma_optax as bma, optax
>>> tx = optax.chain(bma.scale_by_bma(), optax.scale(-0.1))
"""

from bma_optax._adagrad import ScaleByBMAState, adagrad_bma, scale_by_bma
from bma_optax._adam import ScaleByAdamBMAState, adam_bma, scale_by_adam_bma
from bma_optax._aliases import natural_bma, newton_bma
from bma_optax._block_mean_matrix import BlockMeanMatrix
from bma_optax._controls import ScaleBlockMeanState, scale_block_mean
from bma_optax._curvature import (
    Curvature,
    EmpiricalFisher,
    Fisher,
    GaussNewton,
    Hessian,
    Operator,
)
from bma_optax._diagnostics import diagnostics
from bma_optax._layout import partition
from bma_optax._mini import ScaleByMiniBMAState, mini_bma, scale_by_mini_bma
from bma_optax._natural import scale_by_natural_bma
from bma_optax._newton import ScaleByNewtonBMAState, scale_by_newton_bma
from bma_optax._partition import Partition
from bma_optax._preconditioner import Preconditioner, preconditioner
from bma_optax._rules import (
    Rule,
    per_column,
    per_layer,
    per_leaf,
    per_row,
    per_unit,
)
from bma_optax._rules_of_rules import by_path, stacked
from bma_optax._rules_of_tiles import by_function, per_element, per_tile
from bma_optax._steps import ScaleByQuadraticModelState, scale_by_quadratic_model

__version__ = "0.1.0"

__all__ = [
    "BlockMeanMatrix",
    "Curvature",
    "EmpiricalFisher",
    "Fisher",
    "GaussNewton",
    "Hessian",
    "Operator",
    "Partition",
    "Preconditioner",
    "Rule",
    "ScaleBlockMeanState",
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
    "scale_block_mean",
    "scale_by_adam_bma",
    "scale_by_bma",
    "scale_by_mini_bma",
    "scale_by_natural_bma",
    "scale_by_newton_bma",
    "scale_by_quadratic_model",
    "stacked",
]
