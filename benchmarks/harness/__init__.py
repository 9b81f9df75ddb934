"""What the studies share.

`results` (JSON, atomic, resumable), `timing` (in turns), `tuning` (growing grids),
`tables` (Markdown), `datasets`; and `race`: seconds until a loss is low enough, for
many methods (`solver`, `peers`) on one problem.
"""
