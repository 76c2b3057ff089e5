"""Counts of how large things were, by size. Pure.

In: numbers. Out: how many were at most as large as each bound, and their sum.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

#: Seconds, from a task that an idle worker answers at once to one that waits for a flood of others.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

#: Items of a batch.
ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

#: A batch's padded cost: tokens or pixels, in the model's own unit.
COST = tuple(4.0**power for power in range(2, 13))


class Histogram:
    """One distribution. One thread observes. Any thread may read it without a lock, and may miss the last number."""

    __slots__ = ("_counts", "bounds", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        #: The largest number of each bucket, ascending; one more bucket has the rest.
        self.bounds = bounds
        self.sum = 0.0
        self._counts = [0] * (len(bounds) + 1)

    def __repr__(self) -> str:
        return f"<Histogram: {sum(self._counts)} numbers, {self.sum:g} in all>"

    def observe(self, number: float) -> None:
        """Count a number."""
        self._counts[bisect_left(self.bounds, number)] += 1
        self.sum += number

    def at_most(self) -> list[int]:
        """How many numbers were at most as large as each bound; last, how many there were."""
        return list(accumulate(self._counts))
