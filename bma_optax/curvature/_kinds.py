"""Curvature as a value: the G of eq. (1), known by its products with vectors."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from bma_optax import _checks
from bma_optax._checks import is_integer
from bma_optax.curvature import _derivatives, _user_functions
from bma_optax.curvature._derivatives import Product


@dataclasses.dataclass(frozen=True)
class Curvature:
    """A symmetric d x d matrix G at given parameters; the base of those below.

    Values, static and hashable. A curvature of your own derives from this and defines
    ``linearize``.

    Args:
      diagonal_fn: ``params -> diag G``, a tree like params, where it is known; it saves
        the probes. Keywords of ``update`` that its signature names are passed on.
      num_probes: how many products the diagonal of G may cost else. If d is no larger
        it is exact; otherwise it is the mean of x ∘ G x over so many random signs
        x (Hutchinson), whose standard error at entry i is that of Σ_{j≠i} G_ij² /
        num_probes under the root. Entries smaller than their standard error are taken
        for it. With several arrays the first six only find the units of each.

    Raises:
      ValueError: if ``num_probes`` is no integer of at least 2.
      TypeError: if a function is none.

    Example:
      >>> import jax.numpy as jnp, bma_optax as bma
      >>> class Scaled(bma.Curvature):
      ...     def linearize(self, params, key, value_fn, extra_args):
      ...         return lambda v: 2 * v
      >>> Scaled(num_probes=8)
      Scaled(diagonal_fn=None, num_probes=8)

    Source: eq. (1); Bekas, Kokiopoulou and Saad, An estimator for the diagonal of a
    matrix, Applied Numerical Mathematics 57, 2007.
    """

    diagonal_fn: Callable[..., Any] | None = dataclasses.field(
        default=None, kw_only=True
    )
    num_probes: int = dataclasses.field(default=32, kw_only=True)

    def __post_init__(self):
        if not is_integer(self.num_probes) or self.num_probes < 2:
            raise ValueError(
                f"`num_probes` must be an integer >= 2, got {self.num_probes!r}."
            )
        object.__setattr__(self, "num_probes", int(self.num_probes))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_fn") and not (value is None and field.kw_only):
                _checks.functions(**{field.name: value})

    def linearize(
        self, params: Any, key: jax.Array, value_fn: Any, extra_args: dict[str, Any]
    ) -> Product:
        """The product v -> G v at ``params``.

        Args:
          params: the parameters.
          key: a typed random key.
          value_fn: the loss that was given to ``update``, or None.
          extra_args: the other keywords that were given to ``update``.

        Returns:
          A linear function of trees like ``params``.

        Example:
          >>> import jax, jax.numpy as jnp, bma_optax as bma
          >>> f = lambda x: jnp.sum(x ** 4)
          >>> product = bma.Hessian().linearize(jnp.ones(2), jax.random.key(0), f, {})
          >>> print(product(jnp.array([1.0, 0.0])))
          [12.  0.]
        """
        raise NotImplementedError

    def diagonal(self, params: Any, extra_args: dict[str, Any]) -> Any:
        """The diagonal of G as a tree like ``params``, None where it must be probed.

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
    r"""The Hessian of ``value_fn``, :math:`\nabla^2 f`: Newton's G, may be indefinite.

    Products are forward over reverse: each costs about two gradients.

    Args:
      diagonal_fn, num_probes: see :class:`Curvature`.

    Example:
      >>> import jax, jax.numpy as jnp, bma_optax as bma
      >>> f = lambda x: x[0] ** 2 + 3 * x[0] * x[1]
      >>> G = bma.Hessian().linearize(jnp.ones(2), jax.random.key(0), f, {})
      >>> print(G(jnp.array([1.0, 0.0])))
      [2. 3.]

    Source: eq. (1); Pearlmutter, Fast exact multiplication by the Hessian, 1994.
    """

    def linearize(self, params, key, value_fn, extra_args):
        """v -> Hessian times v, see :meth:`Curvature.linearize`."""
        del key
        f = _user_functions.loss(value_fn, extra_args)
        instead = (
            "bma.GaussNewton, which takes first derivatives of the model alone, or "
            f"{_derivatives.OPERATOR}"
        )
        return _derivatives.hessian(f, params, "value_fn", instead)


