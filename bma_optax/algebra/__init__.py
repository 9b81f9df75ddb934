"""Functions of the block mean matrix, and of the small symmetric matrices in it.

_block_mean_matrix   the pair (Λ, M) of eq. (2), its inverse and root, eq. (3), (4)
_expansions          figure 1: a number a block -> a number an element
_symmetric_power     powers of small symmetric matrices, with all derivatives
"""
