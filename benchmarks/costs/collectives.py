"""What a step on a grid sends between devices, and what each of them holds.

    python -m benchmarks.costs.collectives
    python -m benchmarks.costs.collectives --shapes 512x512 --meshes 8

Compiled for simulated devices; nothing is run. Each axis of a mesh cuts one axis of the
grid. Bytes are those that one device receives. A step of heavy ball has one gradient, a
refresh some products; both are there alone as well, as what cannot be saved. Memory is
what XLA plans for one device: arguments, which are parameters and state, and
temporaries. "moved" counts arrays of the state that the first step leaves elsewhere
than `init` made them: a second compilation follows, and the numbers are that program's.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import bma_optax as bma
from benchmarks.harness import hlo, tables
from benchmarks.harness.results import Parser, Results
from benchmarks.harness.timing import compiled

AXES = ("x", "y", "z")
KINDS = {"auto": jax.sharding.AxisType.Auto, "explicit": jax.sharding.AxisType.Explicit}


def loss(u: jax.Array) -> jax.Array:
    """Neighbours hold each other, and the data holds everything a little."""
    total = jnp.sum(jnp.cos(u))
    for axis in range(u.ndim):
        first = jax.lax.broadcasted_iota(jnp.int32, u.shape, axis) == 0
        total += jnp.sum(jnp.where(first, 0, u - jnp.roll(u, 1, axis)) ** 2)
    return total


def fields_loss(fields: dict[str, jax.Array]) -> jax.Array:
    a, *others = fields.values()
    total = sum(map(loss, others), start=loss(a))
    return total + sum(jnp.sum((a - b) ** 2) for b in others)


def heavy_ball(rule: Any, interval: int) -> Any:
    return optax.chain(
        bma.scale_by_newton_bma(rule, update_interval=interval),
        optax.trace(0.45),
        optax.scale(-1.3),
    )


def newton(rule: Any, interval: int) -> Any:
    return bma.newton_bma(rule, update_interval=interval)


METHODS = {"heavy ball": heavy_ball, "newton_bma": newton}


def numbers(program: Any) -> dict[str, Any]:
    found = hlo.collectives(program)
    worst = hlo.collectives(program, dearest=True)
    memory = program.memory_analysis()
    gathers = [x for x in found if x.kind != "collective-permute"]
    return {
        "permuted": hlo.total(found, "collective-permute"),
        "permutes": sum(x.times for x in found if x.kind == "collective-permute"),
        "gathered": hlo.total(gathers),
        "gathers": sum(x.times for x in gathers),
        "largest": max((x.bytes for x in worst), default=0),
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }


def measure(shape, lengths, kind, method, fields) -> dict[str, Any]:
    """The numbers of all programs for one grid on one mesh."""
    axes = AXES[: len(lengths)]
    mesh = jax.make_mesh(
        lengths,
        axes,
        axis_types=(KINDS[kind],) * len(axes),
        devices=jax.devices()[: math.prod(lengths)],
    )
    sharding = jax.NamedSharding(mesh, jax.P(*axes))
    zeros = jax.device_put(jnp.zeros(shape, jnp.float32), sharding)
    params = {name: jnp.copy(zeros) for name in "abcdef"[:fields]}
    f = fields_loss
    if kind == "explicit":
        f = jax.sharding.auto_axes(f, out_sharding=jax.P())
    rule = bma.per_tile((4,) * len(shape), reach=1)

    def product(x, v):
        return jax.jvp(jax.grad(f), (x,), (v,))[1]

    with jax.set_mesh(mesh):
        found = {
            "gradient": numbers(compiled(jax.grad(f), params)[0]),
            "product": numbers(compiled(product, params, params)[0]),
        }
        for name, interval in (("step", 10), ("step with refresh", 1)):
            program, info = step_program(METHODS[method](rule, interval), f, params)
            found[name] = numbers(program) | info
    return found


def step_program(tx: Any, f: Any, params: Any) -> tuple[Any, dict[str, Any]]:
    """A step compiled for the state that `init` makes, or, if the step leaves its state
    elsewhere, for what it leaves."""

    def step(params, state):
        grads = jax.grad(f)(params)
        updates, state = tx.update(grads, state, params, value_fn=f)
        return optax.apply_updates(params, updates), state

    def compile_for(state):
        return compiled(step, params, state, donate_argnums=(0, 1))

    state = tx.init(params)
    program, seconds = compile_for(state)
    _, left = program.output_shardings
    moved = jax.tree.map(
        lambda x, s: not s.is_equivalent_to(x.sharding, x.ndim), state, left
    )
    info = {"compile_seconds": seconds, "moved": sum(jax.tree.leaves(moved))}
    if info["moved"]:
        program, _ = compile_for(
            jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                *(state, left),
            )
        )
    return program, info


def table(shape, cells: dict[str, Any]) -> str:
    lines = []
    for where, programs in cells.items():
        for name, row in programs.items():
            lines.append(
                [
                    where,
                    name,
                    f"{row['permuted']:,} ({row['permutes']})",
                    f"{row['gathered']:,} ({row['gathers']})",
                    f"{row['largest']:,}",
                    f"{row['arguments']:,}",
                    f"{row['temporaries']:,}",
                    row.get("moved", ""),
                ]
            )
    columns = ["devices", "program", "permuted bytes (permutes)"]
    columns += ["gathered or reduced (number)", "largest", "arguments", "temporaries"]
    columns += ["arrays moved"]
    head = f"\n### {' x '.join(map(str, shape))}, {4 * math.prod(shape):,} bytes\n\n"
    return head + tables.table(columns, lines)


def lengths(text: str) -> tuple[int, ...]:
    """A type for `argparse`: 512x512."""
    return tuple(map(int, text.split("x")))


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("benchmarks.costs.collectives", __doc__)
    add, default = parser.add_argument, [(512, 512), (64, 64, 64)]
    add("--shapes", nargs="+", type=lengths, default=default)
    meshes = [(1,), (2,), (4,), (8,), (4, 2)]
    add("--meshes", nargs="+", type=lengths, default=meshes)
    add("--kinds", nargs="+", choices=KINDS, default=["auto"])
    add("--methods", nargs="+", choices=METHODS, default=["heavy ball"])
    add("--fields", nargs="+", type=int, default=[1])
    options = parser.parse(arguments)
    number = max(map(math.prod, options.meshes))
    jax.config.update("jax_num_cpu_devices", number)
    results = Results(options, {}, jax, optax, bma)
    for shape in options.shapes:
        cells = {}
        for method in options.methods:
            for fields in options.fields:
                for kind in options.kinds:
                    for mesh in tqdm(options.meshes, unit="mesh", disable=None):
                        what = shape, mesh, kind, method, fields
                        name = "x".join(map(str, mesh)) + f" {kind}, {method}"
                        name += f", {fields} fields" if fields > 1 else ""
                        size = "x".join(map(str, shape))
                        cells[name] = results.cell(
                            lambda what=what: measure(*what), "grids", size, name
                        )
        tqdm.write(table(shape, cells))
    results.finish()


if __name__ == "__main__":
    main()
