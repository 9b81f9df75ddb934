"""The harness of the benchmarks, and one tiny run of each study."""

import argparse
import collections
import functools
import json
import math
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.convex import __main__ as convex
from benchmarks.costs import compiled
from benchmarks.figures import figure2
from benchmarks.harness import hlo, results, timing, tuning

ROOT = Path(__file__).parent.parent


def make_results(path, command="one", add=False, **shared):
    options = argparse.Namespace(out=path, command=command, add=add)
    return results.Results(options, shared, pytest)


def interrupted():
    raise KeyboardInterrupt


def test_an_interrupted_study_goes_on(tmp_path):
    path, first = tmp_path / "a.json", make_results(tmp_path / "a.json", steps=3)
    first.cell(lambda: {"x": math.nan, "y": 1 / 3}, "rows", 1)
    with pytest.raises(KeyboardInterrupt):
        first.cell(interrupted, "rows", 2)
    assert not path.exists()  # Half a study replaces no finished one.
    second = make_results(path, steps=3)
    # What is kept and what is measured look alike; the first is not measured again.
    kept = second.cell(interrupted, "rows", 1)
    assert kept == {"x": None, "y": 0.3333333333} == first.content["rows"]["1"]
    second.cell(lambda: 5, "rows", 2)
    second.finish()
    content = json.loads(path.read_text())
    assert list(tmp_path.iterdir()) == [path]
    assert content["rows"] == {"1": kept, "2": 5}
    assert content["options"] == {"steps": 3} and content["cores"] > 0
    assert content["runs"] == [{"command": "one", "commit": results.commit()}]


def test_drafts_of_other_settings_or_commands_are_not_gone_on_with(tmp_path):
    path = tmp_path / "a.json"
    make_results(path, steps=3).cell(lambda: 1, "rows", "a")
    assert "rows" not in make_results(path, steps=4).content
    assert "rows" not in make_results(path, command="two", steps=3).content
    assert "rows" in make_results(path, steps=3).content


def test_cells_are_added_to_a_finished_file(tmp_path):
    path = tmp_path / "a.json"
    first = make_results(path)
    first.cell(lambda: 1, "rows", "a")
    first.finish()
    assert "rows" not in make_results(path).content
    second = make_results(path, command="two", add=True)
    assert second.cell(interrupted, "rows", "a") == 1
    assert [run["command"] for run in second.content["runs"]] == ["one", "two"]
    with pytest.raises(SystemExit, match="results of other settings"):
        make_results(path, add=True, steps=3)


@pytest.mark.parametrize(("best", "calls"), [(-8, 2), (-2, 3), (-20, 4), (-100, 8)])
def test_an_optimum_on_an_edge_is_not_called_one(best, calls):
    seen = []

    def valley(i, rates):
        seen.append(i)
        losses = [abs(math.log2(rate) - best) + i for rate in rates]
        return [math.nan if r > 1 else x for r, x in zip(rates, losses, strict=True)]

    found = tuning.grow(valley, [{"b2": 0.5}, {"b2": 0.9}], start=-8)
    assert len(seen) == calls and found["settings"] == {"b2": 0.5}
    assert found["interior"] == (best > -100)
    assert best == -100 or found["rate"] == 2.0**best


def test_a_grid_has_no_edge():
    def bowl(settings, best):
        x, y = (math.log2(s) for s in settings)
        return math.inf if y > 0 else (x - 9) ** 2 + (y + 0.5) ** 2 + (x - 9) * y / 2

    settings, runs = tuning.descend(bowl, (1.0, 0.01), (4, 2, 1))
    assert [round(2 * math.log2(x)) for x in settings] == [18, -1] and runs < 50
    assert tuning.best_of({0.1: 2.0, 1.0: math.nan, 10.0: 3.0}) == (0.1, True)


def test_timings_take_turns():
    rounds = []

    def measure(name, seconds, i):
        rounds.append((i, name))
        return seconds

    every = {x: functools.partial(measure, x, s) for x, s in (("a", 1), ("b", 9))}
    seconds = timing.in_turns(every, 3, patience=8)
    assert seconds == {"a": [1, 1, 1], "b": [9]}
    assert sorted(rounds) == [(0, "a"), (0, "b"), (1, "a"), (2, "a")]


def test_benchmarks_use_public_names():
    for path in (ROOT / "benchmarks").rglob("*.py"):
        lines = re.findall(r"^ *(?:from|import) bma_optax.*", path.read_text(), re.M)
        assert set(lines) <= {"import bma_optax as bma"}, path


def run(tmp_path, study, options):
    """What a study writes and prints, in a process with settings of its own."""
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", f"benchmarks.{study}", *options.split()]

    def start(*more):
        words = [*command, "--out", str(out), *more]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed = start()
    content = json.loads(out.read_text())
    # Every cell has a place: a second start finds all of them, and changes none.
    start("--add")
    again = json.loads(out.read_text())
    assert len(again.pop("runs")) == 2 and len(content.pop("runs")) == 1
    assert again == content and content["versions"]["jax"]
    return content, printed


