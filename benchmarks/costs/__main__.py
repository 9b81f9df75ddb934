"""All of the costs, one after the other, with their defaults.

python -m benchmarks.costs
"""

import argparse

from benchmarks.costs import min_eigenvalue, step_cost

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    for part in (step_cost, min_eigenvalue):
        part.main([])
