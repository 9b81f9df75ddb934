"""What a benchmark's numbers were measured with."""

import os
import platform
from types import ModuleType
from typing import Any

import jax


def machine(*modules: ModuleType) -> dict[str, Any]:
    """Versions of these modules and of Python, and the device: a part of every JSON."""
    return {
        "versions": {m.__name__: getattr(m, "__version__", None) for m in modules},
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "cores": cores(),
    }


def cores() -> int | None:
    """Those that this process may use, where the system says."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count()
