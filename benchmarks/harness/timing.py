"""Seconds: compilation apart, warmed up, all methods in turns.

Methods that are compared take turns in one process, in a new order each round, so that
a slow minute of the machine meets all of them. Tables give the median and the range.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def compiled(function: Callable, *arguments: Any, **options: Any) -> tuple[Any, float]:
    """The program for such arguments, and the seconds to trace and compile it."""
    start = time.perf_counter()
    program = jax.jit(function, **options).lower(*arguments).compile()
    return program, time.perf_counter() - start


def clock(function: Callable, *arguments: Any) -> tuple[Any, float]:
    """The result, when all of it is there, and the seconds it took."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return result, time.perf_counter() - start


def in_turns(
    measures: dict[str, Callable[[int], float]], rounds: int, patience: float = math.inf
) -> dict[str, list[float]]:
    """The seconds that each of these functions of the round returns, all in turns.

    None is called again once its seconds add up to `patience`.
    """
    order = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in measures}
    for i in range(rounds):
        for name in map(str, order.permutation(list(measures))):
            if sum(seconds[name]) < patience:
                seconds[name].append(measures[name](i))
    return seconds


def summary(seconds: list[float]) -> dict[str, Any]:
    return {
        "seconds": statistics.median(seconds),
        "range": [min(seconds), max(seconds)],
    }
