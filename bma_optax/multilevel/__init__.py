"""From a curvature G, known by products, to the approximate inverse C of eq. (3).

_two_level                   products -> N = 1ᵀ G 1, diag G -> C, and C times a vector
_smoother                    its diagonal part
_coarse_system               its coarse correction: what both kinds have in common
_dense, _nested              dense groups of blocks; grids, by nested levels
_hierarchy                   the levels: restriction, prolongation, smoothing cycles
_stencil                     G or N on a grid where near neighbours alone meet
_coloring, _color_probing    all entries of a stencil from a few products
"""
