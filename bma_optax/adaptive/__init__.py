"""Methods of running sums of gradients: statistics -> M^-½ -> update, without a loss.

_adagrad            AdaGrad-BMA of Lu et al. 2018
_adam               AdaGrad-BMA with decayed statistics and momentum
_mini               block means of squares, and one learned direction an array
_aliases            the three as optimisers, with a learning rate
_columns            the columns of E: sums over blocks with weights, and back
_inverse_root       block sums -> M -> M^-½ -> the correction of block means
_direction          power iteration for the learned direction
_moments            decayed averages, as in Adam
_diagnostics        numbers of their states for a logger
"""