@dataclasses.dataclass(frozen=True)
class GaussNewton(Curvature):
    r"""The generalised Gauss-Newton matrix :math:`J^T H J`, without the model's own bend.

    J is the Jacobian of ``model_fn`` and H the Hessian of ``loss_fn`` at its outputs;
    positive semi-definite where ``loss_fn`` is convex. For losses that are log
    likelihoods of an exponential family it is the Fisher matrix.

    Args:
      model_fn: ``params -> outputs``, any pytree. Keywords of ``update`` that its
        signature names are passed on, such as ``batch``; likewise below.
      loss_fn: ``outputs -> scalar``.
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
    """  # noqa: E501

    model_fn: Callable[..., Any]
    loss_fn: Callable[..., jax.Array]

    def linearize(self, params, key, value_fn, extra_args):
        """v -> Jᵀ H J v, see :meth:`Curvature.linearize`."""
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
    r"""The Fisher information matrix, by labels drawn from the model: natural gradient.

    .. math:: G = \frac1n \sum_i s_i s_i^T, \qquad
              s_i = \nabla \log p(y_i \mid x_i, \theta), \quad y_i \sim p

    unbiased, with new labels at each refresh.

    Args:
      model_fn: ``params -> outputs``. Keywords of ``update`` that it names are passed
        on; likewise below.
      sample_fn: ``(key, outputs) -> labels``, such as ``jax.random.categorical``.
      losses_fn: ``(outputs, labels) -> losses``, shape (n,): -log p, such as
        ``optax.softmax_cross_entropy_with_integer_labels``.
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

    Source: eq. (1); Martens, New insights and perspectives on the natural gradient
    method, 2014.
    """

    model_fn: Callable[..., Any]
    sample_fn: Callable[..., Any]
    losses_fn: Callable[..., jax.Array]

    def linearize(self, params, key, value_fn, extra_args):
        """v -> Σ s_i s_iᵀ v / n, see :meth:`Curvature.linearize`."""
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
    """A symmetric matrix of your own, from a function that gives its product.

    For instance a discretised differential operator, or lagged weights that make a
    quadratic model of a loss that has no useful Hessian (total variation).

    Args:
      product_fn: ``params -> (v -> G v)``. Keywords of ``update`` that it names are
        passed on.
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
        """The product at ``params``, see :meth:`Curvature.linearize`."""
        del key, value_fn
        product = _user_functions.bind(self.product_fn, extra_args, "product_fn")(
            params
        )
        return _user_functions.product(product, params, "product_fn")


def check_curvature(curvature: Any) -> None:
    """Raises a TypeError for what is no :class:`Curvature`."""
    if not isinstance(curvature, Curvature):
        raise TypeError(
            f"`curvature` must be a bma.Curvature, got {curvature!r}. Pass one such as "
            "bma.Hessian()."
        )


def product_at(
    curvature: Curvature, params: Any, key: Any, value_fn: Any, extra_args: Any
) -> Product:
    """``curvature.linearize``, also of a class of the user's, with checked results."""
    product = curvature.linearize(params, key, value_fn, extra_args)
    return _user_functions.product(
        product, params, f"{type(curvature).__name__}.linearize"
    )


def _gram(losses, params, name) -> Product:
    """v -> Jᵀ J v / n for the Jacobian of n losses."""
    values, jacobian, transpose = _derivatives.jacobian(
        lambda p: _user_functions.vector(losses(p), "losses_fn"), params, name
    )
    return lambda v: transpose(jacobian(v) / len(values))
