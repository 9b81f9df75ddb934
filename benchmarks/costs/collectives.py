"""What a step on a grid sends between devices, and what each of them holds.

    python -m benchmarks.costs.collectives
    python -m benchmarks.costs.collectives --shapes 512x512 --meshes 8

Compiled for simulated devices; nothing is run. Each axis of a mesh cuts one axis of the
grid. Bytes are those that one device receives. A step of heavy ball has one gradient, a
refresh some products; both are there alone as well, as what cannot be saved. Memory is
what XLA plans for one device: arguments, which are parameters and state, and
temporaries. "largest" is the largest array that devices gather or reduce, in any branch
of the program. "moved" counts arrays of the state that the first step leaves elsewhere
than `init` made them: a second compilation follows, and the numbers are that program's.

A halo is all faces of a device's part of the grid, once from each side.
"""

import functools
import itertools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import bma_optax as bma
from benchmarks.harness import hlo, tables
from benchmarks.harness.peers import heavy_ball
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


def numbers(program: Any, refresh: bool = False) -> dict[str, Any]:
    seldom = "more_probes", *(() if refresh else ("refresh",))
    found = hlo.collectives(program, without=seldom)
    every = hlo.collectives(program)
    memory = program.memory_analysis()
    gathers = [x for x in found if x.kind != "collective-permute"]
    return {
        "permuted": hlo.total(found, "collective-permute"),
        "permutes": sum(x.times for x in found if x.kind == "collective-permute"),
        "gathered": hlo.total(gathers),
        "gathers": sum(x.times for x in gathers),
        "largest": max(
            (x.largest for x in every if x.kind != "collective-permute"), default=0
        ),
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }


def measure(shape, lengths, kind, fields) -> dict[str, Any]:
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
        program, info = step_program(heavy_ball(rule), f, params)
        found = {
            "gradient": numbers(compiled(jax.grad(f), params)[0]),
            "product": numbers(compiled(product, params, params)[0]),
            "step": numbers(program) | info,
            "step with refresh": numbers(program, refresh=True),
        }
    part = [n // k for n, k in zip(shape, (*lengths, *[1] * len(shape)), strict=False)]
    faces = [math.prod(part) // part[i] for i, k in enumerate(lengths) if k > 1]
    found["step"]["halo"] = 4 * 2 * sum(faces) * fields
    (grid,) = bma.partition(params, rule).grids
    found["step with refresh"]["products"] = grid.num_products
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

    state = jax.jit(tx.init)(params)
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
    return head + tables.table(columns, lines) + "\n\n" + ratios(cells)


def ratios(cells: dict[str, Any]) -> str:
    """The same numbers relative to what they are compared with."""
    lines, alone = [], {}
    for where, programs in cells.items():
        devices, *_ = where.split()
        step, refresh = programs["step"], programs["step with refresh"]
        held = step["arguments"] + step["temporaries"]
        if devices == "1":
            alone[where[1:]] = held
            continue
        share = alone.get(where.removeprefix(devices).replace("explicit", "auto"))
        more = refresh["permuted"] - step["permuted"]
        grid = programs["gradient"]["arguments"] * math.prod(lengths(devices))
        lines.append(
            [
                where,
                f"{100 * step['largest'] / grid:.1f}",
                f"{step['permuted'] / step['halo']:.1f}",
                f"{more / products_of(programs):.2f}",
                f"{held * math.prod(lengths(devices)) / share:.2f}" if share else "",
            ]
        )
    columns = ["devices", "largest, % of the grid", "a step permutes, halos"]
    columns += ["a refresh, of its products", "memory, of the share of one device"]
    return tables.table(columns, lines)


def products_of(programs: dict[str, Any]) -> int:
    """The bytes that the products of a refresh permute."""
    products = programs["step with refresh"]["products"]
    return products * programs["product"]["permuted"]


def lengths(text: str) -> tuple[int, ...]:
    """A type for `argparse`: 512x512."""
    return tuple(map(int, text.split("x")))


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("benchmarks.costs.collectives", __doc__)
    add, default = parser.add_argument, [(512, 512), (1024, 1024), (64, 64, 64)]
    add("--shapes", nargs="+", type=lengths, default=default)
    meshes = [(1,), (2,), (4,), (8,), (4, 2)]
    add("--meshes", nargs="+", type=lengths, default=meshes)
    add("--kinds", nargs="+", choices=KINDS, default=["auto"])
    add("--fields", nargs="+", type=int, default=[1])
    options = parser.parse(arguments)
    number = max(map(math.prod, options.meshes))
    jax.config.update("jax_num_cpu_devices", number)
    # Machine code that is never run need not be fast.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
        " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    )
    results = Results(options, {}, jax, optax, bma)
    for shape in options.shapes:
        cells = {}
        every = itertools.product(options.fields, options.kinds, options.meshes)
        for fields, kind, mesh in tqdm([*every], unit="mesh", disable=None):
            name = "x".join(map(str, mesh)) + f" {kind}, heavy ball"
            name += f", {fields} fields" if fields > 1 else ""
            cell = functools.partial(measure, shape, mesh, kind, fields)
            keys = "grids", "x".join(map(str, shape)), name
            cells[name] = results.cell(cell, *keys)
        tqdm.write(table(shape, cells))
    results.finish()


if __name__ == "__main__":
    main()
