"""One short run of the benchmark of inverse problems, on tiny grids."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_inverse_problems_run(tmp_path):
    # A process of its own: the script wants other settings of JAX than the tests.
    options = (
        "--sizes 12 16 --volume-sizes --problems spline --repeats 2 --max-steps 60"
    )
    methods = "--methods newton_bma sgd cg direct pyamg --output-dir"
    command = [
        sys.executable,
        "-m",
        "benchmarks.grids",
        *options.split(),
        *methods.split(),
        tmp_path,
    ]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "grids.json").read_text())
    assert content["versions"]["jax"] and content["device"]
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
        assert rows["newton_bma"]["compile_seconds"] > 0
    # Here Jacobi does little: a larger gap, said to be one.
    assert not content["problems"]["spline"]["methods"]["cg"]["reached"]
    assert "not reached in 60: gap" in result.stdout
    assert (tmp_path / "grids.png").stat().st_size > 0
