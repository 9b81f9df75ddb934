"""One table of what is refused, with the error and words that a user reads.

Four kinds of errors stand elsewhere: what all numbers, keys and functions of users have
in common (``test_arguments.py``), what each transformation says of dtypes
(``test_harness.py``), the site's table (``test_troubles.py``), and what takes a run to
show, beside the other tests of such runs.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

import bma_optax as bma

X = np.array([3.0, -2.0, 5.0], np.float32)
TREE = {"a": np.ones(3, np.float32), "b": np.ones((2, 2), np.float32)}
SQUARE = np.ones((4, 4), np.float32)
LAYER = {"layer": {"w": np.ones((2, 2), np.float32)}}
NET = {
    "dense": {"kernel": np.ones((5, 3), np.float32), "bias": np.ones(3, np.float32)},
    "scale": np.ones((), np.float32),
}
NESTED = {"a": {"w": np.ones((8, 4)), "b": np.ones(8)}, "c": np.ones(16)}
TILES = bma.per_tile((4, 4), reach=1)
NEAR = bma.per_tile((2, 2), reach=1)


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def like(*shape):
    return {"u": jax.ShapeDtypeStruct(shape, jnp.float32)}


def box(x, name):
    return linen.Partitioned(x, names=(name,))


def loss(p):
    return sum(jnp.sum((x - 1) ** 2) for x in jax.tree.leaves(p))


def update(tx, grads, params, state_of=None, **kwargs):
    """An update of a state that was made for ``params``."""
    state = (state_of or tx).init(params)
    return jax.eval_shape(lambda g, s: tx.update(g, s, params, **kwargs), grads, state)


def apply(x, like):
    """A preconditioner of arrays like ``like``, to x."""
    return jax.eval_shape(
        lambda x: bma.preconditioner(lambda v: v, like, diagonal=like)(x), x
    )


def state_of_x64():
    with jax.enable_x64(True):
        return bma.scale_by_bma().init(X.astype(np.float64))


class OfMine(bma.Rule):
    def __init__(self, reach=None, scope="all", axes=()):
        self.given = reach, scope, axes

    def tile(self, path, shape):
        return (2,) * len(shape)

    def reach(self, path, shape):
        return self.given[0]

    def scope(self, path):
        return self.given[1]

    def stacked_axes(self, path, shape):
        return self.given[2]


class Merged(bma.Rule):
    def tile(self, path, shape):
        return (1, *shape[1:])

    def owner(self, path):
        return path[:-1]


TWO_BOUNDS = bma.by_path(
    {"w": bma.within("layer", bma.per_layer)},
    default=bma.within("array", bma.per_layer),
)

OPTIMISERS = [
    (lambda: bma.newton_bma(0.1), TypeError, "and a rate as `learning_rate`"),
    (lambda: bma.natural_bma(bma.Hessian(), 0.1), TypeError, "`learning_rate`"),
    (lambda: bma.mini_bma(bma.per_unit), TypeError, "`learning_rate`"),
    (lambda: bma.adagrad_bma(None), TypeError, "`learning_rate`"),
    (lambda: bma.adagrad_bma(0.1, 0.9), TypeError, "`partition`.*`learning_rate`"),
    (lambda: bma.newton_bma(bma.per_tile), TypeError, r"per_tile\(\("),
    (lambda: bma.newton_bma(partition="unit"), TypeError, "rule"),
    (lambda: bma.scale_by_bma(lambda p, s: s), TypeError, "bma.by_function"),
    (lambda: bma.scale_by_bma(len), TypeError, "by_function"),
    (lambda: bma.scale_by_mini_bma(partition=len), TypeError, "by_function"),
    (lambda: bma.mini_bma(0.1, mu_dtype="float33"), TypeError, "`mu_dtype`"),
    (lambda: bma.adam_bma(0.1, mu_dtype="int32"), TypeError, "`mu_dtype`"),
    (lambda: bma.scale_by_bma(form="right"), ValueError, "left.*symmetric"),
    (lambda: bma.scale_by_bma(estimator="ridge"), ValueError, "projection"),
    (lambda: bma.scale_by_adam_bma(estimator="ridge"), ValueError, "projection"),
    (lambda: bma.scale_by_bma(eps=-1.0), ValueError, "eps"),
    (lambda: bma.scale_by_bma(min_eigenvalue=float("nan")), ValueError, "min_eig"),
    (
        lambda: bma.adagrad_bma(0.1, initial_accumulator_value=-0.1),
        ValueError,
        "initial_accumulator_value",
    ),
    (lambda: bma.scale_by_adam_bma(b1=1.0), ValueError, "b1"),
    (lambda: bma.scale_by_mini_bma(b2=1.0), ValueError, "b2"),
    (lambda: bma.scale_by_mini_bma(b3=-0.1), ValueError, "b3"),
    (lambda: bma.scale_by_mini_bma(eps=-1.0), ValueError, "eps"),
    (lambda: bma.newton_bma(damping=-1), ValueError, "`damping`"),
    (lambda: bma.newton_bma(min_eigenvalue=-1), ValueError, "`min_eigenvalue`"),
    (lambda: bma.newton_bma(b2=1.0), ValueError, "`b2`"),
    (lambda: bma.newton_bma(update_interval=0), ValueError, "`update_interval`"),
    (lambda: bma.newton_bma(max_norm=0), ValueError, "`max_norm`"),
    (
        lambda: jax.eval_shape(lambda x: bma.newton_bma(update_interval=x) and x, X[0]),
        TypeError,
        "`update_interval` must be an integer",
    ),
]

PARAMETERS = [
    (
        lambda: bma.scale_by_bma().init({"a": {"n": ones(2, dtype=int)}}),
        TypeError,
        "'a/n' has dtype int.*optax.masked",
    ),
    (
        lambda: bma.scale_by_bma().init({"a": ones(2, dtype=np.complex64)}),
        TypeError,
        "'a'.*split_real_and_imaginary",
    ),
    (
        lambda: bma.scale_by_bma().init({"a": jnp.tanh}),
        TypeError,
        "'a' is a .*optax.masked, or with eqx.filter",
    ),
    (
        lambda: bma.scale_by_bma().init({"a": jax.random.key(0)}),
        TypeError,
        "'a' has dtype key.*optax.masked",
    ),
    (
        lambda: bma.scale_by_mini_bma().init({"a": {"n": ones(2, 2, dtype=int)}}),
        TypeError,
        "'a/n' has dtype int",
    ),
    (lambda: bma.newton_bma().init(ones(2, dtype=int)), TypeError, "floating"),
    (
        lambda: bma.scale_by_mini_bma(partition=bma.per_tile((2,))).init(
            {"a": {"w": ones(3, 2)}}
        ),
        ValueError,
        r"^'a/w' of shape \(3, 2\): .* do not divide",
    ),
    (
        lambda: bma.scale_by_mini_bma(partition=bma.stacked(bma.per_unit, axis=1)).init(
            {"a": {"b": ones(3)}}
        ),
        ValueError,
        "'a/b'.*no axis 1.*by_path",
    ),
]

UPDATES = [
    *(
        (
            lambda tx=tx, value=value: update(tx, X, X, value_fn=loss, refresh=value),
            TypeError,
            "`refresh` must be a boolean",
        )
        for tx in (
            bma.newton_bma(),
            bma.scale_by_newton_bma(),
            bma.scale_by_quadratic_model(),
        )
        for value in ("yes", 1.0, ones(1))
    ),
    (
        lambda: update(bma.scale_by_bma(), {"layer": {"w": ones(2, 3)}}, LAYER),
        ValueError,
        r"'layer/w' has shape \(2, 3\)",
    ),
    (
        lambda: update(bma.scale_by_bma(), {"layer": {"v": ones(2, 2)}}, LAYER),
        ValueError,
        "'layer/v'",
    ),
    (
        lambda: update(bma.scale_by_bma(), {}, LAYER),
        ValueError,
        "'layer/w' is missing",
    ),
    *(
        (
            lambda tx=tx: update(tx, {"a": (X, X)}, {"a": [X, X]}, value_fn=loss),
            ValueError,
            "The gradient of 'a/0' is in tuple in dict; init saw list in dict. Pass",
        )
        for tx in (
            bma.scale_by_bma(),
            bma.scale_by_adam_bma(),
            bma.scale_by_mini_bma(),
            bma.newton_bma(),
        )
    ),
    (
        lambda: update(bma.scale_by_bma(), {"a": X, "b": (X,)}, {"a": X, "b": [X]}),
        ValueError,
        "The gradient of 'b/0' is in tuple in dict; init saw list in dict. Pass",
    ),
    (
        lambda: update(bma.scale_by_mini_bma(), {"a": box(X, "to")}, {"a": X}),
        ValueError,
        "The gradient of 'a' is in Partitioned in dict; init saw dict. Pass",
    ),
    (
        lambda: update(bma.adam_bma(1), {"a": box(X, "to")}, {"a": box(X, "from")}),
        ValueError,
        "other static data than init saw, or are empty: .*'to'.* Pass a tree",
    ),
    *(
        (
            lambda tx=tx: tx.update([X, X], tx.init([X, X]), (X, X), value_fn=loss),
            ValueError,
            "Parameter '0' is in tuple; init saw list. Pass",
        )
        for tx in (bma.newton_bma(), bma.scale_by_quadratic_model())
    ),
    (
        lambda: update(bma.scale_by_mini_bma(), {"w": ones(2, 3)}, {"w": ones(2)}),
        ValueError,
        r"'w' has shape \(2, 3\)",
    ),
    *(
        row
        for tx in (bma.scale_by_newton_bma(), bma.scale_by_quadratic_model())
        for row in (
            (lambda tx=tx: update(tx, X, X), ValueError, "value_fn=loss"),
            (
                lambda tx=tx: tx.update(X, tx.init(X), value_fn=jnp.sum),
                ValueError,
                "needs the parameters",
            ),
            (
                lambda tx=tx: update(tx, ones(4), X, value_fn=jnp.sum),
                ValueError,
                "shape",
            ),
        )
    ),
    (
        lambda: bma.scale_by_newton_bma().update(
            TREE, bma.scale_by_newton_bma().init(TREE), TREE | {"b": X}, value_fn=loss
        ),
        ValueError,
        r"Parameter 'b' has shape \(3,\); init saw \(2, 2\)",
    ),
    (
        lambda: update(
            bma.newton_bma(), X, X, bma.newton_bma(learning_rate=1.0), value_fn=loss
        ),
        ValueError,
        "no step rule: init was called with a learning_rate",
    ),
    (
        lambda: update(
            bma.newton_bma(), X, X, value_fn=lambda p, grad: jnp.sum(p * grad), grad=X
        ),
        ValueError,
        "needs an argument `grad`.*under another name",
    ),
    # The loss and its gradient, as Optax's line searches take them.
    *(
        (
            lambda value=value, grad=grad: update(
                bma.newton_bma(), TREE, TREE, value=value, grad=grad, value_fn=loss
            ),
            error,
            message,
        )
        for value, grad, error, message in [
            (X, TREE, TypeError, r"`value` must be .*got float32\[3\]"),
            (loss, TREE, TypeError, "`value` must be"),
            (1.0, {"a": X}, ValueError, "'b' `grad` gave nothing"),
            (1.0, TREE | {"a": SQUARE}, ValueError, "'a' `grad` gave"),
        ]
    ),
    (
        lambda: bma.scale_by_bma().update(X, state_of_x64()),
        ValueError,
        "the state has float64, which jax_enable_x64 does not allow",
    ),
    # A state of another partition.
    *(
        (
            lambda tx=tx, other=other: update(
                tx, NESTED, NESTED, state_of=other, value_fn=loss
            ),
            ValueError,
            r"shape.*; .*makes.*same partition",
        )
        for tx, other in [
            (bma.scale_by_bma(), bma.scale_by_bma(bma.per_unit)),
            (bma.scale_by_bma(bma.within("layer", bma.per_leaf)), bma.scale_by_bma()),
            (bma.scale_by_adam_bma(), bma.scale_by_adam_bma(partition=bma.per_unit)),
            (bma.scale_by_mini_bma(), bma.scale_by_mini_bma(partition=bma.per_row)),
            (bma.scale_by_newton_bma(), bma.scale_by_newton_bma(bma.per_unit)),
        ]
    ),
]

RULES = [
    (lambda: bma.partition(NET, lambda path: 1), TypeError, "by_function"),
    (lambda: bma.partition(NET, bma.per_tile), TypeError, "per_tile"),
    (lambda: bma.newton_bma((4, 4)), TypeError, r"Pass a tile as bma.per_tile\(\(4, 4"),
    (
        lambda: bma.partition({"z": 1j * X}),
        TypeError,
        "Parameter 'z' has dtype complex",
    ),
    (lambda: bma.per_leaf(), TypeError, "bma.per_leaf .*without parentheses"),
    (lambda: bma.within("none", bma.per_leaf), ValueError, "`bounds`"),
    (lambda: bma.within("some", bma.per_leaf), ValueError, "`bounds`"),
    (lambda: bma.per_tile((0,)), ValueError, "positive"),
    (lambda: bma.per_tile((1.5,)), ValueError, "positive"),
    (lambda: bma.per_tile((True, 2)), ValueError, "positive"),
    (lambda: bma.per_tile(()), ValueError, "`tile` must hold positive integers"),
    (lambda: bma.per_tile("4"), TypeError, r"bma.per_tile\(\(4, 4\)\)"),
    (lambda: bma.per_tile((4,), slopes=True), ValueError, "`slopes` need a `reach`"),
    (lambda: bma.per_tile((4,), reach=2, slopes=1), TypeError, "True or False"),
    (lambda: bma.stacked(bma.per_unit, axis=True), TypeError, "`axis`"),
    (lambda: bma.stacked(bma.per_unit, axis=None), TypeError, "integer"),
    (
        lambda: bma.partition({"b": ones(3)}, bma.stacked(bma.per_unit, axis=1)),
        ValueError,
        "'b' of shape .3,. has no axis 1",
    ),
    (lambda: bma.by_path({"(": None}), ValueError, "pattern"),
    (lambda: bma.by_path({"a": 3}), TypeError, "rule"),
    (lambda: bma.by_path(["a"]), TypeError, "must map patterns to rules"),
    (lambda: bma.by_function(3), TypeError, "function"),
    (
        lambda: bma.partition(NET, bma.by_path({"kernle": None})),
        ValueError,
        "kernle.*dense/kernel",
    ),
    (
        lambda: bma.partition(NET, bma.by_path({"d": None, "kernel": None})),
        ValueError,
        "kernel",
    ),
    (
        lambda: bma.partition(NET, bma.by_function(lambda p, s: (1,))),
        ValueError,
        r"^'dense/kernel' of shape \(5, 3\): .*\(1,\).* 2 positive integers",
    ),
    (
        lambda: bma.partition(NET, bma.by_function(lambda p, s: "tile")),
        ValueError,
        "dense/bias",
    ),
    (
        lambda: bma.partition(
            NET, bma.by_path({"kernel": bma.by_path({"bias": None})})
        ),
        ValueError,
        "'bias' matches none",
    ),
    (
        lambda: bma.partition(
            NET, bma.by_path({"kernel": bma.stacked(bma.by_path({"x": None}))})
        ),
        ValueError,
        "'x' matches none",
    ),
    (
        lambda: bma.partition(
            dict.fromkeys(map(str, range(10_000)), X), bma.by_path({"x": None})
        ),
        ValueError,
        "'0', '1', '10', '100', '1000' and 9,995 more",
    ),
    *(
        (
            lambda shape=shape: bma.partition(like(*shape), bma.per_tile((4, 4))),
            ValueError,
            r"^'u': .*axes of \(.*bma.stacked\(bma.per_tile.*bma.by_path",
        )
        for shape in [(2, 8, 8), (8, 3), (8,), (1, 8)]
    ),
    (
        lambda: bma.partition(like(50_000) | {"v": ones(1001)}, bma.per_element),
        ValueError,
        "^'u' and .* 51,001 blocks.*reach",
    ),
    (
        lambda: bma.partition({"a": {"w": ones(2, 3)}}, Merged()),
        ValueError,
        "only whole arrays can be merged",
    ),
    (lambda: bma.Rule().tile(("w",), (2, 3)), NotImplementedError, None),
]

REACHES = [
    *(
        (lambda reach=reach: bma.per_tile((4,), reach=reach), TypeError, "an integer")
        for reach in (1.0, True, (1.5,))
    ),
    (
        lambda: bma.per_tile((4,), reach=-1),
        ValueError,
        "`reach` must not be negative",
    ),
    (
        lambda: bma.per_tile((4, 4), reach=(1, 1, 1)),
        ValueError,
        "3 numbers .* along 2 axes",
    ),
    (
        lambda: bma.per_tile((4, 4), reach=(1,)),
        ValueError,
        "1 numbers .* along 2 axes",
    ),
    (
        lambda: bma.per_tile((4,), reach=(1, 1)),
        ValueError,
        "2 numbers .* along 1 axes",
    ),
    (
        lambda: bma.scale_by_bma(NEAR).init(SQUARE),
        ValueError,
        r"^'params': per_tile.* reach, .*without `reach`, or take bma.newton_bma",
    ),
    (
        lambda: bma.scale_by_adam_bma(partition=NEAR).init(SQUARE),
        ValueError,
        "^'params': .* without `reach`",
    ),
    (
        lambda: bma.mini_bma(0.1, partition=bma.per_tile((2,), reach=1)).init(SQUARE),
        ValueError,
        "^'params': .* leaves every block alone",
    ),
    (
        lambda: bma.partition(SQUARE, bma.within("block", NEAR)),
        ValueError,
        "^'params': .* leaves every block alone.*within",
    ),
    (
        lambda: bma.partition(SQUARE, OfMine(reach=(1,))),
        ValueError,
        r"^'params' of shape \(4, 4\): .* gave \(1,\) for its reach",
    ),
    *(
        (
            lambda reach=reach: bma.partition(SQUARE, OfMine(reach=reach)),
            ValueError,
            "for its reach",
        )
        for reach in [(-1, 1), (1.5, 1), (None, 1)]
    ),
    (
        lambda: bma.partition({"u": SQUARE}, OfMine(scope="layers")),
        ValueError,
        "^'u': .* gave 'layers' for its scope.*'layer'",
    ),
    (
        lambda: bma.partition(SQUARE, bma.within("layer", OfMine(scope=["all"]))),
        ValueError,
        r"gave \['all'\] for its scope",
    ),
    *(
        (
            lambda axes=axes: bma.partition(SQUARE, OfMine(axes=axes)),
            ValueError,
            "for its stacked axes",
        )
        for axes in ((-1,), 0)
    ),
    (
        lambda: bma.partition({"d": {"b": SQUARE, "w": SQUARE}}, TWO_BOUNDS),
        ValueError,
        "^'d/w': .* merges it into one block .*'array', not 'layer'",
    ),
    *(
        (
            lambda shape=shape, rule=rule: jax.eval_shape(
                bma.scale_by_newton_bma(rule).init, like(*shape)
            ),
            ValueError,
            f"^'u' of shape .*{message}",
        )
        for shape, rule, message in [
            ((4, 5, 5000), TILES, "matrix of 5,000 rows.*larger tiles"),
            ((256, 256, 256), TILES, "held.*a tile for each axis"),
            ((10**5,), bma.per_tile((1,), reach=10**5), "held"),
        ]
    ),
]

project, from_expansions = (
    bma.BlockMeanMatrix.project,
    bma.BlockMeanMatrix.from_expansions,
)
EYE, BATCH = np.eye(3), bma.BlockMeanMatrix(ones(2, 2), ones(2, 2, 2), (1, 2))
MATRICES = [
    (lambda: project(EYE, (2, 2)), ValueError, r"\(4, 4\)"),
    (lambda: project(EYE, (3, 0)), ValueError, "positive"),
    (lambda: bma.BlockMeanMatrix(ones(2), np.eye(2), (1, 0)), ValueError, "positive"),
    (lambda: from_expansions(ones(2), EYE, (1, 2)), ValueError, "3"),
    (
        lambda: bma.BlockMeanMatrix(ones(3), np.eye(2), (1, 2)),
        ValueError,
        "must end in",
    ),
    (
        lambda: bma.BlockMeanMatrix(ones(2), np.eye(1), (1, 2)),
        ValueError,
        "must end in",
    ),
    *(
        (
            lambda sizes=sizes: project(EYE, sizes, ones(2)),
            ValueError,
            r"`weights` must have shape \(3,\)",
        )
        for sizes in [(1, 2), (2, 1)]
    ),
    (lambda: project(np.eye(3, dtype="int32"), (3,)), TypeError, "int32"),
    (lambda: project(EYE, (3,)).matvec(ones(2)), ValueError, r"\(3,\)"),
    (lambda: project(EYE, (3,)).power(jnp.ones(())), TypeError, "Python number"),
    (lambda: BATCH.matvec(ones(3)), ValueError, "vmap"),
    (lambda: BATCH.eigenvalues(), ValueError, "vmap"),
]


def refresh(curvature):
    return update(
        bma.scale_by_newton_bma(curvature=curvature), TREE, TREE, value_fn=loss
    )


CURVATURES = [
    (lambda: bma.newton_bma(curvature=bma.Hessian), TypeError, "bma.Curvature"),
    (lambda: bma.Operator(EYE), TypeError, "Pass lambda params: lambda v: A @ v"),
    (lambda: bma.Operator(3), TypeError, "must be a function, got 3"),
    (lambda: bma.Hessian(diagonal_fn=X), TypeError, "`diagonal_fn`"),
    (lambda: bma.Hessian(num_probes=1), ValueError, "`num_probes`"),
    (lambda: bma.Hessian(num_probes=2.5), ValueError, "`num_probes`"),
    (
        lambda: bma.Curvature().linearize(X, jax.random.key(0), None, {}),
        NotImplementedError,
        None,
    ),
    (
        lambda: refresh(bma.Operator(lambda p: p)),
        TypeError,
        r"`product_fn` must return a function v -> G v.*lambda params: lambda v: A",
    ),
    (
        lambda: refresh(bma.GaussNewton(lambda p: p, lambda y: (loss(y), 1))),
        TypeError,
        "`loss_fn` must return",
    ),
    (
        lambda: refresh(bma.GaussNewton(lambda p: p, lambda y: y["a"])),
        TypeError,
        "`loss_fn` must return",
    ),
    (
        lambda: refresh(bma.GaussNewton(lambda p: jnp.arange(3), lambda y: jnp.sum(y))),
        TypeError,
        "`model_fn`.*int32",
    ),
    *(
        (
            lambda losses=losses: refresh(
                bma.Fisher(lambda p: p, lambda key, y: y, losses)
            ),
            error,
            message,
        )
        for losses, error, message in [
            (lambda y, z: (y["a"], 1), TypeError, r"`losses_fn` .*\(n,\)"),
            (lambda y, z: 1.0, TypeError, r"`losses_fn` .*got a float"),
            (lambda y, z: jnp.sum(y["a"]), ValueError, r"shape \(n,\)"),
        ]
    ),
]

PRECONDITIONERS = [
    (
        lambda: bma.preconditioner(EYE, X),
        TypeError,
        "`product_fn`.*lambda v",
    ),
    (lambda: bma.preconditioner(lambda v: v, "x"), TypeError, "array"),
    (
        lambda: apply(ones(3, 3), X),
        ValueError,
        r"shape \(3, 3\).*of \(3,\).*jax.vmap\(C\)",
    ),
    (lambda: apply(ones(3, 1), X), ValueError, r"shape \(3, 1\)"),
    (lambda: apply(ones(1), X), ValueError, r"shape \(1,\)"),
    (lambda: apply(ones(1, 4), ones(2, 4)), ValueError, r"shape \(1, 4\)"),
    (lambda: apply(ones(8), ones(2, 4)), ValueError, r"shape \(8,\)"),
    (lambda: apply(X, TREE), ValueError, "'params' has shape"),
    (lambda: apply({"a": X}, TREE), ValueError, "'b' has shape none"),
    (lambda: apply(TREE | {"c": X}, TREE), ValueError, "'c'"),
    (
        lambda: apply(TREE | {"b": ones(5, 2, 2)}, TREE),
        ValueError,
        r"'b' .*\(5, 2, 2\)",
    ),
    (lambda: apply(np.arange(3, dtype="int32"), X), TypeError, "int32. Pass"),
    (
        lambda: apply(X.astype(np.complex64), X),
        TypeError,
        "complex64. Pass the real and the imaginary",
    ),
    (lambda: apply(X > 0, X), TypeError, "bool. Pass"),
]

KERNEL = {"kernel": ones(3, 2)}
FITTING = bma.partition(KERNEL, bma.per_unit)
STATE = bma.scale_by_bma(bma.per_unit).init(KERNEL)
DIAGNOSTICS = [
    (lambda: bma.diagnostics(STATE, grads=KERNEL), ValueError, "need `blocks`"),
    (
        lambda: bma.diagnostics(STATE, bma.partition(KERNEL)),
        ValueError,
        "do not fit a ScaleByBMAState",
    ),
    (
        lambda: bma.diagnostics(STATE, bma.partition({"kernel": ones(2)})),
        ValueError,
        "do not fit a ScaleByBMA",
    ),
    (
        lambda: bma.diagnostics(STATE, FITTING, {"kernel": ones(3)}),
        ValueError,
        "^'kernel'",
    ),
    (
        lambda: bma.diagnostics(STATE, FITTING, estimator="x"),
        ValueError,
        "`estimator` must be one of",
    ),
    (
        lambda: bma.diagnostics(
            bma.scale_by_newton_bma(bma.per_unit).init(KERNEL), bma.partition(KERNEL)
        ),
        ValueError,
        "`blocks` do not fit .* its reach included",
    ),
    (
        lambda: bma.diagnostics(STATE, bma.per_unit),
        TypeError,
        "`blocks` must be a partition",
    ),
    (
        lambda: bma.diagnostics(optax.adam(0.1).init(KERNEL)),
        ValueError,
        "no state of a BMA transformation",
    ),
]

LEARNED = {"partition": bma.units, "weights": "learned"}
WEIGHTS = [
    row
    for make in (bma.scale_by_bma, bma.scale_by_adam_bma)
    for row in (
        (
            lambda make=make: make(partition=bma.units, weights="all"),
            ValueError,
            "`weights` must be one of.*'all'",
        ),
        *(
            (
                lambda make=make, other=other: make(**LEARNED | other).init(KERNEL),
                ValueError,
                message,
            )
            for other, message in [
                ({"partition": bma.per_unit}, r"bma\.units.*projection"),
                ({"estimator": "report"}, r"bma\.units.*projection"),
                (
                    {"partition": bma.within("block", bma.per_tile((2,)))},
                    r"^'kernel' of shape \(3, 2\).*do not divide",
                ),
            ]
        ),
        *(
            (
                lambda make=make, mine=mine, theirs=theirs: update(
                    make(**LEARNED | mine), LAYER, LAYER, make(**LEARNED | theirs)
                ),
                ValueError,
                message,
            )
            for mine, theirs, message in [
                *(
                    ({"weights": x}, {"weights": y}, f"state has {y} weights.*'{x}'")
                    for x, y in itertools.permutations(("constant", "learned"))
                ),
                (
                    {"partition": bma.within("block", bma.per_column)},
                    {"partition": bma.within("block", bma.per_row)},
                    r"'layer/w'.*direction of shape \(1, 2\).* \(2, 1\)",
                ),
            ]
        ),
    )
]

SUGGESTIONS = [
    (
        lambda: bma.suggest_partition(lambda u, key: loss(u), X, key=1),
        ValueError,
        "suggest_partition has an argument of that",
    ),
    (
        lambda: bma.suggest_partition(lambda u: jnp.sum(jnp.sqrt(u)), -SQUARE),
        ValueError,
        "not finite",
    ),
    (  # Its curvature is finite.
        lambda: bma.suggest_partition(lambda u: jnp.nansum((u - jnp.nan) ** 2), SQUARE),
        ValueError,
        "gradient of `value_fn` for 'params' is not finite",
    ),
    (  # Finite nearby is not enough.
        lambda: bma.suggest_partition(lambda u: jnp.sum(jnp.abs(u) ** 1.5), 0 * SQUARE),
        ValueError,
        "not finite",
    ),
    (
        lambda: bma.suggest_partition(loss, like(9, 9)),
        TypeError,
        "'u' is a shape without numbers",
    ),
    (
        lambda: jax.jit(lambda u: bma.suggest_partition(loss, u))(X),
        ValueError,
        "before jax.jit",
    ),
]

TABLE = {
    "optimisers": OPTIMISERS,
    "parameters": PARAMETERS,
    "updates": UPDATES,
    "rules": RULES,
    "reaches": REACHES,
    "block mean matrices": MATRICES,
    "curvatures": CURVATURES,
    "preconditioners": PRECONDITIONERS,
    "diagnostics": DIAGNOSTICS,
    "weights": WEIGHTS,
    "suggestions": SUGGESTIONS,
}


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        pytest.param(*row, id=f"{of} {number}")
        for of, rows in TABLE.items()
        for number, row in enumerate(rows)
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()
