"""All of the costs, one after the other, with their defaults.

python -m benchmarks.costs
"""

from benchmarks.costs import compile_time, long_run, min_eigenvalue, step_cost

if __name__ == "__main__":
    for part in (step_cost, compile_time, min_eigenvalue, long_run):
        part.main([])
