"""Tuning on grids that grow until the best point is inside.

Every method that has a rate is tuned, by the same rule, on another instance or seed
than the one that is reported. An optimum on the edge of a grid is none: a growing grid
goes on beyond it, and where a grid is given, or has grown too often, the table says so.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

Settings = tuple[float, ...]


def descend(
    score: Callable[[Settings, Any], Any],
    start: Settings,
    strides: Sequence[int] = (1,),
    factor: float = 2**0.5,
) -> tuple[Settings, int]:
    """The point of a grid of powers of `factor` that is better than its neighbours.

    The grid starts at `start` and has no edge; its strides become finer.

    Args:
      score: settings and the best score up to now, or None -> the score to minimise.
      start: settings.
      strides: in powers of `factor`, one after the other.

    Returns:
      The settings, and how many points were scored.
    """
    scores: dict[tuple[int, ...], Any] = {}

    def settings(point: tuple[int, ...]) -> Settings:
        return tuple(x * factor**k for x, k in zip(start, point, strict=True))

    def scored(point: tuple[int, ...]) -> Any:
        if point not in scores:
            scores[point] = score(settings(point), min(scores.values(), default=None))
        return scores[point]

    best = (0,) * len(start)
    for stride in strides:
        while True:
            around = [best]
            for axis, k in itertools.product(range(len(best)), (-stride, stride)):
                around.append((*best[:axis], best[axis] + k, *best[axis + 1 :]))
            nearest = min(around, key=scored)
            if nearest == best:
                break
            best = nearest
    return settings(best), len(scores)


def grow(
    evaluate: Callable[[int, list[float]], list[float]],
    variants: Sequence[dict[str, float]],
    start: int,
    width: int = 6,
    extensions: int = 6,
) -> dict[str, Any]:
    """The best of some variants, each over rates 2^k; grids grow `width` rates at once.

    Args:
      evaluate: the number of a variant and `width` rates -> their losses.
      variants: settings beside the rate.
      start: k in the middle of the first grid.
      extensions: at most so many of all grids.

    Returns:
      `settings` and `rate` of the best, whether it is `interior`, and all `grids`.
    """
    grids: list[dict[int, float]] = [{} for _ in variants]

    def extend(i: int, least: int) -> None:
        powers = range(least, least + width)
        losses = evaluate(i, [2.0**k for k in powers])
        losses = [x if math.isfinite(x) else math.inf for x in losses]
        grids[i].update(zip(powers, losses, strict=True))

    def best() -> tuple[int, int, bool]:
        i = min(range(len(grids)), key=lambda i: min(grids[i].values()))
        return i, *best_of(grids[i])

    for i in range(len(variants)):
        extend(i, start - width // 2)
    for _ in range(extensions):
        i, k, on_edge = best()
        if not on_edge:
            break
        # If all diverge, `k` is the least power, and less is the way to go.
        low, high = min(grids[i]), max(grids[i])
        extend(i, low - width if k == low else high + 1)
    i, k, on_edge = best()
    return {
        "settings": variants[i],
        "rate": 2.0**k,
        "interior": not on_edge,
        "grids": [
            {"settings": v, "losses": {str(2.0**k): g[k] for k in sorted(g)}}
            for v, g in zip(variants, grids, strict=True)
        ],
    }


def best_of(losses: dict[Any, float]) -> tuple[Any, bool]:
    """The place with the least loss, and whether it is the first or the last of all."""
    finite = {x: v if math.isfinite(v) else math.inf for x, v in losses.items()}
    best = min(finite, key=lambda x: (finite[x], x))
    return best, best in (min(losses), max(losses))
