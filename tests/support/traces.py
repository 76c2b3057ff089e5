"""Demand for more models than fit, and the fewest loads that serve it.

In: how many tasks. Out: which model each of them wants.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

#: Models, and how many of them fit.
MODELS, FIT = 12, 4


def skewed(count: int) -> list[int]:
    """Which model each task wants: the first some thirty times as often as the last."""
    return random.Random(7).choices(range(MODELS), weights=[1 / (1 + n) ** 1.4 for n in range(MODELS)], k=count)


def even(count: int) -> list[int]:
    """Each model as often as any other, in no order."""
    return random.Random(8).choices(range(MODELS), k=count)


def shifting(count: int) -> list[int]:
    """A few models for a while, then a few others."""
    draw = random.Random(9)
    return [(number // 200 * 3 + draw.randrange(3)) % MODELS for number in range(count)]


def least_loads(wanted: Sequence[int], fit: int) -> int:
    """Belady: whoever is wanted last makes room. No order of loads is better for tasks that are run in turn."""
    loads, resident = 0, set[int]()
    for now, model in enumerate(wanted):
        if model in resident:
            continue
        loads += 1
        if len(resident) == fit:
            resident.remove(max(resident, key=lambda one: _next(wanted, one, now)))
        resident.add(model)
    return loads


def _next(wanted: Sequence[int], model: int, after: int) -> int:
    try:
        return wanted.index(model, after)
    except ValueError:
        return len(wanted)
