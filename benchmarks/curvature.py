"""Newton-BMA on problems without locality, against the solvers one would use there.

    python benchmarks/curvature.py
    python benchmarks/curvature.py --problems poisson --methods newton_bma_per_leaf lbfgs

Full batches of scikit-learn's data, in float64. For each method: steps, products with
the curvature, and seconds until the loss is low enough, compilation apart. Convex
problems end at 1e-6 of the starting gap f(x0) - f*, the others at a fixed loss. The
rates of Adam and SGD are tuned on another instance (the other half of the examples,
another start); the other methods run as they come.
"""

import argparse
import functools
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from sklearn import datasets
from tqdm import tqdm

import bma_optax as bma

TOLERANCE = 1e-6
FACTOR = 10**0.5  # From one point of a tuning grid to the next.
TILES = bma.per_tile((5,))
DIAGONAL = bma.by_function(lambda path, shape: None)
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


class Problem(NamedTuple):
    """A loss, and `make`: seed -> (params, data) of an instance; 0 is reported."""

    make: Callable[[int], tuple[Any, Any]]
    loss: Callable[..., jax.Array]
    curvature: bma.Curvature
    finer: bma.Rule
    update_interval: int = 5
    convexity: float = 0.0  # The Hessian's least eigenvalue is at least this, if > 0.
    level: float | None = None  # The loss to reach where the optimum is not unique.
    fisher: bma.Curvature | None = None


