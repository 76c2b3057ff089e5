"""How often items are looked at: what work costs, without a clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from legit_worker.batching.fairness import Item


class Touched(Item):
    """Counts whatever is asked of any item."""

    times = 0

    def __getattribute__(self, name: str) -> Any:
        Touched.times += 1
        return super().__getattribute__(name)


def touches(work: Callable[[], object]) -> int:
    Touched.times = 0
    work()
    return Touched.times
