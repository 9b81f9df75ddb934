"""Bad input gives the errors and warnings that the site's table of troubles lists."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bma_optax as bma

PAGE = Path(__file__).parent.parent / "docs" / "troubles.md"
ROWS = dict(re.findall(r"^\| ([^|]*?) \| `+([^|]*?) ?`+ \|$", PAGE.read_text(), re.M))
PARAMS = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}


def update(tx, grads, params=PARAMS, **kwargs):
    return tx.update(grads, tx.init(PARAMS), params, **kwargs)


@jax.custom_vjp
def square(x):
    return jnp.sum(x**2)


def double(x):
    """Doubles x by a callback, which JAX cannot differentiate."""
    return jax.pure_callback(lambda x: 2 * np.asarray(x), x, x)


square.defvjp(lambda x: (square(x), x), lambda x, g: (g * double(x),))


def once(params):
    return sum(map(square, jax.tree.leaves(params)))


def whole(params):
    return jnp.sum(params["w"] @ params["b"])


@jax.jit  # Otherwise each of its operations is a program.
def nonlocal_loss(u):
    return jnp.sum(jnp.diff(u) ** 2) + (u[0] - u[16]) ** 2


def far():
    u = jnp.ones(32)
    tx = bma.newton_bma(bma.per_tile((4,), reach=1))
    state = jax.jit(tx.init)(u)
    tx.update(jax.grad(nonlocal_loss)(u), state, u, value_fn=nonlocal_loss)


def under_x64():
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype("float64"), PARAMS)
        update(bma.scale_by_bma(), wide, wide)


CASES = {
    "an integer leaf": lambda: bma.scale_by_bma().init({"n": jnp.arange(3)}),
    "a function or a string as a leaf": lambda: bma.scale_by_bma().init(
        {"f": jnp.tanh}
    ),
    "a complex leaf": lambda: bma.mini_bma(1.0).init(jnp.ones(2, "complex64")),
    "gradients of another structure": lambda: update(
        bma.scale_by_bma(), PARAMS | {"c": jnp.ones(2)}
    ),
    "gradients in a tuple, parameters in a list": lambda: bma.scale_by_bma().update(
        (jnp.ones(2),), bma.scale_by_bma().init([jnp.ones(2)])
    ),
    "a gradient that is missing": lambda: update(
        bma.scale_by_adam_bma(), {"w": PARAMS["w"]}
    ),
    "a gradient of another shape": lambda: update(
        bma.scale_by_mini_bma(), PARAMS | {"b": jnp.ones(4)}
    ),
    "gradients of integers": lambda: update(
        bma.scale_by_bma(), PARAMS | {"w": jnp.ones((4, 3), int)}
    ),
    "a state saved under another `jax_enable_x64`": under_x64,
    "a decay of 16 bits, by `inject_hyperparams`": lambda: optax.inject_hyperparams(
        bma.scale_by_adam_bma
    )().init(jnp.ones(3, "bfloat16")),
    "a rule in the place of the rate": lambda: bma.adam_bma(bma.per_unit),
    "a rule that is called": lambda: bma.per_leaf(),
    "no random key": lambda: bma.newton_bma(key=None),
    "an unknown form": lambda: bma.scale_by_bma(form="right"),
    "a negative number": lambda: bma.scale_by_newton_bma(min_eigenvalue=-1),
    "a number that is NaN": lambda: bma.scale_by_bma(eps=np.nan),
    "no rule": lambda: bma.scale_by_bma("per_leaf"),
    "a rule that gives nonsense": lambda: bma.partition(
        PARAMS, bma.by_function(lambda path, shape: (2.5,) * len(shape))
    ),
    "a tile that does not fit an array": lambda: bma.partition(
        jnp.ones((2, 16, 16)), bma.per_tile((4, 4))
    ),
    "a reach of another length than the tile": lambda: bma.newton_bma(
        bma.per_tile((4, 4), reach=(1,))
    ).init(jnp.ones((16, 16))),
    "units whose axis the name does not tell": lambda: bma.mini_bma(1.0).init(
        {"theta": jnp.ones((4, 3))}
    ),
    "a pattern that matches nothing": lambda: bma.scale_by_bma(
        bma.by_path({"bias": None})
    ).init(PARAMS),
    "more blocks than fit": lambda: bma.partition(
        jax.ShapeDtypeStruct((50_000,), "float32"), bma.per_element
    ),
    "more than a thousand blocks in one group": lambda: bma.partition(
        jax.ShapeDtypeStruct((1001,), "float32"), bma.per_element
    ),
    "more fields than fit, with a reach": lambda: jax.eval_shape(
        bma.scale_by_newton_bma(bma.per_tile((4, 4), reach=1)).init,
        jax.ShapeDtypeStruct((4, 5, 5000), "float32"),
    ),
    "units of two shapes, in mini-BMA": lambda: bma.scale_by_mini_bma(
        partition=bma.per_tile((3,))
    ).init(PARAMS),
    "a curvature that is not as local as declared": far,
    "a loss that is not twice differentiable": lambda: update(
        bma.newton_bma(), PARAMS, value_fn=once
    ),
    "an argument of the loss that is named `value` or `grad`": lambda: update(
        bma.newton_bma(), PARAMS, value_fn=lambda p, value: once(p) * value, value=1.0
    ),
    "a loss that needs a `key`, to `suggest_partition`": lambda: bma.suggest_partition(
        lambda p, key: once(p), PARAMS, key=jax.random.key(0)
    ),
    "a loss that needs what `optax.masked` took away": lambda: update(
        optax.masked(bma.newton_bma(), {"w": True, "b": False}), PARAMS, value_fn=whole
    ),
    "a loss that returns more than a number": lambda: update(
        bma.newton_bma(), PARAMS, value_fn=lambda p: (once(p), "aux")
    ),
    "a product of another shape": lambda: bma.preconditioner(
        lambda v: v | {"b": jnp.ones(4)}, PARAMS
    ),
    "a product that is not symmetric, to a preconditioner": lambda: bma.preconditioner(
        lambda v: v + jnp.cumsum(v), jnp.ones(8)
    ),
    "several vectors, to a preconditioner": lambda: jax.eval_shape(
        lambda: bma.preconditioner(lambda v: v, jnp.ones(3))(jnp.ones((2, 3)))
    ),
    "no loss, where there is curvature": lambda: update(
        bma.scale_by_newton_bma(), PARAMS
    ),
    "no parameters, where there is curvature": lambda: update(
        bma.newton_bma(), PARAMS, None, value_fn=once
    ),
    "a curvature that is none": lambda: bma.natural_bma(once),
    "blocks of another partition, in diagnostics": lambda: bma.diagnostics(
        bma.scale_by_bma(bma.per_unit).init(PARAMS), bma.partition(PARAMS)
    ),
    "a state of another library, in diagnostics": lambda: bma.diagnostics(
        optax.adam(1.0).init(PARAMS)
    ),
}


def test_the_table_is_whole():
    assert list(ROWS) == list(CASES)


@pytest.mark.parametrize("case", CASES)
def test_says_so(case):
    kind, message = ROWS[case].split(": ", 1)
    kind = {k.__name__: k for k in (TypeError, ValueError, UserWarning)}[kind]
    catching = pytest.warns if kind is UserWarning else pytest.raises
    with catching(kind, match=re.escape(message)):
        CASES[case]()


def test_recipes_for_freezing_arrays():
    """Both recipes reach the least loss over the arrays that are not frozen."""

    def loss(p):
        return jnp.mean((p["w"] + p["b"] - jnp.arange(12.0).reshape(4, 3)) ** 2)

    names = {"jax": jax, "optax": optax, "bma": bma, "loss": loss}
    recipes = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(recipes) == 2
    for recipe in recipes:
        names["params"] = PARAMS | {"b": jnp.ones((1, 3))}
        exec(recipe, names)
        np.testing.assert_array_equal(names["params"]["b"], 1)
        least = jnp.arange(12.0).reshape(4, 3) - 1
        np.testing.assert_allclose(names["params"]["w"], least, atol=1e-4)
