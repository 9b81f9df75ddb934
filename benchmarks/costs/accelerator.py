"""Grids and small roots where a kernel takes longer to launch than to run, in float32.

    python -m benchmarks.costs.accelerator
    python -m benchmarks.costs.accelerator --shapes 128x128 --roots 16

Three tables. Milliseconds of a step, called in a loop of Python, state donated. Seconds
to 1e-6 of the starting gap f(x0) - f* on in-painting, set-up included and compilation
apart; the gap is computed in float64, of float32 parameters. Rate and momentum of SGD
are tuned on another instance, and its steps are loops in one program. And `eigh` of one
small matrix beside an update of ten million parameters. Programs are compiled side by
side; no shape is begun after `--seconds`.
"""

import functools
import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import optax

import bma_optax as bma
from benchmarks.costs.collectives import lengths
from benchmarks.grids import problems
from benchmarks.grids.__main__ import METHODS
from benchmarks.harness import tables
from benchmarks.harness.peers import CG
from benchmarks.harness.results import Parser, Results, positive
from benchmarks.harness.timing import clock, compiled, in_turns, summary
from benchmarks.harness.tuning import descend

SHAPES = [(1024, 1024), (128,) * 3, (512, 512), (64,) * 3, (2048, 2048), (256,) * 3]
BLOCKS = ("bma_heavy_ball", "newton_bma")
TOLERANCE = 1e-6
MOST = 100  # Steps of these.
LOOK = 20  # SGD's steps from one look at the loss to the next.
LOOKS = 500


def programs(problem: Any, instance: Any) -> dict[str, tuple]:
    """What is compiled for one field: function, arguments and options of `jax.jit`."""
    params, data = instance
    data64 = optax.tree.cast(data, jnp.float64)
    number, settings = jnp.float64(0), (jnp.float32(0.1), jnp.float32(0.1))
    donated, found = {"donate_argnums": 0}, {}
    for name in BLOCKS:  # They take longest: first.

        def init(params, name=name):
            carry = METHODS[name].make(problem, None)[0](params)
            return carry._replace(value=jnp.float32(jnp.inf))

        def step(carry, data, name=name):
            return METHODS[name].make(problem, data)[1](carry)

        found[name] = step, (jax.eval_shape(init, params), data), donated
        found[f"{name}, init"] = init, (params,), {}

    def product(u, v, data):
        return jax.jvp(lambda u: jax.grad(problem.loss)(u, data), (u,), (v,))[1]

    def sgd_steps(carry, settings, data, steps):
        rate, rest = settings
        tx = optax.sgd(rate, momentum=1 - rest)

        def step(_, carry):
            u, state = carry
            updates, state = tx.update(jax.grad(problem.loss)(u, data), state)
            return optax.apply_updates(u, updates), state

        return jax.lax.fori_loop(0, steps, step, carry)

    def sgd_start(u):
        return u, optax.sgd(0.1, momentum=0.5).init(u)

    def loss64(u, data64):
        return problem.loss(u.astype(jnp.float64), data64)

    def sgd_until(u, settings, data, data64, target):
        """How often SGD looks at the loss until it is there, and the loss."""

        def unfinished(loop):
            _, looks, loss = loop
            return (looks < LOOKS) & (loss > target)

        def advance(loop):
            carry, looks, _ = loop
            carry = sgd_steps(carry, settings, data, LOOK)
            return carry, looks + 1, loss64(carry[0], data64)

        start = sgd_start(u), jnp.int32(0), loss64(u, data64)
        return jax.lax.while_loop(unfinished, advance, start)[1:]

    def sgd_run(u, settings, data, looks):
        return jax.lax.fori_loop(
            0,
            looks,
            lambda _, carry: sgd_steps(carry, settings, data, LOOK),
            sgd_start(u),
        )[0]

    def exact(cg, data64):
        """A thousand steps of conjugate gradients, and the loss."""
        zeros = jnp.zeros_like(cg.x)

        def step(_, cg):
            return cg.step(lambda v: product(zeros, v, data64), lambda r: r)[0]

        cg = jax.lax.fori_loop(0, 1000, step, cg)
        return cg, problem.loss(cg.x, data64)

    like64 = params.astype(jnp.float64)
    return found | {
        "exact": (exact, (CG(*[like64] * 3, number), data64), donated),
        "sgd until": (sgd_until, (params, settings, data, data64, number), {}),
        "sgd run": (sgd_run, (params, settings, data, jnp.int32(0)), {}),
        "sgd": (functools.partial(sgd_steps, steps=1),)
        + ((sgd_start(params), settings, data), donated),
        "gradient": (jax.grad(problem.loss), (params, data), {}),
        "product": (product, (params, params, data), {}),
        "loss": (loss64, (params, data64), {}),
        "gradient64": (jax.grad(problem.loss), (like64, data64), {}),
    }


