"""From a curvature G, known by products, to its approximate inverse C.

C inverts a block mean of G, Lu et al. 2018, eq. 3.

_systems            block sums, with a part for each coarse system
_two_level          products -> N = 1ᵀ G 1 and diag G -> C, and C times a vector
_smoother           the diagonal part of C
_coarse_system      the coarse correction in C, as far as both of its kinds share it
_dense, _nested     dense groups of blocks; arrays on grids, by nested levels
_hierarchy          the levels: their operators and smoothers, the inverse
_cycles             a solve with these: smoothing cycles, Chebyshev steps
_transfers          restriction and prolongation between levels
_cell_matrices      small matrices, one a cell, between the columns of a block
_stencil            G or N on a grid where only near neighbours meet
_local_entries      N and the diagonal on a grid from few products, and a check of them
_color_probing      these products, one color at a time, and sums of them
_color_vectors      their vectors, and the weights of the sums
"""