@pytest.mark.benchmark
def test_grids(tmp_path):
    options = (
        "--sizes 12 16 --volume-sizes --problems spline --repeats 2 --max-steps 60"
    )
    options += " --methods newton_bma sgd cg direct pyamg"
    content, printed = run(tmp_path, "grids", options)
    assert list(content["problems"]) == ["paint_12", "paint_16", "spline"]
    for name in ("paint_12", "paint_16"):
        problem = content["problems"][name]
        assert problem["optimum"] < problem["target"] < problem["start"]
        rows = problem["methods"]
        assert list(rows)[:3] == ["newton_bma", "sgd", "cg"]
        for method in ("newton_bma", "cg", "direct"):
            row = rows[method]
            assert row["reached"] and abs(row["gap"]) <= 1e-6
            assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
        assert set(rows["sgd"]["settings"]) == {"rate", "1 - momentum"}
    # Here Jacobi does little: a larger gap, said to be one.
    assert not content["problems"]["spline"]["methods"]["cg"]["reached"]
    assert "not reached in 60: gap" in printed
    assert (tmp_path / "out.png").stat().st_size > 0


@pytest.mark.benchmark
def test_energies_in_float32(tmp_path):
    options = "--sizes --volume-sizes --problems torsion --float32 --repeats 1"
    options += " --max-steps 200 --methods newton_bma lbfgs newton_cg"
    content, _ = run(tmp_path, "grids", options)
    assert content["options"]["dtype"] == "float32"
    for row in content["problems"]["torsion"]["methods"].values():
        assert row["reached"] and abs(row["gap"]) <= 1e-6  # Told in float64.


@pytest.mark.benchmark
def test_sheet(tmp_path):
    out = tmp_path / "sheet.png"
    command = [sys.executable, "-m", "benchmarks.grids.sheet", "--out", str(out)]
    subprocess.run([*command, "--problems", "torsion"], cwd=ROOT, check=True)
    assert out.stat().st_size > 0


@pytest.mark.benchmark
def test_curvature(tmp_path):
    options = "--problems net --repeats 1 --max-steps 3"
    content, printed = run(tmp_path, "curvature", options)
    rows = content["problems"]["net"]["methods"]
    assert len(rows) == 8 and all(f"| {method} |" in printed for method in rows)
    for row in rows.values():
        # Nothing trains a net in three steps.
        assert not row["reached"] and row["steps"] == 3 and 0 < row["gap"] < 10
    # Blocks, their rounding, probes, then one product for each step's length.
    assert rows["newton_bma_per_leaf"]["products"] == 4 + 4 + 32 + 3
    assert rows["newton_bma_diagonal"]["products"] == 32 + 3
    assert rows["newton_cg"]["products"] >= 32 + 3
    assert rows["lbfgs"]["products"] == rows["adam"]["products"] == 0


@pytest.mark.benchmark
def test_networks(tmp_path):
    options = "--small --tasks mlp_raw --methods units_learned"
    content, printed = run(tmp_path, "networks", options)
    task = content["tasks"]["mlp_raw"]
    assert list(task["methods"]) == ["adam", "units_learned"]
    for row in task["methods"].values():
        tuned = row["tuning"]
        grids = {json.dumps(g["settings"]): g["losses"] for g in tuned["grids"]}
        grid = grids[json.dumps(tuned["settings"])]
        assert min(x for x in grid.values() if x) == grid[str(tuned["rate"])]
        assert len(row["train_loss"]) == len(row["test_loss"]) == 6
    assert task["parameters"] == 64 * 6 + 6 + 6 * 10 + 10
    # In the tables of the task and of all tasks.
    label = "| AdaGrad-BMA, each unit alone, learned weights |"
    assert printed.count(label) == 2
    assert (tmp_path / "out.png").stat().st_size > 0


@pytest.mark.benchmark
def test_figure2(tmp_path):
    options = "--epochs 1 --batch-size 700 --seeds 1 --learning-rates 0.1 1e30"
    content, printed = run(tmp_path, "figures.figure2", options)
    assert "| AdaGrad-Full |" in printed
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
    for net, methods, pairs in (("small", 6, 1), ("tiny", 7, 3)):
        result = content["nets"][net]
        assert len(result["methods"]) == methods
        look = result["look"]
        assert 0 < np.median(look["corrections"]) < 1
        assert len(look["angles"]) == pairs
        assert all(0 <= x <= 180 for x in sum(look["angles"].values(), []))
        for M in look["matrices"].values():
            assert np.shape(M) == (6, 6) and np.all(np.diag(M) == 1)
        for row in result["methods"].values():
            # The rate 1e30 diverges, which must not make it the best one.
            assert row["best_learning_rate"] == 0.1
            assert row["best_on_edge_of_grid"]
            assert row["seconds_per_step"] > 0
            assert len(row["curve"]["loss"][0]) == 2


@pytest.mark.benchmark
def test_linear_models():
    task = convex.task_of("wine", True, 5, 4)
    assert 0 <= convex.least_loss(task) < 1e-2
    for online in (True, False):
        found = convex.measure(task, "units_learned", online)
        assert len(found["loss"]) == 4 and np.all(np.isfinite(found["loss"]))