def half(seed: int, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Seeds 0 and 1 have disjoint halves of the examples."""
    order = np.random.default_rng(0).permutation(len(arrays[0]))
    size = len(order) // 2
    rows = order[seed % 2 * size :][:size]
    return tuple(array[rows] for array in arrays)


def standardise(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(0)) / np.maximum(x.std(0), 1e-6)


def grouped(groups: dict[str, np.ndarray]) -> tuple[Any, Any]:
    """Zero weights and standardised features, an array for each group."""
    features = {name: standardise(x) for name, x in groups.items()}
    params = {name: np.zeros(x.shape[1]) for name, x in groups.items()}
    return params | {"bias": np.zeros(())}, features


def products_of(x: np.ndarray, y: np.ndarray | None = None) -> np.ndarray:
    """Products of all pairs of columns."""
    if y is None:
        i, j = np.triu_indices(x.shape[1])
        return x[:, i] * x[:, j]
    return (x[:, :, None] * y[:, None, :]).reshape(len(x), -1)


def predict(params, features) -> jax.Array:
    return params["bias"] + sum(x @ params[name] for name, x in features.items())


def squares(params) -> jax.Array:
    return optax.tree.norm(params, squared=True) / 2


def logistic_instance(seed: int):
    x, labels = half(seed, *datasets.load_breast_cancer(return_X_y=True))
    families = dict(zip(("mean", "error", "worst"), np.split(standardise(x), 3, 1)))
    pairs = {f"{name} squared": products_of(x) for name, x in families.items()}
    params, features = grouped(families | pairs)
    return params, (features, labels.astype(np.float64))


def logistic_loss(params, data) -> jax.Array:
    features, labels = data
    losses = optax.sigmoid_binary_cross_entropy(predict(params, features), labels)
    return losses.mean() + 1e-3 * squares(params)


def poisson_instance(seed: int):
    x, counts = half(seed, *datasets.load_diabetes(return_X_y=True))
    body, serum = np.split(standardise(x), [4], axis=1)
    pairs = {
        "body squared": products_of(body)[:, [0, *range(2, 10)]],  # Sex is binary.
        "serum squared": products_of(serum),
        "body by serum": products_of(body, serum),
    }
    params, features = grouped({"body": body, "serum": serum} | pairs)
    params["bias"] = np.log(counts.mean())
    return params, (features, counts)


def poisson_loss(params, data) -> jax.Array:
    features, counts = data
    log_rates = predict(params, features)
    losses = (jnp.exp(log_rates) - counts * log_rates) / counts.mean()
    return losses.mean() + 1e-3 * squares(params)


def digits(seed: int) -> tuple[np.ndarray, np.ndarray]:
    images, labels = half(seed, *datasets.load_digits(return_X_y=True))
    return (images - 4.9) / 6.0, labels  # Mean 0 and variance 1, about.


def softmax_instance(seed: int):
    return {"w": np.zeros((64, 10)), "b": np.zeros(10)}, digits(seed)


def softmax_loss(params, data) -> jax.Array:
    images, labels = data
    logits = images @ params["w"] + params["b"]
    return cross_entropy(logits, labels).mean() + 1e-3 * squares(params)


def factorisation_instance(seed: int):
    images, _ = digits(seed)
    rng = np.random.default_rng(seed)
    seen = rng.random(images.shape) < 0.5
    factors = {"u": (len(images), 8), "v": (64, 8)}
    params = {name: 0.3 * rng.normal(size=shape) for name, shape in factors.items()}
    return params, (images, seen)


def factorisation_loss(params, data) -> jax.Array:
    images, seen = data
    errors = jnp.where(seen, params["u"] @ params["v"].T - images, 0)
    return (jnp.vdot(errors, errors) / 2 + 0.1 * squares(params)) / jnp.sum(seen)


def net_instance(seed: int):
    rng = np.random.default_rng(seed)
    params = {
        "w1": rng.normal(size=(64, 16)) / 8,
        "b1": np.zeros(16),
        "w2": rng.normal(size=(16, 10)) / 4,
        "b2": np.zeros(10),
    }
    return params, digits(seed)


def net(params, data) -> jax.Array:
    hidden = jnp.tanh(data[0] @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def net_outer(outputs, data) -> jax.Array:
    logits, params = outputs
    return cross_entropy(logits, data[1]).mean() + 1e-4 * squares(params)


def net_loss(params, data) -> jax.Array:
    return net_outer((net(params, data), params), data)


PROBLEMS = {
    "logistic": Problem(
        logistic_instance, logistic_loss, bma.Hessian(), TILES, convexity=1e-3
    ),
    "softmax": Problem(
        softmax_instance, softmax_loss, bma.Hessian(), bma.per_unit, convexity=1e-3
    ),
    "poisson": Problem(
        poisson_instance, poisson_loss, bma.Hessian(), TILES, convexity=1e-3
    ),
    "factorisation": Problem(
        factorisation_instance,
        factorisation_loss,
        bma.Hessian(),
        bma.per_unit,
        level=0.1,
    ),
    "net": Problem(
        net_instance,
        net_loss,
        bma.GaussNewton(lambda params, data: (net(params, data), params), net_outer),
        bma.per_unit,
        update_interval=20,
        level=0.1,
        fisher=bma.Fisher(net, jax.random.categorical, cross_entropy),
    ),
}


class NewtonCGState(NamedTuple):
    diagonal: bma.ScaleByNewtonBMAState
    products: jax.Array


def newton_cg(curvature: bma.Curvature, update_interval: int):
    """Truncated Newton-CG, with the diagonal that Newton-BMA has and Armijo's rule."""
    diagonal = bma.scale_by_newton_bma(
        DIAGONAL, curvature=curvature, update_interval=update_interval
    )

    def init(params):
        return NewtonCGState(diagonal.init(params), jnp.zeros((), jnp.int32))

    def update(grads, state, params, *, value, grad, value_fn, **extra):
        del grad
        _, scaling = diagonal.update(
            grads, state.diagonal, params, value_fn=value_fn, **extra
        )
        linear = curvature.linearize(params, jax.random.key(0), value_fn, extra)
        g, unravel = ravel_pytree(grads)
        step, products = conjugate_gradients(
            lambda v: ravel_pytree(linear(unravel(v)))[0],
            ravel_pytree(scaling.inverse_diagonal)[0],
            -g,
        )
        slope = 1e-4 * jnp.vdot(g, step)

        def too_long(t):
            trial = optax.tree.add_scale(params, t, unravel(step))
            return (value_fn(trial, **extra) > value + t * slope) & (t > 1e-9)

        t = jax.lax.while_loop(too_long, lambda t: t / 2, jnp.ones_like(value))
        return unravel(t * step), NewtonCGState(scaling, state.products + products)

    return optax.GradientTransformationExtraArgs(init, update)


def conjugate_gradients(product, inverse, b, limit=250):
    """G x = b to min(1/2, sqrt |b|), or as far as G is positive along the way."""
    # JAX's own does not count its products, nor look at the sign of the curvature.
    size = jnp.linalg.norm(b)
    tolerance = jnp.minimum(0.5, jnp.sqrt(size)) * size

    def unfinished(carry):
        _, r, _, count, positive = carry
        return (jnp.linalg.norm(r) > tolerance) & (count < limit) & positive

    def iterate(carry):
        x, r, p, count, _ = carry
        curved = product(p)
        bend, rho = p @ curved, r @ (inverse * r)
        positive = bend > 0
        a = jnp.where(positive, rho / bend, jnp.where(count == 0, 1, 0))
        residual = r - a * curved
        z = inverse * residual
        p = z + (residual @ z) / rho * p
        return x + a * carry[2], residual, p, count + 1, positive

    start = jnp.zeros_like(b), b, inverse * b, jnp.int32(0), jnp.bool_(True)
    x, _, _, count, _ = jax.lax.while_loop(unfinished, iterate, start)
    return x, count


def newton_bma(problem: Problem, rule: bma.Rule):
    return bma.newton_bma(
        partition=rule,
        curvature=problem.curvature,
        update_interval=problem.update_interval,
    )


def natural_bma(problem: Problem):
    return bma.natural_bma(
        problem.fisher,
        partition=problem.finer,
        update_interval=problem.update_interval,
    )


class Method(NamedTuple):
    """`make`: a problem and the tuned settings -> an optimiser."""

    make: Callable[..., optax.GradientTransformation]
    start: tuple[float, ...] = ()  # Where tuning starts.


METHODS = {
    "newton_bma_per_leaf": Method(lambda p: newton_bma(p, bma.per_leaf)),
    "newton_bma_finer": Method(lambda p: newton_bma(p, p.finer)),
    "newton_bma_diagonal": Method(lambda p: newton_bma(p, DIAGONAL)),
    "natural_bma": Method(natural_bma),
    "lbfgs": Method(lambda p: optax.lbfgs()),
    "newton_cg": Method(lambda p: newton_cg(p.curvature, p.update_interval)),
    "adam": Method(lambda p, rate: optax.adam(rate), (0.1,)),
    "sgd": Method(lambda p, rate, rest: optax.sgd(rate, momentum=1 - rest), (0.1, 0.1)),
}
SETTINGS = {"adam": ("rate",), "sgd": ("rate", "1 - momentum")}


class Solution(NamedTuple):
    steps: int
    loss: float
    reached: bool
    products: int
    seconds: float


class Solver:
    """A method compiled for a problem; the settings and the instance are arguments."""

    def __init__(self, problem: Problem, method: Method, instance: Any) -> None:
        def solve(settings, params, data, target, budget):
            tx = optax.with_extra_args_support(method.make(problem, *settings))
            state = tx.init(params)
            stored = optax.tree.get(state, "grad") is not None
            evaluate = jax.value_and_grad(problem.loss)
            if stored:
                evaluate = optax.value_and_grad_from_state(problem.loss)

            def step(carry):
                params, state, _, count = carry
                kept = {"state": state} if stored else {}
                value, grads = evaluate(params, data, **kept)
                more = {"value": value, "grad": grads, "data": data}
                updates, state = tx.update(
                    grads, state, params, value_fn=problem.loss, **more
                )
                params = optax.apply_updates(params, updates)
                return params, state, value, count + 1

            # The loss where the last step started: it comes with the gradient, another
            # would cost a pass. What diverged is not above the target either.
            def unfinished(carry):
                return (carry[3] < budget) & (carry[2] > target)

            start = params, state, jnp.array(jnp.inf), jnp.int32(0)
            params, state, value, count = jax.lax.while_loop(unfinished, step, start)
            counts = optax.tree.get_all_with_path(state, "products")
            spent = sum((n for _, n in counts), jnp.int32(0))
            return params, problem.loss(params, data), value, count, spent

        start = time.perf_counter()
        lowered = jax.jit(solve).lower(method.start, *instance, 0.0, 0)
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - start

    def __call__(self, settings, instance, target: float, budget: int) -> Solution:
        start = time.perf_counter()
        result = self.compiled(settings, *instance, float(target), int(budget))
        self.params, loss, value, count, products = jax.block_until_ready(result)
        seconds = time.perf_counter() - start
        earlier, now = bool(value <= target), bool(loss <= target)
        steps = int(count) - earlier
        return Solution(steps, float(loss), earlier or now, int(products), seconds)


def tune(solver: Solver, start: tuple, instance: Any, target: float, budget: int):
    """The best point of a grid that grows until no neighbour of it is better."""
    scores: dict[tuple[int, ...], tuple] = {}

    def score(point):
        if point not in scores:
            settings = tuple(x * FACTOR**k for x, k in zip(start, point, strict=True))
            if any(x > 1 for x in settings[1:]):
                return (np.inf, np.inf)  # A negative momentum.
            best = min(scores.values(), default=(np.inf,))[0]
            limit = budget if best == np.inf else best
            found = solver(settings, instance, target, limit)
            loss = found.loss if np.isfinite(found.loss) else np.inf
            # If all diverge, the least rate is the way to go.
            steps = found.steps if found.reached else np.inf
            scores[point] = (steps, loss, settings)
        return scores[point]

    best = (0,) * len(start)
    while True:
        around = itertools.product(*[(k, k - 1, k + 1) for k in best])
        nearest = min(around, key=score)
        if nearest == best:
            return scores[best][2], len(scores)
        best = nearest


def optimum(problem: Problem, solver: Solver, instance: Any) -> tuple[float, float]:
    """f* by a long run, and a bound on its error by strong convexity."""
    value = solver((), instance, -np.inf, 100).loss
    gradient = jax.grad(problem.loss)(solver.params, instance[1])
    return value, float(squares(gradient)) / problem.convexity


def study(name: str, methods: list[str], options: argparse.Namespace):
    """All methods on one problem, their timings interleaved."""
    problem = PROBLEMS[name]
    methods = [m for m in methods if m != "natural_bma" or problem.fisher]
    instances = [jax.tree.map(jnp.asarray, problem.make(seed)) for seed in (0, 1)]
    starts = [float(problem.loss(*instance)) for instance in instances]
    optima, errors = [problem.level] * 2, [0.0, 0.0]
    targets = optima
    total = len(methods) * (1 + options.repeats) + sum(m in SETTINGS for m in methods)
    with tqdm(total=total, desc=name, unit="run", leave=False) as bar:
        compiled = functools.cache(lambda m: Solver(problem, METHODS[m], instances[0]))
        if problem.level is None:
            pairs = [optimum(problem, compiled("newton_cg"), i) for i in instances]
            optima, errors = zip(*pairs, strict=True)
            targets = [
                f + TOLERANCE * (start - f)
                for f, start in zip(optima, starts, strict=True)
            ]
        rows = {}
        for method in methods:
            settings, points = (), 0
            if method in SETTINGS:
                settings, points = tune(
                    compiled(method),
                    METHODS[method].start,
                    instances[1],
                    targets[1],
                    options.max_steps,
                )
                bar.update()
            found = compiled(method)(
                settings, instances[0], targets[0], options.max_steps
            )
            gap = (found.loss - optima[0]) / (starts[0] - optima[0])
            rows[method] = found._asdict() | {
                "settings": dict(zip(SETTINGS.get(method, ()), settings, strict=True)),
                "tuning_runs": points,
                "gap": gap if np.isfinite(gap) else None,
                "loss": found.loss if np.isfinite(found.loss) else None,
                "seconds": [] if found.reached else [found.seconds],
                "compile_seconds": compiled(method).compile_seconds,
            }
            bar.update()
        for _, (method, row) in itertools.product(range(options.repeats), rows.items()):
            if row["reached"]:
                settings = tuple(row["settings"].values())
                # So many steps and no look at the target: the last one counts fully.
                again = compiled(method)(settings, instances[0], -np.inf, row["steps"])
                row["products"] = again.products
                row["seconds"].append(again.seconds)
            bar.update()
    return {
        "parameters": optax.tree.size(instances[0][0]),
        "examples": len(jax.tree.leaves(instances[0][1])[0]),
        "start": starts[0],
        "optimum": None if problem.level else optima[0],
        "optimum_error_bound": None if problem.level else errors[0],
        "target": targets[0],
        "finer": repr(problem.finer),
        "update_interval": problem.update_interval,
        "methods": rows,
    }


def table(name: str, result: dict[str, Any]) -> str:
    target = f"loss {result['target']:.6g}"
    if result["optimum"] is not None:
        target += f", {TOLERANCE:g} of the starting gap"
    lines = [
        f"\n### {name}: {result['parameters']} parameters, until {target}\n",
        "| method | settings | steps | products | seconds | seconds to compile |",
        "|---|---|---|---|---|---|",
    ]
    for method, row in result["methods"].items():
        label = method.replace("finer", result["finer"])
        settings = ", ".join(f"{k} {v:.2g}" for k, v in row["settings"].items())
        seconds = row["seconds"]
        steps, cell = row["steps"], f"{statistics.median(seconds):.3g}"
        if row["reached"]:
            cell += f" ({min(seconds):.3g} to {max(seconds):.3g})"
        else:
            gap = "diverged" if row["gap"] is None else f"gap {row['gap']:.1e}"
            steps, cell = f"not reached in {steps}: {gap}", f"({cell})"
        compile_seconds = f"{row['compile_seconds']:.2g}"
        cells = [label, settings, steps, row["products"], cell, compile_seconds]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    add("--repeats", type=int, default=5)
    add("--max-steps", type=int, default=2000)
    add("--output-dir", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    if min(options.repeats, options.max_steps) < 1:
        parser.error("every number must be positive")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    results = {}
    with jax.enable_x64(True):
        for name in options.problems:
            results[name] = study(name, options.methods, options)
            print(table(name, results[name]), flush=True)
    content = {
        "options": {"repeats": options.repeats, "max_steps": options.max_steps},
        "versions": {m.__name__: m.__version__ for m in (jax, optax, np, bma)},
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "problems": results,
    }
    path = options.output_dir / "curvature.json"
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    print(f"\nWrote {path}")


if __name__ == "__main__":
    main()
