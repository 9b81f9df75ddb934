"""Partitions: which parameters form a block, and how blocks lie in their arrays.

A rule gives each array a tile, every tile is a block, and the partition of a pytree
owns the operators of the mathematics: Eᵀ sums over blocks, E fills blocks with values.

    _rules, _unit_rules, _tile_rules,
    _combinators                        path and shape -> tile
    _tiles, _units                      the blocks of one array; as units x inputs
    _build, _blocks                     parameters and a rule -> the partition, a value
    _systems, _grids                    who sees whom: groups, and cells of grids
    _slopes                             linear functions on the cells of a grid
    _coloring                           how few products show who sees whom on a grid
    _table, _sizes                      what it would hold and cost, for people
"""
