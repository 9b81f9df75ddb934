"""One short run of the benchmark of curvature, and what it measures with."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
METHODS = ["newton_bma_per_leaf", "newton_bma_per_unit", "newton_bma_diagonal"]
METHODS += ["natural_bma", "lbfgs", "newton_cg", "adam", "sgd"]


def test_curvature_runs(tmp_path):
    # A process of its own: the script wants other settings of JAX than the tests.
    options = "--problems net --repeats 1 --max-steps 3 --output-dir"
    command = [sys.executable, "-m", "benchmarks.curvature", *options.split(), tmp_path]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    for method in METHODS:
        assert f"| {method} |" in result.stdout
    content = json.loads((tmp_path / "curvature.json").read_text())
    assert content["versions"]["jax"] and content["device"]
    assert content["options"] == {"repeats": 1, "max_steps": 3}
    net = content["problems"]["net"]
    rows = net["methods"]
    assert len(rows) == len(METHODS)
    assert set(rows["sgd"]["settings"]) == {"rate", "1 - momentum"}
    for row in rows.values():
        # Nothing trains a net in three steps.
        assert not row["reached"] and row["steps"] == 3
        assert 0 < row["gap"] < 10
        assert row["seconds"][0] > 0 and row["compile_seconds"] > 0
    # Blocks, their rounding, probes, then two products for each step's length.
    assert rows["newton_bma_per_leaf"]["products"] == 4 + 4 + 32 + 3 * 2
    assert rows["newton_bma_diagonal"]["products"] == 32 + 3 * 2
    assert rows["newton_cg"]["products"] >= 32 + 3
    assert rows["lbfgs"]["products"] == rows["adam"]["products"] == 0
