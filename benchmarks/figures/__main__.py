"""A field from few points, and figures 1 and 2 of Lu et al. (2018).

Arguments are figure 2's.

python -m benchmarks.figures
"""

from benchmarks.figures import field, figure1, figure2

if __name__ == "__main__":
    figure2.parse(None)  # What is wrong in it is said before the pictures are drawn.
    field.main()
    figure1.main()
    figure2.main()
