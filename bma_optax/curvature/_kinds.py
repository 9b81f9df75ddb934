"""The kinds of curvature: which matrix G is in eq. 1 of Lu et al. 2018.

    θ <- θ - η G^-1 ∇f(θ)

Each class is a static value whose ``linearize`` returns the product v -> G v at given
parameters; v and G v are trees like params. G is symmetric, d x d for d parameters, and
never built. Newton's method takes the Hessian, the natural gradient the Fisher matrix.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from bma_optax import _checks
from bma_optax.curvature import _derivatives, _user_functions
from bma_optax.curvature._derivatives import Product

# What a user is told to pass to `Operator` in the place of a matrix.
_OPERATOR = "lambda params: lambda v: A @ v"


@dataclasses.dataclass(frozen=True)
class Curvature:
    """The base class of curvatures: a symmetric d x d matrix G at given parameters.

    To define a curvature of your own, derive from this class and define ``linearize``.
    Instances are static and hashable.

    The diagonal of G is given by ``diagonal_fn`` or found by probing. If d <=
    ``num_probes``, probing takes one product for each entry and is exact. Otherwise it
    averages x ∘ G x over ``num_probes`` vectors x of random signs (Hutchinson) and
    takes ``max(|mean|, standard error)``; the standard error of entry i is
    √(Σ_{j≠i} G_ij² / num_probes). With several arrays and ``num_probes`` >= 12, the
    first six vectors only find the scale of each array.

    Args:
      diagonal_fn: ``params -> diag G``, a tree like params; None if it is not known.
        Keywords of ``update`` that its signature names are passed on to it.
      num_probes: the number of products that probing may take, an integer >= 2.

    Raises:
      ValueError: if ``num_probes`` is not an integer of at least 2.
      TypeError: if an argument that must be a function cannot be called.

    Example:
      >>> import jax.numpy as jnp, bma_optax as bma
      >>> class Scaled(bma.Curvature):
      ...     def linearize(self, params, key, value_fn, extra_args):
      ...         return lambda v: 2 * v
      >>> Scaled(num_probes=8)
      Scaled(diagonal_fn=None, num_probes=8)

    Source: Lu et al. 2018, eq. 1; Bekas, Kokiopoulou and Saad, An estimator for the
    diagonal of a matrix, Applied Numerical Mathematics 57, 2007.
    """

    diagonal_fn: Callable[..., Any] | None = dataclasses.field(
        default=None, kw_only=True
    )
    num_probes: int = dataclasses.field(default=32, kw_only=True)

    def __post_init__(self):
        if not _checks.is_integer(self.num_probes) or self.num_probes < 2:
            raise ValueError(
                f"`num_probes` must be an integer >= 2, got {self.num_probes!r}."
            )
        object.__setattr__(self, "num_probes", int(self.num_probes))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_fn") and not (value is None and field.kw_only):
                is_operator = field.name == "product_fn"
                advice = _OPERATOR if is_operator else "a function"
                _checks.functions(advice, **{field.name: value})

    def linearize(
        self, params: Any, key: jax.Array, value_fn: Any, extra_args: dict[str, Any]
    ) -> Product:
        """Returns the product v -> G v at ``params``.

        Args:
          params: the parameters, a tree of real floating arrays.
          key: a typed random key, for curvatures that are sampled.
          value_fn: the loss that was given to ``update``, or None.
          extra_args: the other keywords that were given to ``update``.

        Returns:
          A linear function from trees like ``params`` to trees like ``params``.

        Example:
          >>> import jax, jax.numpy as jnp, bma_optax as bma
          >>> f = lambda x: jnp.sum(x ** 4)
          >>> product = bma.Hessian().linearize(jnp.ones(2), jax.random.key(0), f, {})
          >>> print(product(jnp.array([1.0, 0.0])))
          [12.  0.]
        """
        raise NotImplementedError

    def diagonal(self, params: Any, extra_args: dict[str, Any]) -> Any:
        """Returns the diagonal of G as a tree like ``params``, None if it is not known.

        Args:
          params: the parameters, a tree of real floating arrays.
          extra_args: the keywords that were given to ``update``.

        Example:
          >>> import jax.numpy as jnp, bma_optax as bma
          >>> bma.Hessian().diagonal(jnp.ones(2), {}) is None
          True
        """
        if self.diagonal_fn is None:
            return None
        return _user_functions.bind(self.diagonal_fn, extra_args, "diagonal_fn")(params)


@dataclasses.dataclass(frozen=True)
class Hessian(Curvature):
    r"""The Hessian of ``value_fn``, :math:`G = \nabla^2 f`: Newton's G.

    It may be indefinite. A product differentiates the gradient in forward mode and
    costs about two gradients.

    Args:
      diagonal_fn, num_probes: see :class:`Curvature`.

    Example:
      >>> import jax, jax.numpy as jnp, bma_optax as bma
      >>> f = lambda x: x[0] ** 2 + 3 * x[0] * x[1]
      >>> G = bma.Hessian().linearize(jnp.ones(2), jax.random.key(0), f, {})
      >>> print(G(jnp.array([1.0, 0.0])))
      [2. 3.]

    Source: Lu et al. 2018, eq. 1; Pearlmutter, Fast exact multiplication by the
    Hessian, Neural Computation 6, 1994.
    """

    def linearize(self, params, key, value_fn, extra_args):
        """Returns v -> ∇²f v; see :meth:`Curvature.linearize`."""
        del key
        f = _user_functions.loss(value_fn, extra_args)
        instead = (
            "bma.GaussNewton, which takes first derivatives of the model alone, or "
            f"{_derivatives.OPERATOR}"
        )
        return _derivatives.hessian(f, params, "value_fn", instead)


@dataclasses.dataclass(frozen=True)
class GaussNewton(Curvature):
    r"""The generalised Gauss-Newton matrix :math:`G = J^T H J`.

    J is the Jacobian of ``model_fn``, and H is the Hessian of ``loss_fn`` at the
    model's outputs. Second derivatives of the model are left out. G is positive
    semi-definite if ``loss_fn`` is convex. It is the Fisher matrix if ``loss_fn`` is
    the negative log likelihood of an exponential family in its natural parameters.

    Args:
      model_fn: ``params -> outputs``, any pytree. Keywords of ``update`` that its
        signature names, such as ``batch``, are passed on to it.
      loss_fn: ``outputs -> loss``, shape (). It is passed keywords in the same way.
      diagonal_fn, num_probes: see :class:`Curvature`.

    Example:
      >>> import jax, jax.numpy as jnp, bma_optax as bma
      >>> x = jnp.array([[1.0, 2.0]])
      >>> curvature = bma.GaussNewton(lambda w: x @ w, lambda y: jnp.sum(y ** 2) / 2)
      >>> G = curvature.linearize(jnp.zeros(2), jax.random.key(0), None, {})
      >>> print(G(jnp.array([1.0, 0.0])))
      [1. 2.]

    Source: Schraudolph, Fast curvature matrix-vector products, Neural Computation 14,
    2002.
    """

    model_fn: Callable[..., Any]
    loss_fn: Callable[..., jax.Array]

    def linearize(self, params, key, value_fn, extra_args):
        """Returns v -> Jᵀ H J v; see :meth:`Curvature.linearize`."""
        del key, value_fn
        model = _user_functions.bind(self.model_fn, extra_args, "model_fn")
        loss = _user_functions.bind(self.loss_fn, extra_args, "loss_fn")
        outputs, jacobian, transpose = _derivatives.jacobian(
            lambda p: _user_functions.floating(model(p), "model_fn"), params, "model_fn"
        )
        outer = _derivatives.hessian(
            _user_functions.scalar(loss, "loss_fn"), outputs, "loss_fn"
        )
        return lambda v: transpose(outer(jacobian(v)))


@dataclasses.dataclass(frozen=True)
class Fisher(Curvature):
    r"""The Fisher information matrix: the natural gradient's G.

    .. math:: G = \frac1n \sum_i s_i s_i^T, \qquad
              s_i = \nabla \log p(y_i \mid x_i, \theta), \quad y_i \sim p

    Labels y_i are drawn from the model, anew at each refresh, so that G is an unbiased
    estimate.

    Args:
      model_fn: ``params -> outputs``, any pytree. Keywords of ``update`` that its
        signature names, such as ``batch``, are passed on to it; the two functions below
        are passed keywords in the same way.
      sample_fn: ``(key, outputs) -> labels``, such as ``jax.random.categorical``.
      losses_fn: ``(outputs, labels) -> losses``, the n values -log p(y_i), shape (n,),
        such as ``optax.softmax_cross_entropy_with_integer_labels``.
      diagonal_fn, num_probes: see :class:`Curvature`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, bma_optax as bma
      >>> x = jnp.array([[1.0, -1.0]])
      >>> curvature = bma.Fisher(
      ...     lambda w: x @ w, jax.random.categorical,
      ...     optax.softmax_cross_entropy_with_integer_labels)
      >>> G = curvature.linearize(jnp.zeros((2, 2)), jax.random.key(0), None, {})
      >>> print(G(jnp.array([[1.0, 0.0], [0.0, 0.0]])))
      [[ 0.25 -0.25]
       [-0.25  0.25]]

    Source: Lu et al. 2018, eq. 1; Martens, New insights and perspectives on the natural
    gradient method, 2014.
    """

    model_fn: Callable[..., Any]
    sample_fn: Callable[..., Any]
    losses_fn: Callable[..., jax.Array]

    def linearize(self, params, key, value_fn, extra_args):
        """Returns v -> Σ s_i s_iᵀ v / n; see :meth:`Curvature.linearize`."""
        del value_fn
        model = _user_functions.bind(self.model_fn, extra_args, "model_fn")
        outputs = jax.lax.stop_gradient(model(params))
        labels = _user_functions.bind(self.sample_fn, extra_args, "sample_fn")(
            key, outputs
        )
        losses = _user_functions.bind(self.losses_fn, extra_args, "losses_fn")
        name = "losses_fn(model_fn(params), labels)"
        return _gram(lambda p: losses(model(p), labels), params, name)


@dataclasses.dataclass(frozen=True)
class Operator(Curvature):
    """A symmetric matrix G of your own, given by its product with a vector.

    G may be a discretised differential operator, or a quadratic model of a loss without
    a useful Hessian, such as total variation with lagged weights.

    Args:
      product_fn: ``params -> (v -> G v)``. Keywords of ``update`` that its signature
        names are passed on to it.
      diagonal_fn, num_probes: see :class:`Curvature`.

    Example:
      >>> import jax, jax.numpy as jnp, bma_optax as bma
      >>> curvature = bma.Operator(lambda x: lambda v: 3 * v)
      >>> G = curvature.linearize(jnp.ones(2), jax.random.key(0), None, {})
      >>> print(G(jnp.array([1.0, 2.0])))
      [3. 6.]
    """

    product_fn: Callable[..., Product]

    def linearize(self, params, key, value_fn, extra_args):
        """Returns the product at ``params``; see :meth:`Curvature.linearize`."""
        del key, value_fn
        product = _user_functions.bind(self.product_fn, extra_args, "product_fn")(
            params
        )
        return _user_functions.product(product, params, "product_fn")


def check_curvature(curvature: Any) -> None:
    """Raises a TypeError if ``curvature`` is not a :class:`Curvature`."""
    if not isinstance(curvature, Curvature):
        raise TypeError(
            f"`curvature` must be a bma.Curvature, got {curvature!r}. Pass one such as "
            "bma.Hessian()."
        )


def product_at(
    curvature: Curvature, params: Any, key: Any, value_fn: Any, extra_args: Any
) -> Product:
    """Returns ``curvature.linearize``'s v -> G v, which checks what it returns."""
    product = curvature.linearize(params, key, value_fn, extra_args)
    return _user_functions.product(
        product, params, f"{type(curvature).__name__}.linearize"
    )


def _gram(losses, params, name) -> Product:
    """Returns v -> Jᵀ J v / n, with J the n x d Jacobian of ``losses``, shape (n,)."""
    values, jacobian, transpose = _derivatives.jacobian(
        lambda p: _user_functions.vector(losses(p), "losses_fn"), params, name
    )
    return lambda v: transpose(jacobian(v) / len(values))
