"""The block mean matrix and its functions (Lu et al. 2018, eq. 2 to 4 and figure 1).

A symmetric d x d matrix is kept as Λ̄ + B̄, two small matrices of L rows each, and every
function of it costs O(L³ + d).

_block_mean_matrix   the pair (Λ, M): projection, eq. 2; products and the d x d matrix
_functions           inverse and root, eq. 3 and 4, eigenvalues, determinant, trace
_expansions          figure 1: one number for each block -> one for each element
_symmetric_power     powers of small symmetric matrices, with derivatives of any order
_eigh                their eigenvalues and eigenvectors, by platform
"""
