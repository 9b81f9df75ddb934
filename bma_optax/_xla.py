"""What is written for the XLA compiler and not for readers.

JAX says what is computed. XLA decides when, how often, and what is stored, and on CPU
it does not always choose well: a pass over memory more is a tenth of a step here. No
function here changes a value. ``tests/test_xla.py`` compiles programs with each and
without, and fails when a new XLA no longer needs one.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _control_flow, _sharding


def materialize(tree, finite):
    """``tree``, computed once and stored for all its uses.

    XLA on CPU computes what is cheap again for each use, and for each element of a
    block. It stores the result of a division unless all its uses are sums: it fuses
    divisions into sums. It does not fuse comparisons into sums. So this divides by a 1
    that is made by a comparison. On other platforms ``tree`` comes back as it is:
    fusions share what they read there.

    Args:
      tree: floating arrays.
      finite: a tree like it, of any finite numbers. The 1 is made from them, and XLA
        cannot know that it is 1.
    """
    return jax.tree.map(_materialize, tree, finite)


@jax.jit
def _materialize(x, y):
    def divide(x, y):
        return x / jnp.where(y == y, 1, y).astype(x.dtype)

    return jax.lax.platform_dependent(x, y, cpu=divide, default=_sharding.varying_like)


def by_platform(f, cpu, elsewhere, *operands, closure=()):
    """``f(cpu, *operands)`` on CPU, ``f(elsewhere, *operands)`` on other platforms.

    Outside ``jax.jit`` it is the latter: JAX would compile both.

    The static argument says how to compute, and not what. Most uses follow one of two
    rules. A GPU takes longer to launch a small kernel than to run it, and copies what a
    loop carries: there steps are written out, while a loop on CPU makes a program that
    compiles faster. And a GPU fuses several steps that add to sums, where XLA on CPU
    would compute the terms again for each sum.

    Args:
      f: the function.
      cpu, elsewhere: its first argument, static.
      operands: the other arguments.
      closure: the trees that ``f`` closes over.
    """
    if not _control_flow.is_traced(operands, closure):
        return f(elsewhere, *operands)
    return jax.lax.platform_dependent(
        *operands,
        cpu=functools.partial(f, cpu),
        default=functools.partial(f, elsewhere),
    )


def recompute(tree):
    """``tree``, hidden from XLA: what is computed from it is computed once more.

    XLA on CPU would store what two passes over an array share, as ``r = g f(h)`` and a
    later ``r f(h)`` share f(h). To compute it again is cheap; the memory for it is not.
    On other platforms the two are one pass already.
    """
    return jax.lax.platform_dependent(
        tree, cpu=jax.lax.optimization_barrier, default=lambda tree: tree
    )


def second_pass(tree):
    """``tree``, off the CPU for a second pass over memory, after the first.

    A GPU's fusion that sums cannot write in place, and what it writes has to be copied.
    With two passes the first only sums. The second computes again what it needs, so
    that no array is copied or stored. XLA on CPU would take longer, and gets one pass.
    """
    return jax.lax.platform_dependent(
        tree, cpu=lambda tree: tree, default=jax.lax.optimization_barrier
    )


def after(x, source):
    """``x``, computed after ``source``.

    What x goes into can then take the memory of an array that ``source`` was the last
    to read, such as a donated gradient. Without this order XLA copies the array. On CPU
    an optimization barrier gives no order, because XLA drops it too early. To add 0
    times a sum of ``source`` to x does, and costs a pass over x.

    Args:
      x: a number, or a small array with as many axes as ``source``.
      source: an array. Where it is longer, x has length 1.
    """
    source = jnp.where(jnp.isfinite(source), source, 0)
    x = jnp.asarray(x, None if jnp.ndim(x) else source.dtype)
    if x.ndim == 0:
        return x + 0 * jnp.sum(source)
    pairs = enumerate(zip(x.shape, source.shape, strict=True))
    axes = tuple(i for i, (n, m) in pairs if n < m)
    return x + 0 * jnp.sum(source, axis=axes, keepdims=True).astype(x.dtype)


def after_on_cpu(x, source):
    """x, on CPU :func:`after` source. On a GPU sums are one pass if none waits."""

    def at_once(source):
        dtype = None if jnp.ndim(x) else source.dtype
        return _sharding.varying_like(jnp.asarray(x, dtype), source)

    cpu = functools.partial(after, x)
    return jax.lax.platform_dependent(source, cpu=cpu, default=at_once)


def entries(x):
    """The entries of a vector, a list of arrays of shape ().

    XLA compiles equal kernels once. On CPU it fuses a slice into each kernel that uses
    it, and slices at different places make different kernels. It does not fuse the sum
    of an entry and zeros, and an array tells the place.
    """

    def by_sums(x):
        places = np.eye(len(x), dtype=bool)
        zero = jnp.zeros((), x.dtype)
        total = jnp.any if x.dtype == bool else jnp.sum
        return [total(jnp.where(place, x, zero)) for place in places]

    return jax.lax.platform_dependent(x, cpu=by_sums, default=list)


def neighbours(x, offsets):
    """x[:, cell + offset] for every cell, an array for each combination of offsets.

    Cells wrap around. On CPU the results are windows of one array that is longer at
    both ends. Along the first axis of cells it is rolled: that axis is the one most
    often sharded, and a longer array would lie across the shards. On other platforms
    each result is rolled, and XLA fuses the roll into its use.

    Args:
      x: shape (fields, *grid).
      offsets: a list for each axis of the grid.

    Returns:
      A list in the order of ``itertools.product(*offsets)``.
    """
    return jax.lax.platform_dependent(
        x,
        cpu=functools.partial(_windows, offsets=offsets),
        default=functools.partial(_rolled, offsets=offsets),
    )


def _rolled(x, offsets):
    near = [x]
    for axis, shifts in enumerate(offsets, start=1):
        near = [jnp.roll(y, -o, axis) if o else y for y in near for o in shifts]
    return near


def _windows(x, offsets):
    first, *rest = offsets
    longer, starts = x, []
    for axis, shifts in enumerate(rest, start=2):
        before, after = max(0, -min(shifts)), max(0, max(shifts))
        starts.append([before + o for o in shifts])
        n = x.shape[axis]
        parts = [
            jax.lax.slice_in_dim(longer, n - before, n, axis=axis),
            longer,
            jax.lax.slice_in_dim(longer, 0, after, axis=axis),
        ]
        # One concatenation: ``jnp.pad`` makes one for each end, which are not fused.
        longer = jnp.concatenate(parts, axis) if before + after else longer
    return [
        jax.lax.slice(
            y,
            (0, 0, *index),
            (*x.shape[:2], *(i + n for i, n in zip(index, x.shape[2:], strict=True))),
        )
        for y in _rolled(longer, [first])
        for index in itertools.product(*starts)
    ]


def product(a, b):
    """The product of matrices, or of a matrix and a vector, in the full precision.

    On GPU and TPU XLA would round the factors to 10 or 7 bits. A matrix whose root or
    inverse is taken cannot bear that: it would not even stay symmetric.
    """
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
