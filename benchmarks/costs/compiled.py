"""What a training step reads, writes and launches on hardware that is not there.

    python -m benchmarks.costs.compiled --gpu h100.txtpb
    python -m benchmarks.costs.compiled --tpu v5e:2x2

Compiled for one device, not run. For a GPU JAX needs its CUDA plugin of its own
version, `nvidia-cuda-nvcc-cu12`, `JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1` in the
environment, and the text of a `GpuTargetConfigProto`; for a TPU it needs `libtpu`. A
step is `update`, a rate and `apply_updates`; parameters and state are donated. Bytes
are those of the operands and results of all kernels that lie in the device's memory,
over the number of parameters; loops count by their trips. On a grid the loss is a
Laplacian's, its gradient is a part of the step, and a second row has a refresh.
"""

import time
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from tqdm import tqdm

import bma_optax as bma
from benchmarks.costs.collectives import lengths
from benchmarks.costs.step_cost import METHODS, TREES
from benchmarks.harness import hlo, tables
from benchmarks.harness.peers import heavy_ball
from benchmarks.harness.results import Parser, Results

# Where a check of the curvature has failed, and where a step has to be shortened.
SELDOM = ("more_probes", "backtracking")
SETS = {"10": [(1000, 1000)] * 10, "150": TREES["30M"]}
CHOSEN = [x for x in METHODS if x not in ("muon", "bma_sums") and "units" not in x]


def loss(u: jax.Array) -> jax.Array:
    squares = [jnp.sum(jnp.diff(u, axis=axis) ** 2) for axis in range(u.ndim)]
    return sum(squares, start=(u[(0,) * u.ndim] - 1) ** 2)


def on_grid(shape: tuple[int, ...]) -> dict[str, Any]:
    rule = bma.per_tile((4,) * len(shape), reach=1)
    return {
        "sgd": optax.sgd(0.1),
        "heavy ball": heavy_ball(rule),
        "newton_bma": bma.newton_bma(rule),
    }


def device(options: Any) -> Any:
    """The sharding of an array that lies on one device of the target."""
    if options.gpu:
        topology = topologies.get_topology_desc(
            platform="cuda",
            target_config=options.gpu.read_text(),
            topology="1x1x1",
        )
    else:
        topology = topologies.get_topology_desc(options.tpu, "tpu")
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",))
    return jax.sharding.NamedSharding(mesh, jax.P())


def measure(tx: Any, params: Any, where: Any, f: Any = None) -> dict[str, Any]:
    """Numbers of a step; with a loss f, of one that makes its own gradient."""

    def typed(tree):
        def one(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

        return jax.tree.map(one, tree)

    def step(params, state, grads):
        more = {}
        if f is not None:
            grads, more = jax.grad(f)(params), {"value_fn": f}
        with_more = optax.with_extra_args_support(tx)
        updates, state = with_more.update(grads, state, params, **more)
        return optax.apply_updates(params, updates), state

    arguments = params, jax.eval_shape(tx.init, params), params if f is None else ()
    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*map(typed, arguments))
    traced = time.perf_counter()
    program = lowered.compile()
    seconds = {"trace": traced - start, "compile": time.perf_counter() - traced}
    d, memory = sum(x.size for x in jax.tree.leaves(params)), program.memory_analysis()
    row = {"temporary": memory.temp_size_in_bytes / d} | seconds
    for name, without in (("step", ("refresh", *SELDOM)), ("with refresh", SELDOM)):
        found = hlo.kernels(program, without)
        row[name] = {
            "kernels": sum(x.times for x in found if not x.kind.endswith("-start")),
            "bytes": hlo.total(found) / d,
        }
    return row


def table(cells: dict[str, Any], refreshes: bool) -> str:
    columns = ["method", "bytes a parameter", "kernels", "temporary bytes a parameter"]
    columns += ["s to trace", "s to compile"]
    rows = []
    for name, row in cells.items():
        for part in ("step", "with refresh")[: 1 + refreshes]:
            if part == "step" or row[part] != row["step"]:
                numbers = row[part]
                label = name if part == "step" else f"... {part}"
                rows.append([label, f"{numbers['bytes']:.1f}", numbers["kernels"]])
                more = ("temporary", "trace", "compile")
                rows[-1] += [f"{row[k]:.2g}" if part == "step" else "" for k in more]
    return tables.table(columns, rows)


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("benchmarks.costs.compiled", __doc__)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--gpu", type=Path, help="a file that describes the GPU")
    target.add_argument("--tpu", help="a topology, such as v5e:2x2")
    add = parser.add_argument
    add("--trees", nargs="*", choices=SETS, default=list(SETS))
    add("--methods", nargs="+", choices=METHODS, default=CHOSEN)
    grids = [(512, 512), (1024, 1024), (64, 64, 64), (128, 128, 128)]
    add("--grids", nargs="*", type=lengths, default=grids)
    options = parser.parse(arguments)
    where = device(options)
    kind = where.mesh.devices.item().device_kind
    results = Results(options, {"target": kind}, jax, optax, bma)
    for name in options.trees:
        params = {
            f"array{i:03}.{'kernel' if len(shape) > 1 else 'bias'}": (
                jax.ShapeDtypeStruct(shape, jnp.float32)
            )
            for i, shape in enumerate(SETS[name])
        }
        cells = {}
        for method in tqdm(options.methods, unit="method", disable=None):
            tx = optax.chain(METHODS[method].tx, optax.scale(-0.1))
            cells[METHODS[method].label] = results.cell(
                lambda tx=tx, params=params: measure(tx, params, where),
                *("trees", name, method),
            )
        print(f"\n### {name} arrays, {kind}\n\n{table(cells, False)}", flush=True)
    for shape in options.grids:
        like, cells = jax.ShapeDtypeStruct(shape, jnp.float32), {}
        name = "x".join(map(str, shape))
        for method, tx in tqdm(on_grid(shape).items(), unit="method", disable=None):
            with warnings.catch_warnings():  # Warnings at run time need a device.
                warnings.simplefilter("ignore")
                cells[method] = results.cell(
                    lambda tx=tx, like=like: measure(tx, like, where, loss),
                    *("grids", name, method),
                )
        print(f"\n### {name}, {kind}\n\n{table(cells, True)}", flush=True)
    results.finish()


if __name__ == "__main__":
    main()
