"""What is written for XLA and not for readers: when values are computed and stored."""

import jax
import jax.numpy as jnp


def again(tree):
    """The same values under another name, for what is to be computed once more.

    XLA would store what two passes over an array share; without a share, each pass
    computes it on its way.
    """
    return jax.lax.optimization_barrier(tree)


def stored(tree, finite):
    """The same values, computed once for all that take them up.

    XLA on CPU would compute what is cheap again for each use, and for each element of a
    block. It does not with a division, here by a 1 that it cannot know: ``finite`` is
    any tree of this structure.
    """
    return jax.tree.map(lambda x, y: x / (0 * y + 1).astype(x.dtype), tree, finite)


def stored_for_sums(tree, finite):
    """As :func:`stored`, where all uses are sums, which take in divisions as well."""
    return jax.tree.map(lambda x, y: jnp.where(y == y, x, 0), tree, finite)


@jax.custom_jvp
def sqrt(x):
    """The root of x >= 0; its derivative is 0 at 0, where others were infinite.

    A bare root, without a comparison: XLA on CPU makes it a part of the sum over it.
    """
    return jnp.sqrt(x)


@sqrt.defjvp
def _sqrt_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    root = sqrt(x)
    return root, jnp.where(x > 0, tangent / (2 * jnp.where(x > 0, root, 1)), 0)
