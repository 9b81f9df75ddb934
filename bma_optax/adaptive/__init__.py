"""Methods of running sums of gradients: statistics -> M^-½ -> update, without a loss.

_adagrad, _adam     AdaGrad-BMA, the report's transformation, and its decayed form
_inverse_root       block sums -> M -> M^-½ -> the correction of block means
_mini               one learned direction an array, two numbers a block
_direction          power iteration for it
_block_mean         block means scaled by a constant, what the others must beat
_moments            decayed averages, as in Adam
_diagnostics        numbers of their states for a logger
"""