class Field:
    """In-painting of one shape, with two instances."""

    def __init__(self, shape: tuple[int, ...], pool: ThreadPoolExecutor) -> None:
        self.problem = problems.paint(shape[0], len(shape))
        self.instances = [
            jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), self.problem.make(i))
            for i in (0, 1)
        ]
        lowered = {
            name: pool.submit(compiled, function, *arguments, **options)
            for name, (function, arguments, options) in programs(
                self.problem, self.instances[0]
            ).items()
        }
        found = {name: one.result() for name, one in lowered.items()}
        self.run = {name: program for name, (program, _) in found.items()}
        self.goal = functools.cache(self.find_goal)
        self.compile_seconds = {name: seconds for name, (_, seconds) in found.items()}

    def find_goal(self, number: int) -> dict[str, float]:
        """The starting loss and the least one, by conjugate gradients."""
        params, data = optax.tree.cast(self.instances[number], jnp.float64)
        start = float(self.problem.loss(params, data))
        b = -self.run["gradient64"](params, data)
        cg = CG(jnp.zeros_like(b), b, jnp.copy(b), jnp.vdot(b, b))
        best, gained = start, True
        while gained:
            cg, loss = self.run["exact"](cg, data)
            gained = float(loss) < best - 1e-10 * (start - best)
            best = min(best, float(loss))
        target = best + TOLERANCE * (start - best)
        return {"start": start, "optimum": best, "target": target}

    def steps(self, rounds: int) -> dict[str, Any]:
        """Seconds of one call of each program."""
        params, data = self.instances[0]
        settings = jnp.float32(0.1), jnp.float32(0.1)
        calls = {name: self.run[name] for name in ("gradient", "product", "sgd")}
        kept = {"sgd": (jnp.copy(params), optax.sgd(0.1, momentum=0.5).init(params))}

        def measure(name, _, times=20):
            """Several calls without waiting, as a loop of training makes them."""
            start = time.perf_counter()
            for _ in range(times):
                if name in kept:
                    more = (settings,) if name == "sgd" else ()
                    kept[name] = result = calls[name](kept[name], *more, data)
                else:
                    more = (params,) if name == "product" else ()
                    result = calls[name](params, *more, data)
            jax.block_until_ready(result)
            return (time.perf_counter() - start) / times

        def refresh(name, _):
            carry = jax.block_until_ready(self.run[f"{name}, init"](params))
            return clock(self.run[name], carry, data)[1]

        measures = {name: functools.partial(measure, name) for name in calls}
        for name in BLOCKS:
            calls[name] = self.run[name]
            kept[name] = self.run[name](self.run[f"{name}, init"](params), data)
            measures[name] = functools.partial(measure, name)
            measures[f"{name}, refresh"] = functools.partial(refresh, name)
        return {
            name: summary(seconds)
            for name, seconds in in_turns(measures, rounds).items()
        }

    def race(self, start: Any, rounds: int) -> dict[str, Any]:
        """Seconds to the target: steps are counted first, then timed."""
        goal, (params, data) = self.goal(0), self.instances[0]
        data64 = optax.tree.cast(data, jnp.float64)
        rows, measures = {}, {}

        def until(name):
            carry, count, loss = self.run[f"{name}, init"](params), 0, math.inf
            while count < MOST and not loss <= goal["target"]:
                carry = self.run[name](carry, data)
                loss = float(self.run["loss"](carry.params, data64))
                count += 1
            return count, loss

        def blocks(name, steps, _):
            begin = time.perf_counter()
            carry = self.run[f"{name}, init"](params)
            for _ in range(steps):
                carry = self.run[name](carry, data)
            jax.block_until_ready(carry)
            return time.perf_counter() - begin

        for name in BLOCKS:
            steps, loss = until(name)
            rows[name] = {"steps": steps, "loss": loss}
            measures[name] = functools.partial(blocks, name, steps)
        settings, runs = self.tune(start)
        looks, loss = self.sgd(settings, 0)
        rows["sgd"] = {"steps": looks * LOOK, "loss": loss, "settings": settings}
        rows["sgd"] |= {"tuning_runs": runs}
        numbers = tuple(map(jnp.float32, settings))
        measures["sgd"] = lambda _: clock(
            self.run["sgd run"], params, numbers, data, jnp.int32(looks)
        )[1]
        for name, seconds in in_turns(measures, rounds).items():
            rows[name] |= {"reached": rows[name]["loss"] <= goal["target"]}
            rows[name] |= summary(seconds)
        return goal | {"methods": rows}

    def sgd(self, settings: Any, number: int) -> tuple[int, float]:
        params, data = self.instances[number]
        data64 = optax.tree.cast(data, jnp.float64)
        numbers = tuple(map(jnp.float32, settings))
        target = jnp.float64(self.goal(number)["target"])
        looks, loss = self.run["sgd until"](params, numbers, data, data64, target)
        return int(looks), float(loss)

    def tune(self, start: Any) -> tuple[Any, int]:
        target = self.goal(1)["target"]

        def score(settings, _):
            if settings[1] > 1:
                return math.inf, math.inf, settings[0]
            looks, loss = self.sgd(settings, 1)
            loss = loss if math.isfinite(loss) else math.inf
            return looks if loss <= target else math.inf, loss, settings[0]

        return descend(score, start or (0.2, 0.05), (1,) if start else (4, 2, 1))


