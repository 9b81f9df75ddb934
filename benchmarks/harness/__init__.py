"""What the studies share.

`results` (JSON, atomic, resumable), `timing` (in turns), `tuning` (growing grids),
`tables` (Markdown), `datasets`; `solver` and `race`: seconds until a loss is low
enough, for many methods on one problem.
"""
