"""Curvature of models with a custom_vjp, which JAX knows in reverse mode alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bma_optax as bma

pytestmark = pytest.mark.usefixtures("x64")

cross_entropy = optax.softmax_cross_entropy_with_integer_labels
RNG = np.random.default_rng(0)
X, LABELS = RNG.standard_normal((6, 4)), np.arange(6) % 3
PARAMS = RNG.standard_normal((4, 3))


def slope(x):
    return 1 - jnp.tanh(x) ** 2


def on_host(fn, *args):
    """Calls NumPy, which JAX cannot differentiate; as a kernel of another language."""
    like = jax.ShapeDtypeStruct(args[0].shape, args[0].dtype)
    return jax.pure_callback(
        lambda *args: np.asarray(fn(*args)), like, *args, vmap_method="sequential"
    )


def saved(x):
    return jnp.tanh(x), x


@jax.custom_vjp
def plain(x):
    return jnp.tanh(x)


plain.defvjp(saved, lambda x, g: (g * slope(x),))


@jax.custom_vjp
def backward(x, g):
    return g * slope(x)


backward.defvjp(
    lambda x, g: (backward(x, g), (x, g)),
    lambda xg, h: (-2 * h * xg[1] * jnp.tanh(xg[0]) * slope(xg[0]), h * slope(xg[0])),
)


@jax.custom_vjp
def twice(x):
    """Its backward pass is a custom_vjp too: the Hessian has no forward mode."""
    return jnp.tanh(x)


twice.defvjp(saved, lambda x, g: (backward(x, g),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 2))
def static(power, x, name):
    return jnp.tanh(x) ** power


static.defvjp(
    lambda power, x, name: (jnp.tanh(x), (x, jnp.arange(3), name == "tanh")),
    lambda power, name, saved, g: (g * slope(saved[0]),),
)


@jax.custom_vjp
def foreign(x):
    """A backward pass that is linear in g, but not differentiable in x."""
    return jnp.tanh(x)


foreign.defvjp(saved, lambda x, g: (g * on_host(lambda x: 1 - np.tanh(x) ** 2, x),))


@jax.custom_vjp
def opaque(x):
    return jnp.tanh(x)


opaque.defvjp(
    saved, lambda x, g: (on_host(lambda x, g: g * (1 - np.tanh(x) ** 2), x, g),)
)


def scanned(x):
    return jax.lax.scan(lambda c, _: (plain(c), None), x, length=1)[0]


@jax.custom_vjp
def losses_of(z):
    return cross_entropy(z, LABELS)


losses_of.defvjp(
    lambda z: (losses_of(z), z),
    lambda z, g: (g[:, None] * (jax.nn.softmax(z) - jax.nn.one_hot(LABELS, 3)),),
)

MODELS = {
    "plain": plain,
    "twice": twice,
    "static": lambda x: static(1, x, "tanh"),
    "foreign": foreign,
    "opaque": opaque,
    "in scan": scanned,
    "in vmap of checkpoint of scan": jax.vmap(jax.checkpoint(scanned)),
    "in jit": jax.jit(plain),
    "nested": lambda x: plain(jnp.arctanh(twice(x))),
    "the loss too": jnp.tanh,
}


def curvatures(activation, losses):
    def model(params):
        return activation(jnp.asarray(X, params.dtype) @ params)

    def loss(params):
        return jnp.mean(losses(model(params)))

    return loss, {
        "Hessian": bma.Hessian(),
        "GaussNewton": bma.GaussNewton(model, lambda z: jnp.mean(losses(z))),
        "Fisher": bma.Fisher(model, jax.random.categorical, lambda z, y: losses(z)),
    }


def dense():
    """The matrices of the plain model, from its Jacobian."""
    z = np.tanh(X @ PARAMS)
    J = np.zeros((6, 3, 4, 3))
    for k in range(3):
        J[:, k, :, k] = X * (1 - z[:, k : k + 1] ** 2)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    residual = p - np.eye(3)[LABELS]
    rows = np.einsum("nk,nkij->nij", residual, J).reshape(6, 12)
    H = np.einsum("nk,kl->nkl", p, np.eye(3)) - p[:, :, None] * p[:, None, :]
    J = J.reshape(6, 3, 12)
    gauss_newton = np.einsum("nka,nkl,nlb->ab", J, H, J) / 6
    bend = np.zeros((4, 3, 4, 3))
    for k in range(3):
        second = -2 * residual[:, k] * z[:, k] * (1 - z[:, k] ** 2)
        bend[:, k, :, k] = np.einsum("n,ni,nj->ij", second, X, X) / 6
    fisher = rows.T @ rows / 6
    return {
        "Hessian": gauss_newton + bend.reshape(12, 12),
        "GaussNewton": gauss_newton,
        "Fisher": fisher,  # Its labels are given here.
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_custom_vjp_in_the_model(name):
    losses = losses_of if name == "the loss too" else lambda z: cross_entropy(z, LABELS)
    loss, found = curvatures(MODELS[name], losses)
    refused = {"opaque": list(found), "foreign": ["Hessian"]}.get(name, [])

    def columns(curvature, params):
        product = curvature.linearize(params, jax.random.key(0), loss, {})
        return jax.lax.map(product, jnp.eye(12).reshape(12, 4, 3), batch_size=12)

    for kind in refused:
        with pytest.raises(TypeError, match=r"has no .*Operator .* instead\."):
            jax.jit(functools.partial(columns, found[kind]))(PARAMS)
    known = {kind: G for kind, G in found.items() if kind not in refused}
    matrices = jax.jit(lambda params: {k: columns(known[k], params) for k in known})
    for kind, G in matrices(PARAMS).items():
        G = np.asarray(G).reshape(12, 12)
        np.testing.assert_allclose(G, dense()[kind], atol=1e-12, err_msg=kind)


def test_what_the_error_advises_works():
    """``GaussNewton`` or one's own ``Operator`` works where ``Hessian`` is refused."""
    loss, found = curvatures(foreign, lambda z: cross_entropy(z, LABELS))
    G = dense()["GaussNewton"]

    def operator(params):
        return lambda v: (jnp.asarray(G, v.dtype) @ v.reshape(-1)).reshape(4, 3)

    def step(curvature, params):
        tx = bma.newton_bma(learning_rate=0.5, curvature=curvature)
        grads = jax.grad(loss)(params)
        return tx.update(grads, tx.init(params), params, value_fn=loss)[0]

    with jax.enable_x64(False):  # Callbacks run in a thread with that setting.
        params, steps = jnp.asarray(PARAMS, "float32"), []
        with pytest.raises(TypeError, match=r"Pass bma\.GaussNewton"):
            jax.eval_shape(functools.partial(step, bma.Hessian()), params)
        loss = jax.jit(loss)
        for curvature in (found["GaussNewton"], bma.Operator(operator)):
            steps.append(jax.jit(functools.partial(step, curvature))(params))
            assert loss(params + steps[-1]) < loss(params)
        np.testing.assert_allclose(*steps, rtol=1e-3)


@jax.custom_jvp
def slope_of_square(x):
    return 2 * x


@jax.custom_jvp
def square(x):
    return jnp.sum(x**2)


def double(v):
    """A callback without a rule for ``vmap``."""
    return jax.pure_callback(lambda v: 2 * np.asarray(v), v, v)


slope_of_square.defjvp(lambda x, v: (slope_of_square(*x), double(*v)))
square.defjvp(lambda x, v: (square(*x), jnp.vdot(slope_of_square(*x), *v)))


def test_a_product_that_cannot_be_batched_is_still_one():
    x = jnp.asarray(PARAMS)
    product = bma.Hessian().linearize(x, jax.random.key(0), square, {})
    np.testing.assert_allclose(product(x), 2 * x)
    with pytest.raises(NotImplementedError, match="vmap"):
        jax.vmap(product)(x[None])


def test_an_error_of_the_function_itself_is_left_alone():
    def loss(params):
        raise ValueError("mine")

    def vector(params):
        return params

    for f, kind, words in [
        (loss, ValueError, "mine"),
        (vector, TypeError, "one floating number"),
    ]:
        with pytest.raises(kind, match=words):
            bma.Hessian().linearize(jnp.asarray(PARAMS), jax.random.key(0), f, {})
