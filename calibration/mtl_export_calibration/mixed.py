"""Find the smallest set of layers to leave unquantised so that the worst task stays close.

Layers are ordered by what quantising each alone costs the task it costs most (SQNR, worst
first). The shortest beginning of that order that passes is found by doubling and halving,
each trial verified on data; then every layer of it is put back once, the least costly
first, and stays quantised where the rest still passes. So no single layer of the result
can be left out of it; that no other set is smaller is not claimed (it would take 2^n trials).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# What quantising all but these layers costs the worst task, in points.
Trial = Callable[[frozenset[str]], float]


@dataclass(frozen=True)
class Search:
    """What was found.

    Attributes:
        excluded: Layers to leave unquantised.
        drop: Points the worst task loses then.
        passed: Whether that is allowed.
        trials: How many sets were tried.
    """

    excluded: frozenset[str]
    drop: float
    passed: bool
    trials: int


def worst_first(sqnr_db: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the layers, the one that costs some task most first.

    Args:
        sqnr_db: Of every layer, by task.
    """
    return sorted(sqnr_db, key=lambda name: (min(sqnr_db[name].values()), name))


def smallest_exclusion(
    order: Sequence[str], trial: Trial, *, max_drop: float, max_excluded: int
) -> Search:
    """Return the smallest set found.

    Args:
        order: All layers, as ``worst_first`` gives them.
        trial: Tells what a set costs; slow.
        max_drop: Points the worst task may lose.
        max_excluded: Most layers that may be left unquantised.
    """
    seen: dict[frozenset[str], float] = {}

    def drop(excluded: frozenset[str]) -> float:
        if excluded not in seen:
            seen[excluded] = trial(excluded)
        return seen[excluded]

    def passes(count: int) -> bool:
        return drop(frozenset(order[:count])) <= max_drop

    limit = min(max_excluded, len(order))
    low, high = -1, 0
    while not passes(high):
        if high >= limit:
            best = min(seen, key=lambda excluded: (seen[excluded], len(excluded)))
            return Search(best, seen[best], False, len(seen))
        low, high = high, min(limit, max(1, high * 2))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    excluded = frozenset(order[:high])
    for name in reversed(order[:high]):
        if drop(excluded - {name}) <= max_drop:
            excluded -= {name}
    return Search(excluded, drop(excluded), True, len(seen))
