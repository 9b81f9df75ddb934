"""Steps on grids, and small roots, where a kernel takes longer to launch than to run.

    python -m benchmarks.costs.accelerator
    python -m benchmarks.costs.accelerator --shapes 128x128 --roots 16

In float32, for a GPU. Milliseconds of a step on in-painting, called in a loop of
Python that does not wait for it, state donated; and those of `eigh` of one small
matrix beside an update of ten million parameters, each waited for. Programs are
compiled side by side. `python -m benchmarks.grids --float32` has the seconds to a loss.
"""

import functools
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
from benchmarks.harness.peers import PEERS
from benchmarks.harness.results import Parser, Results, positive
from benchmarks.harness.timing import clock, compiled, in_turns, summary

SHAPES = [(512, 512), (1024, 1024), (2048, 2048), (64,) * 3, (128,) * 3]
CALLS = 20  # In a row, without waiting.


def programs(problem: Any, instance: Any) -> dict[str, tuple]:
    """What is compiled for one field: function, arguments and options of `jax.jit`."""
    params, data = instance
    found = {}
    for name in ("bma_heavy_ball", "newton_bma", "sgd"):  # The largest first.
        method = METHODS.get(name) or PEERS[name]
        make = functools.partial(method.make, problem)

        def init(params, make=make, settings=method.start):
            carry = make(None, *settings)[0](params)
            return carry._replace(value=jnp.float32(jnp.inf))

        def step(carry, data, make=make, settings=method.start):
            return make(data, *settings)[1](carry)

        carry = jax.eval_shape(init, params)
        found[name] = step, (carry, data), {"donate_argnums": 0}
        found[f"{name}, init"] = init, (params,), {}

    def product(u, v, data):
        return jax.jvp(lambda u: jax.grad(problem.loss)(u, data), (u,), (v,))[1]

    found["gradient"] = jax.grad(problem.loss), (params, data), {}
    return found | {"product": (product, (params, params, data), {})}


def steps(shape: tuple[int, ...], pool: Any, rounds: int) -> dict[str, Any]:
    """Seconds of one call of each program on in-painting of one shape."""
    problem = problems.paint(shape[0], len(shape))
    params, data = instance = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32), problem.make(0)
    )
    waiting = {
        name: pool.submit(compiled, function, *arguments, **options)
        for name, (function, arguments, options) in programs(problem, instance).items()
    }
    built = {name: one.result() for name, one in waiting.items()}
    run = {name: program for name, (program, _) in built.items()}
    kept: dict[str, Any] = {}

    def ahead(name, _):
        start = time.perf_counter()
        for _ in range(CALLS):
            if name in kept:
                kept[name] = result = run[name](kept[name], data)
            else:
                result = run[name](*(params,) * (1 + (name == "product")), data)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / CALLS

    def refresh(name, _):
        carry = jax.block_until_ready(run[f"{name}, init"](params))
        return clock(run[name], carry, data)[1]

    measures = {}
    for name in ("gradient", "product", "sgd", "bma_heavy_ball", "newton_bma"):
        if f"{name}, init" in run:  # Its first step, for it has the refresh.
            kept[name] = run[name](run[f"{name}, init"](params), data)
        measures[name] = functools.partial(ahead, name)
        if "bma" in name:
            measures[f"{name}, refresh"] = functools.partial(refresh, name)
    return {
        name: summary(seconds) | {"compile_seconds": built[name.split(",")[0]][1]}
        for name, seconds in in_turns(measures, rounds).items()
    }


def roots(sizes: list[int], rounds: int) -> dict[str, Any]:
    """Seconds of an `eigh` of each size, and of updates of ten million parameters."""
    like = {f"w{i}": jnp.full((1000, 1000), 0.1, jnp.float32) for i in range(10)}
    measures = {}
    for L in sizes:
        sums = jax.random.normal(jax.random.key(0), (L, 2 * L), jnp.float32)
        U = sums @ sums.T
        eigh = compiled(jnp.linalg.eigh, U)[0]
        measures[f"eigh {L}"] = lambda _, eigh=eigh, U=U: clock(eigh, U)[1]
    txs = {
        "scale_by_rss": optax.scale_by_rss(),
        "scale_by_bma": bma.scale_by_bma(),
        "scale_by_bma, sums": bma.scale_by_bma(update_interval=10**6),
    }
    states = {}
    for name, tx in txs.items():
        states[name] = jax.jit(tx.init)(like)
        program = compiled(tx.update, like, states[name], like, donate_argnums=1)[0]

        def update(_, name=name, program=program):
            (_, states[name]), seconds = clock(program, like, states[name], like)
            return seconds

        measures[name] = update
    return {k: summary(x[1:]) for k, x in in_turns(measures, 1 + rounds).items()}


def table(found: dict[str, Any]) -> str:
    rows = [
        [name, f"{1e3 * x['seconds']:.3g}", f"{1e3 * x['range'][0]:.3g}"]
        for name, x in found.items()
    ]
    return tables.table(["", "median ms", "least"], rows)


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("benchmarks.costs.accelerator", __doc__)
    add = parser.add_argument
    add("--shapes", nargs="*", type=lengths, default=SHAPES)
    add("--roots", nargs="*", type=positive, default=[16, 64, 256, 1024])
    add("--rounds", type=positive, default=10)
    options = parser.parse(arguments)
    results = Results(options, {"rounds": options.rounds}, jax, optax, bma)
    if options.roots:
        found = results.cell(lambda: roots(options.roots, options.rounds), "roots")
        print(table(found), flush=True)
    with ThreadPoolExecutor(8) as pool:
        for shape in options.shapes:
            name = "x".join(map(str, shape))
            found = results.cell(
                lambda shape=shape: steps(shape, pool, options.rounds), "steps", name
            )
            print(f"\n### {name}\n\n{table(found)}", flush=True)
    results.finish()


if __name__ == "__main__":
    main()
