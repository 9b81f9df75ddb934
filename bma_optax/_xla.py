"""What is written for the XLA compiler and not for readers.

JAX says what is computed. XLA decides when, how often, and what is stored, and on CPU
it does not always choose well: a pass over memory more is a tenth of a step here. Each
function gives back the values that it is given. ``tests/test_xla.py`` compiles programs
with and without it, and fails when a new XLA no longer needs one.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from bma_optax import _control_flow, _sharding


def materialize(tree, finite):
    """``tree``, computed once and stored for all that take it up.

    XLA on CPU computes what is cheap again for each use, and for each element of a
    block. It stores the result of a division, unless all uses are sums, which take in
    divisions as well; and that of a comparison, which sums do not take in. Hence a
    division by a 1 from a comparison. On other platforms nothing is done: their fusions
    share what they read.

    Args:
      tree: floating arrays.
      finite: a tree like it, of any finite numbers: XLA cannot know the 1 from them.
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

    The static argument says how to compute, and not what. Two rules lie behind most of
    these. On a GPU each kernel takes longer to launch than a small one to run, and what
    a loop carries is copied; on CPU this costs less than to compile a larger program.
    And a GPU's fusion takes in several steps of a loop that adds to sums, where XLA on
    CPU would compute the terms of a sum again for each sum over that sum.

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
    """``tree`` under another name: what is computed from it is computed once more.

    XLA on CPU would store what two passes over an array share, as ``r = g f(h)`` and a
    later ``r f(h)`` do. The shared part is cheap, and the memory that it would need is
    not. On other platforms the two are one pass already.
    """
    return jax.lax.platform_dependent(
        tree, cpu=jax.lax.optimization_barrier, default=lambda tree: tree
    )


def second_pass(tree):
    """``tree`` as it is on CPU; elsewhere for a pass that starts after the first.

    A GPU's fusion that sums cannot write in place, and what it writes has to be copied.
    With this the first pass only sums, and the second computes again what it needs from
    what is given: no array is copied or stored. XLA on CPU would take longer.
    """
    return jax.lax.platform_dependent(
        tree, cpu=lambda tree: tree, default=jax.lax.optimization_barrier
    )


def after(x, source):
    """``x``, computed after ``source``.

    What x goes into can then have the memory of what only ``source`` is computed from,
    such as a gradient that is given away: without an order XLA copies it. A barrier
    says nothing of the order to XLA on CPU, which drops it too early; a sum with a zero
    does, and costs as much as x is long.

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
    """x, :func:`after` source on CPU; on a GPU sums are one pass if none waits."""

    def at_once(source):
        dtype = None if jnp.ndim(x) else source.dtype
        return _sharding.varying_like(jnp.asarray(x, dtype), source)

    cpu = functools.partial(after, x)
    return jax.lax.platform_dependent(source, cpu=cpu, default=at_once)


def entries(x):
    """The entries of a vector, a list of arrays of shape ().

    XLA compiles equal kernels once. On CPU an entry at a place that is static becomes a
    part of the kernels that take it up, which is then another kernel for each place. A
    sum over the entry and zeros does not, and where the entry is comes from an array.
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
    both ends; along the first axis of cells, which is the one that is most often
    sharded, it is rolled: a longer array would lie across the shards. Elsewhere each
    result is rolled, which becomes a part of what it is used for.

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
    """The product of matrices, or of a matrix and a vector, to the last bit.

    On GPU and TPU XLA would round the factors to 10 or 7 bits. A matrix whose root or
    inverse is taken cannot bear that: it would not even stay symmetric.
    """
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
