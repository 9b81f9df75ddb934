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
        "cores": os.cpu_count(),
    }