HLO = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %y = f32[8]{0} fusion(%x), kind=kLoop, calls=%f
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %y)
}

%k (q: f32[8]) -> f32[8] {
  ROOT %q = f32[8]{0} parameter(0)
}

%c (r: f32[8]) -> f32[8] {
  %r = f32[8]{0} parameter(0)
  ROOT %d = f32[8]{0} copy(%r)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %loop = (s32[], f32[8]{0}) while(%t0), body=%body, known_trip_count={"n":"3"}
  %once = (s32[], f32[8]{0}) while(%t1), body=%body, op="/refresh/while"
  %b = f32[8]{0} conditional(%p, %a), branch_computations={%k, %c}, op="/refresh/cond"
  %start = (f32[8]{0:S(1)}, f32[8]{0}, u32[]{:S(2)}) copy-start(%a)
  %done = f32[8]{0:S(1)} copy-done(%start)
  ROOT %last = f32[8]{0} fusion(%done), kind=kLoop, calls=%f
}
"""


@pytest.mark.parametrize(
    ("without", "fusions", "copies"), [(("refresh",), 3, 0), ((), 4, 1)]
)
def test_kernels_of_a_compiled_program(without, fusions, copies):
    """A loop's by its trips, of a branch those of one side, none on chip."""
    found = hlo.kernels(types.SimpleNamespace(as_text=lambda: HLO), without)
    count = collections.Counter()
    for kernel in found:
        count[kernel.kind, kernel.bytes] += kernel.times
    expected = {("fusion", 64): fusions, ("copy", 64): copies, ("copy-start", 32): 1}
    assert +count == +collections.Counter(expected | {("fusion", 32): 1})
    assert hlo.total(found) == 64 * (fusions + copies + 1)


def test_bad_data_is_said_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match="train-images-idx3-ubyte") as error:
        figure2.main(["--dataset", "mnist", "--data-dir", str(tmp_path)])
    assert "\n" not in str(error.value)


@pytest.mark.benchmark
def test_step_cost(tmp_path):
    content, printed = run(tmp_path, "costs.step_cost", "--trees 50k --steps 2")
    rows = content["trees"]["50k"]["methods"]
    d = content["trees"]["50k"]["parameters"]
    assert {"adagrad", "adam", "muon", "bma", "mini_bma"} <= set(rows)
    # The state is what the theory says: diag H, and three small things.
    assert 4 * d < rows["bma"]["state"] < 4.01 * d
    assert rows["adam"]["state"] == pytest.approx(8 * d, rel=1e-3)
    assert f"{d:,} parameters in 6 arrays" in printed


@pytest.mark.benchmark
def test_compiled_steps():
    """Compiled for the device at hand: a row has what a step must read and write."""
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    weights = {"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32)}
    image = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    rows = {
        name: compiled.measure(compiled.METHODS[name].tx, weights, where)
        for name in ("adagrad", "bma")
    }
    # The gradient, sum and parameter are read, and the last two written.
    assert 20 <= rows["adagrad"]["step"]["bytes"] < rows["bma"]["step"]["bytes"]
    heavy_ball = compiled.on_grid(image.shape)["heavy ball"]
    row = compiled.measure(heavy_ball, image, where, compiled.loss)
    step, refresh = row["step"], row["with refresh"]
    assert step["bytes"] < refresh["bytes"] and step["kernels"] < refresh["kernels"]
    text = compiled.table(rows | {"heavy ball": row}, True)
    lines = [[x.strip() for x in line.split("|")] for line in text.splitlines()]
    labels = [line[1] for line in lines[2:]]
    assert labels == ["adagrad", "bma", "heavy ball", "... with refresh"]
    assert lines[-1][2] == f"{refresh['bytes']:.1f}"


@pytest.mark.benchmark
def test_prices(tmp_path):
    content, printed = run(tmp_path, "grids.prices", "--size 16 --rounds 2")
    rules = {"tiles of 4 × 4", "with slopes", "tiles of 4 × 1"}
    assert len(content["operators"]) == 3
    for found in content["operators"].values():
        assert set(found["ratios"]) == rules and min(found["ratios"].values()) > 0
    assert "| thin plate, 25 points |" in printed


@pytest.mark.benchmark
def test_accelerator(tmp_path):
    arguments = "--shapes 8x8 --roots 4 --rounds 1"
    content, printed = run(tmp_path, "costs.accelerator", arguments)
    assert set(content["roots"]) > {"eigh 4", "scale_by_bma"}
    names = {"gradient", "product", "sgd", "newton_bma", "newton_bma, refresh"}
    assert names < set(content["steps"]["8x8"])
    assert "| newton_bma, refresh |" in printed


@pytest.mark.benchmark
def test_min_eigenvalue(tmp_path):
    content, printed = run(tmp_path, "costs.min_eigenvalue", "--steps 3 --seeds 1")
    assert len(content["rows"]) == 4
    assert all(f"| {name.split()[0]}" in printed for name in content["rows"])
