"""What every study writes: numbers, with the machine, the command and the commit.

A study's numbers lie in one JSON file. While it runs they lie in a draft beside that
file (`.part`), which is replaced as a whole after each cell: an interruption loses one
cell at most, and the same command goes on where it was. At the end the draft becomes
the file.
"""

import argparse
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np


class Results:
    """Cells by their keys; those that the draft has already are not measured again.

    Args:
      options: of the `Parser`: `out`, the JSON file; `command`, what selects the cells
        (the draft of another command is not gone on with); and `add`, to keep the cells
        of a finished file of the same settings, versions and machine.
      shared: the settings that all cells of a file share.
      modules: whose versions are recorded.
    """

    def __init__(
        self, options: argparse.Namespace, shared: dict[str, Any], *modules: ModuleType
    ) -> None:
        path, command = options.out, options.command
        self.path, self.draft = path, path.with_suffix(".part")
        self.header = plain({"options": shared, **machine(*modules)})
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = self.kept(self.draft)
        if kept and kept["runs"][-1]["command"] != command:
            kept = None
        if kept is None and options.add and path.exists():
            kept = self.kept(path)
            if kept is None:
                raise SystemExit(
                    f"{path}: results of other settings, versions or another machine. "
                    "Leave out --add, or choose another file with --out."
                )
        self.content = kept or {**self.header, "runs": []}
        run = {"command": command, "commit": commit()}
        if run not in self.content.setdefault("runs", []):
            self.content["runs"].append(run)

    def kept(self, path: Path) -> dict[str, Any] | None:
        """What an earlier run of the same settings left there."""
        try:
            found = json.loads(path.read_text())
            same = all(found[key] == value for key, value in self.header.items())
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if same else None

    def cell(self, measure: Callable[[], Any], *keys: Any) -> Any:
        """The numbers at these keys: kept ones, or measured and written now."""
        inner, last = self.content, str(keys[-1])
        for key in keys[:-1]:
            inner = inner.setdefault(str(key), {})
        if last not in inner:
            inner[last] = plain(measure())
            write(self.content, self.draft)
        return inner[last]

    def finish(self) -> None:
        """The draft becomes the file."""
        write(self.content, self.draft)
        self.draft.replace(self.path)
        where = f"{self.content['device']}, {self.content['cores']} cores"
        print(f"\n{where}, JAX {jax.__version__}\nWrote {self.path}")


def write(content: dict[str, Any], path: Path) -> None:
    """All of it or nothing: a run may be interrupted here as well."""
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    draft.replace(path)


def plain(value: Any) -> Any:
    """For JSON: lists for arrays, ten digits, null for what is not finite."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.10g}") if math.isfinite(value) else None
    return value


def machine(*modules: ModuleType) -> dict[str, Any]:
    """Versions of these modules and of Python, and the device."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "versions": {m.__name__: getattr(m, "__version__", None) for m in modules},
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        # Those that this process may use, where the system says.
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
    }


def commit() -> str | None:
    """The commit of the checkout, marked where files were changed since."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        folder = Path(__file__).parent
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None


def positive(text: str) -> int:
    """A type for `argparse`."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be positive")
    return int(text)


class Parser(argparse.ArgumentParser):
    """The arguments of a study, with `--out` and `--add`, which all of them have.

    By default `benchmarks.costs.step_cost` writes `costs/results/step_cost.json`.
    """

    def __init__(self, module: str, doc: str) -> None:
        super().__init__(
            prog=f"python -m {module}",
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        study, name = module.split(".")[1], module.split(".")[-1]
        out = Path(__file__).parents[1] / study / "results" / f"{name}.json"
        kept = "keep the cells of a finished file"
        self.add_argument("--out", type=Path, default=out, help="a JSON file")
        self.add_argument("--add", action="store_true", help=kept)

    def parse(self, arguments: list[str] | None) -> argparse.Namespace:
        """The options, and as `command` the words that selected them."""
        words = sys.argv[1:] if arguments is None else arguments
        options = self.parse_args(words)
        options.command = shlex.join([*self.prog.split(), *words])
        return options
