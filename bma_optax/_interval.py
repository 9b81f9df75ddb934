"""What is made anew every so many steps."""

from bma_optax import _flow


def every(interval, count, refresh, last):
    """``refresh()`` at the first step and then at each so many, else ``last``."""
    if isinstance(interval, int) and interval == 1:
        return refresh()
    return _flow.cond(count % interval == 0, refresh, lambda: last)
