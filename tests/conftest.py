"""Strict settings for every test. JAX reads some of them only when it starts."""

import functools
import gc
import os
from importlib import metadata

# Nearly all of the tests' time is compilation of small programs. The older way to
# compile fusions takes a third of the time; later versions of jaxlib do not have it,
# and abort at a flag that they do not know.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=4",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_use_fusion_emitters=false"
        if metadata.version("jaxlib").startswith("0.10.")
        else "",
    ]
)

# One thread of BLAS for each worker of xdist: more of them wait for the other worker's,
# at full speed.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import hypothesis
import jax
import pytest
from jax._src.interpreters import mlir

# JAX makes a context of MLIR for each program, and keeps it with the program. One for
# all programs takes a tenth of the time and half the memory off. The function is not
# public: a JAX without it does as before.
if hasattr(mlir, "make_ir_context"):
    mlir.make_ir_context = functools.cache(mlir.make_ir_context)

# Traces and programs are many small objects that stay: to look through them again and
# again for what could go is a tenth of the time.
gc.set_threshold(100_000, 50, 50)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Sums over shards of two programs at once can wait for each other on two cores, until
# XLA gives up and aborts the process.
jax.config.update("jax_cpu_enable_async_dispatch", False)

hypothesis.settings.register_profile(
    "default", deadline=None, max_examples=15, derandomize=True
)
hypothesis.settings.load_profile("default")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
