"""Executes every notebook in this interpreter's environment; no file is rewritten."""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

FOLDER = Path(__file__).parent.parent / "notebooks"


def execute(path: Path) -> str | None:
    """The error of the first cell that fails, None if all pass."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources=resources
    )
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError) as error:
        return str(error)
    return None


def main() -> None:
    paths = sorted(FOLDER.glob("*.ipynb"))
    failures = 0 if paths else 1  # An empty folder is a wrong checkout, not a success.
    for path in paths:
        start = time.perf_counter()
        error = execute(path)
        failures += error is not None
        verdict = "failed" if error else "passed"
        print(f"{path.name}: {verdict} in {time.perf_counter() - start:.0f} s")
        if error:
            print(error, file=sys.stderr)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
