"""Short runs of the benchmarks of cost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(part, out, *options):
    command = [sys.executable, "-m", f"benchmarks.costs.{part}", "--out", str(out)]
    printed = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return json.loads(out.read_text()), printed


def test_step_cost(tmp_path):
    out = tmp_path / "step_cost.json"
    content, printed = run("step_cost", out, "--trees", "50k", "--steps", "2")
    rows = content["trees"]["50k"]["methods"]
    d = content["trees"]["50k"]["parameters"]
    assert out.with_suffix(".png").stat().st_size > 0
    assert {"adagrad", "adam", "muon", "bma", "per_unit"} <= set(rows)
    assert all(row["seconds"] > 0 for row in rows.values())
    # The state is what the theory says: diag H, and three small things.
    assert 4 * d < rows["bma"]["state"] < 4.01 * d
    assert rows["adam"]["state"] == pytest.approx(8 * d, rel=1e-3)
    assert f"{d:,} parameters in 6 arrays" in printed


def test_inverse_root(tmp_path):
    out = tmp_path / "inverse_root.json"
    options = "--sizes", "16", "40", "--conditions", "10", "1e3", "--repeats", "1"
    content, printed = run("inverse_root", out, *options)
    assert len(content["cells"]) == 4 and "| 40 | 1e+03 |" in printed
    for cell in content["cells"]:
        for name, found in cell["methods"].items():
            if name != "Lanczos":  # Too few vectors for the larger condition.
                assert found["error"] < 1e-3, (cell["size"], name)


def test_compile_time(tmp_path):
    options = "--arrays", "1", "4", "--repeats", "1"
    content, printed = run("compile_time", tmp_path / "times.json", *options)
    assert len(content["methods"]) == printed.count("\n| `")
    for row in content["methods"].values():
        assert all(times["compile"] > 0 for times in row.values())
