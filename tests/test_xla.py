"""What the tricks for XLA are for, on compiled programs: each fails without its trick.

If one fails with the trick, or a program is as good without, XLA has learned to do it:
take the trick out.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bma_optax as bma
from bma_optax import _xla

LARGE = (256, 256)
LIKE = {"a.kernel": jnp.zeros(LARGE), "b.kernel": jnp.zeros(LARGE)}
BYTES = 4 * 256 * 256


def temporaries(function, *args, **kwargs):
    """Their bytes over those of one array."""
    program = jax.jit(function, **kwargs).lower(*args).compile()
    return program.memory_analysis().temp_size_in_bytes / BYTES


def of_update(tx):
    """Of a step to which gradients and state are given away."""
    return temporaries(tx.update, LIKE, tx.init(LIKE), donate_argnums=(0, 1))


def first(x, *_):
    return x


@pytest.mark.parametrize(
    ("trick", "make"),
    [
        ("recompute", lambda: bma.scale_by_bma(form="symmetric")),
        ("after", lambda: bma.scale_by_mini_bma()),
        ("after", lambda: bma.scale_by_bma(bma.units, weights="learned")),
    ],
    ids=["symmetric", "mini", "learned"],
)
def test_a_step_copies_no_array(monkeypatch, trick, make):
    assert of_update(make()) < 0.1
    monkeypatch.setattr(_xla, trick, first)
    assert of_update(make()) > 0.9


def test_a_bare_root_is_a_part_of_the_sum_over_it():
    def guarded(x):
        return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)

    x = jnp.ones(LARGE)
    assert temporaries(lambda x: jnp.sum(_xla.sqrt(x)), x) < 0.1
    assert temporaries(lambda x: jnp.sum(guarded(x)), x) > 0.9
    np.testing.assert_array_equal(
        jax.vmap(jax.grad(_xla.sqrt))(jnp.array([0.0, 4.0])), [0, 0.25]
    )


def test_what_is_materialized_is_not_computed_for_each_element_of_a_block():
    def fusions(keep):
        def function(x, y):
            return x + keep(jnp.maximum(x[:, :1], 0.3), y[:, :1])

        x = jnp.ones(LARGE)
        text = jax.jit(function).lower(x, x).compile().as_text()
        return text[text.index("ENTRY") :].count(" fusion(")

    assert fusions(_xla.materialize) == 2
    assert fusions(first) == 1


def test_a_step_rule_stores_fewer_arrays(monkeypatch):
    def loss(u):
        return sum(jnp.sum(jnp.diff(u, axis=k) ** 2) for k in (0, 1)) + jnp.sum(u**2)

    def stored():
        u, tx = jnp.ones(LARGE), bma.scale_by_quadratic_model()
        update = functools.partial(tx.update, value_fn=loss)
        return temporaries(update, u, tx.init(u), u)

    few = stored()
    monkeypatch.setattr(_xla, "materialize_for_sums", first)
    assert stored() > few + 1


def test_values_stay():
    x = jnp.array([[1.0, jnp.nan, jnp.inf]])
    np.testing.assert_array_equal(_xla.materialize_for_sums(x, jnp.zeros((1, 3))), x)
    np.testing.assert_array_equal(_xla.materialize(x, jnp.zeros((1, 3))), x)
    np.testing.assert_array_equal(_xla.recompute(x), x)
    np.testing.assert_array_equal(_xla.after(x, jnp.ones((4, 3))), x)


def test_other_platforms_compute_as_they_see_fit():
    x = jnp.ones(3)
    exported = jax.export.export(jax.jit(_xla.materialize), platforms=["cuda"])(x, x)
    assert "divide" not in exported.mlir_module()