def measure(shape, start, pool, rounds) -> dict[str, Any]:
    field = Field(shape, pool)
    found = {"steps": field.steps(rounds), "compile": field.compile_seconds}
    return found | {"race": field.race(start, rounds)}


def roots(sizes: list[int], rounds: int) -> dict[str, Any]:
    """Seconds of an `eigh` of each size, and of updates of ten million parameters."""
    like = {f"w{i}": jnp.full((1000, 1000), 0.1, jnp.float32) for i in range(10)}
    measures = {}
    for L in sizes:
        sums = jax.random.normal(jax.random.key(0), (L, 2 * L), jnp.float32)
        U = sums @ sums.T
        eigh = compiled(jnp.linalg.eigh, U)[0]
        measures[f"eigh {L}"] = functools.partial(
            lambda eigh, U, _: clock(eigh, U)[1], eigh, U
        )
    txs = {"scale_by_rss": optax.scale_by_rss(), "scale_by_bma": bma.scale_by_bma()}
    txs["scale_by_bma, sums"] = bma.scale_by_bma(update_interval=10**6)
    states = {}
    for name, tx in txs.items():
        states[name] = jax.jit(tx.init)(like)
        program = compiled(tx.update, like, states[name], like, donate_argnums=1)[0]

        def update(_, name=name, program=program):
            (_, states[name]), seconds = clock(program, like, states[name], like)
            return seconds

        measures[name] = update
    return {k: summary(x[1:]) for k, x in in_turns(measures, 1 + rounds).items()}


def report(shape: str, found: dict[str, Any]) -> str:
    rows = [
        [name, f"{1e3 * x['seconds']:.3g}", f"{1e3 * x['range'][0]:.3g}"]
        for name, x in found["steps"].items()
    ]
    text = f"\n### {shape}\n\n" + tables.table(["a step", "median ms", "least"], rows)
    rows = [
        [name, row["steps"], "" if row["reached"] else "not reached"]
        + [f"{row['seconds']:.4g}", f"{row['range'][0]:.4g}", row.get("settings", "")]
        for name, row in found["race"]["methods"].items()
    ]
    columns = ["to 1e-6", "steps", "", "median s", "least", "rate, 1 - momentum"]
    return text + "\n\n" + tables.table(columns, rows)


def main(arguments: list[str] | None = None) -> None:
    begin = time.perf_counter()
    parser = Parser("benchmarks.costs.accelerator", __doc__)
    add = parser.add_argument
    add("--shapes", nargs="*", type=lengths, default=SHAPES)
    add("--roots", nargs="*", type=positive, default=[16, 64, 256, 1024])
    add("--rounds", type=positive, default=10)
    add("--seconds", type=positive, default=3600)
    options = parser.parse(arguments)
    jax.config.update("jax_enable_x64", True)
    results = Results(options, {"rounds": options.rounds}, jax, optax, bma)
    if options.roots:
        found = results.cell(lambda: roots(options.roots, options.rounds), "roots")
        rows = [[name, f"{1e3 * x['seconds']:.3g}"] for name, x in found.items()]
        print(tables.table(["", "ms"], rows), flush=True)
    tuned: dict[int, tuple[int, Any]] = {}  # By dimension: the size and SGD's settings.
    with ThreadPoolExecutor(8) as pool:
        for shape in options.shapes:
            if time.perf_counter() - begin > options.seconds:
                break
            start = None
            if len(shape) in tuned:  # Momentum nears 1 as the root of the condition.
                size, (rate, rest) = tuned[len(shape)]
                start = rate, rest * size / shape[0]
            name = "x".join(map(str, shape))
            found = results.cell(
                lambda s=shape, x=start: measure(s, x, pool, options.rounds),
                *("fields", name),
            )
            tuned[len(shape)] = shape[0], found["race"]["methods"]["sgd"]["settings"]
            print(report(name, found), flush=True)
            print(f"{time.perf_counter() - begin:.0f} s so far", flush=True)
    results.finish()


if __name__ == "__main__":
    main()
