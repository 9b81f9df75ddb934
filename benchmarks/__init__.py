"""Studies, a folder each: `python -m benchmarks.grids`. See README.md."""
