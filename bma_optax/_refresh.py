"""What is made anew every so many steps."""

from bma_optax import _control_flow


def every(interval, count, refresh, last, young=False):
    """``refresh()`` at the first step and then at each so many, else ``last``.

    Where statistics are ``young``, also at steps 2, 4, 8, ... below the interval: the
    first gradients change them most.
    """
    if isinstance(interval, int) and interval == 1:
        return refresh()
    due = count % interval == 0
    if young:
        due |= (count & (count + 1) == 0) & (count + 1 < interval)
    return _control_flow.cond(due, refresh, lambda: last)
