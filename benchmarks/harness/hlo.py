"""What a compiled program sends between devices, reads and writes: from its HLO's text.

What is in a loop counts once for each trip. Of a branch, the side counts that does
more, unless the branch has one of the names that are not to count; then so does a loop
of one trip or none.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4}
_BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8}
_KINDS = "all-gather", "all-reduce", "all-to-all", "collective-permute"
_KINDS += ("reduce-scatter",)
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
_CALLS = "while", "conditional", "call"
_FREE = "parameter", "get-tuple-element", "tuple", "constant", "bitcast", "after-all"
_SELDOM = 'cond"', 'while"'


class Collective(NamedTuple):
    kind: str
    bytes: int  # of its results on one device: XLA sends several arrays at once.
    largest: int  # of these, the bytes of the largest.
    times: int  # in one run of the program.


def collectives(program: Any, without: tuple[str, ...] = ()) -> list[Collective]:
    """Those of a compiled function, as ``jax.jit(f).lower(x).compile()`` is.

    Args:
      without: the names, by `jax.named_scope`, of branches that are taken seldom.
    """
    return _of("ENTRY", _computations(program), _collective, without)


class Kernel(NamedTuple):
    """An instruction that is launched by itself."""

    kind: str
    bytes: int  # of its operands and results in the device's memory.
    times: int


def kernels(program: Any, without: tuple[str, ...] = ()) -> list[Kernel]:
    """Those of a compiled function. Each reads its operands and writes its results."""
    return _of("ENTRY", _computations(program), _kernel, without)


def _computations(program):
    """By name, the instructions of each: name, type of the result, kind, line."""
    computations, name = {}, ""
    for line in program.as_text().split("\n"):
        if head := _HEAD.match(line):
            name = "ENTRY" if head[1] else head[2]
            computations[name] = []
        elif name and (found := _LINE.match(line)):
            computations[name].append((*found.groups(), line))
    return computations


def _collective(known, name, shape, op, line):
    kind, sizes = op.removesuffix("-start"), _sizes(shape)
    if kind not in _KINDS:
        return None
    return Collective(kind, sum(sizes), max(sizes, default=0), 1)


def _kernel(known, name, shape, op, line):
    """An instruction, and its traffic: not with what is on chip, of type {..S(1)}."""
    known[name] = sum(_sizes(shape, on_chip=False))
    if op in _FREE or op.endswith("-done") or "ConcatBitcast" in line:
        return None
    operands = line.split(f" {op}(", 1)[1].split(")")[0]
    read = sum(known.get(x, 0) for x in re.findall(r"%([\w.\-]+)", operands))
    if op == "slice-start":  # Its operand is whole, its result on chip.
        return Kernel(op, sum(_sizes(shape)) - read, 1)
    if op.endswith("-start"):  # Its result repeats its operands.
        read = 0
    return Kernel(op, read + known[name], 1)


def _of(name, computations, count, without):
    result, known = [], {}
    for own, shape, op, line in computations[name]:
        if op not in _CALLS:
            found = count(known, own, shape, op, line)
            result += [found] if found else []
            continue
        known[own] = sum(_sizes(shape))
        seldom = any(f"/{scope}/{x}" in line for scope in without for x in _SELDOM)
        if op == "while":
            trips = re.search(r"known_trip_count[^0-9]*(\d+)", line)
            body = re.search(r"body=%?([\w.\-]+)", line)[1]
            result += [
                one._replace(times=one.times * int(trips[1] if trips else not seldom))
                for one in _of(body, computations, count, without)
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
            branches = [_of(x, computations, count, without) for x in names]
            result += (min if seldom else max)(branches, key=total)
        else:
            called = re.search(r"to_apply=%?([\w.\-]+)", line)[1]
            result += _of(called, computations, count, without)
    return result


def total(found: Sequence[Collective | Kernel], *kinds: str) -> int:
    """Bytes of these kinds, or of all."""
    return sum(x.bytes * x.times for x in found if not kinds or x.kind in kinds)


def _sizes(shape: str, on_chip: bool = True) -> list[int]:
    """The bytes of each array."""
    return [
        _BYTES.get(dtype, 0) * math.prod(map(int, re.findall(r"\d+", lengths)))
        for dtype, lengths, layout in re.findall(
            r"(\w+)\[([\d,]*)\](\{[^{}]*\})?", shape
        )
        if on_chip or "S(" not in layout
    ]
