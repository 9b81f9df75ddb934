"""Figures 1 and 2 of Lu et al. (2018) from this library; arguments are figure 2's.

python -m benchmarks.figures
"""

from benchmarks.figures import figure1, figure2

if __name__ == "__main__":
    figure1.main()
    figure2.main()
