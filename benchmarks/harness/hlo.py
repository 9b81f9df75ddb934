"""What a compiled program sends between devices, from the text of its HLO.

A collective in a loop counts once for each trip; of a branch, the side counts that
sends less, or with ``dearest`` the side that sends more.
"""

import math
import re
from typing import Any, NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4}
_BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8}
_KINDS = "all-gather", "all-reduce", "all-to-all", "collective-permute"
_KINDS += ("reduce-scatter",)
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(")


class Collective(NamedTuple):
    kind: str
    bytes: int  # of its result on one device.
    times: int  # in one run of the program.


def collectives(program: Any, dearest: bool = False) -> list[Collective]:
    """Those of a compiled function, as ``jax.jit(f).lower(x).compile()`` is."""
    computations, name = {}, ""
    for line in program.as_text().split("\n"):
        if head := _HEAD.match(line):
            name = "ENTRY" if head[1] else head[2]
            computations[name] = []
        elif name and (found := _LINE.match(line)):
            computations[name].append((*found.groups(), line))
    return _of("ENTRY", computations, max if dearest else min)


def _of(name, computations, choose):
    result = []
    for shape, op, line in computations[name]:
        kind = op.removesuffix("-start")
        if kind in _KINDS:
            result.append(Collective(kind, _size(shape), 1))
        elif op == "while":
            trips = re.search(r"known_trip_count[^0-9]*(\d+)", line)
            body = re.search(r"body=%?([\w.\-]+)", line)[1]
            result += [
                one._replace(times=one.times * int(trips[1] if trips else 1))
                for one in _of(body, computations, choose)
            ]
        elif op == "conditional":
            inner = re.search(r"branch_computations=\{([^}]*)\}", line)
            names = (
                re.findall(r"[\w.\-]+", inner[1])
                if inner
                else [
                    x[1]
                    for x in re.finditer(
                        r"(?:true|false)_computation=%?([\w.\-]+)", line
                    )
                ]
            )
            branches = [_of(x, computations, choose) for x in names]
            result += choose(branches, key=total)
        elif op == "call":
            result += _of(
                re.search(r"to_apply=%?([\w.\-]+)", line)[1], computations, choose
            )
    return result


def total(found: list[Collective], *kinds: str) -> int:
    """Bytes of these kinds, or of all."""
    return sum(x.bytes * x.times for x in found if not kinds or x.kind in kinds)


def _size(shape: str) -> int:
    return sum(
        _BYTES.get(dtype, 0) * math.prod(map(int, re.findall(r"\d+", lengths)))
        for dtype, lengths in re.findall(r"(\w+)\[([\d,]*)\]", shape)
    )
