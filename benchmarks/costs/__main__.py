"""All of the costs, one after the other, with their defaults.

python -m benchmarks.costs
"""

from benchmarks.costs import min_eigenvalue, step_cost

if __name__ == "__main__":
    for part in (step_cost, min_eigenvalue):
        part.main([])
