"""From a curvature G, known by products, to the approximate inverse C of eq. (3).

_gather                      products -> N = 1ᵀ G 1 and diag G
_diagonal                    the diagonal: given, by colours, by units, by signs
_stencil                     G or N on a grid where near neighbours alone meet
_coloring, _color_probing    all entries of a stencil from a few products
_coarse_systems, _hierarchy  N^-1: dense, or by nested levels of block means
_two_level                   C: a diagonal smoother and the coarse correction
"""
