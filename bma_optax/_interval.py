"""What is made anew every so many steps."""

import jax


def every(interval, count, refresh, last):
    """``refresh()`` at the first step and then at each so many, else ``last``."""
    if isinstance(interval, int) and interval == 1:
        return refresh()
    return jax.lax.cond(count % interval == 0, refresh, lambda: last)
