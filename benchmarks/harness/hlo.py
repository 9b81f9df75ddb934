"""What a compiled program sends between devices, from the text of its HLO.

A collective in a loop counts once for each trip. Of a branch, the side counts that
sends more, unless the branch has one of the names that are not to count.
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
    bytes: int  # of its results on one device: XLA sends several arrays at once.
    largest: int  # of these, the bytes of the largest.
    times: int  # in one run of the program.


def collectives(program: Any, without: tuple[str, ...] = ()) -> list[Collective]:
    """Those of a compiled function, as ``jax.jit(f).lower(x).compile()`` is.

    Args:
      without: the names, by `jax.named_scope`, of branches that are taken seldom.
    """
    computations, name = {}, ""
    for line in program.as_text().split("\n"):
        if head := _HEAD.match(line):
            name = "ENTRY" if head[1] else head[2]
            computations[name] = []
        elif name and (found := _LINE.match(line)):
            computations[name].append((*found.groups(), line))
    return _of("ENTRY", computations, without)


def _of(name, computations, without):
    result = []
    for shape, op, line in computations[name]:
        kind = op.removesuffix("-start")
        if kind in _KINDS:
            sizes = _sizes(shape)
            result.append(Collective(kind, sum(sizes), max(sizes, default=0), 1))
        elif op == "while":
            trips = re.search(r"known_trip_count[^0-9]*(\d+)", line)
            body = re.search(r"body=%?([\w.\-]+)", line)[1]
            result += [
                one._replace(times=one.times * int(trips[1] if trips else 1))
                for one in _of(body, computations, without)
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
            branches = [_of(x, computations, without) for x in names]
            seldom = any(f'/{scope}/cond"' in line for scope in without)
            result += (min if seldom else max)(branches, key=total)
        elif op == "call":
            result += _of(
                re.search(r"to_apply=%?([\w.\-]+)", line)[1], computations, without
            )
    return result


def total(found: list[Collective], *kinds: str) -> int:
    """Bytes of these kinds, or of all."""
    return sum(x.bytes * x.times for x in found if not kinds or x.kind in kinds)


def _sizes(shape: str) -> list[int]:
    """The bytes of each array."""
    return [
        _BYTES.get(dtype, 0) * math.prod(map(int, re.findall(r"\d+", lengths)))
        for dtype, lengths in re.findall(r"(\w+)\[([\d,]*)\]", shape)
    ]
