"""What was computed so far, for `inspect stats`, metrics and the log.

In: each batch that went well. Out: sums, and how batches were spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from legit_worker.batching.histogram import COST, ITEMS, SECONDS, Histogram


class Shape:
    """How large one model's batches were, and how long they took."""

    __slots__ = ("items", "padded_cost", "seconds")

    def __init__(self) -> None:
        self.items, self.padded_cost, self.seconds = Histogram(ITEMS), Histogram(COST), Histogram(SECONDS)

    def note(self, items: int, padded_cost: int, seconds: float) -> None:
        """A batch went well."""
        self.items.observe(items)
        self.padded_cost.observe(padded_cost)
        self.seconds.observe(seconds)


#: The numbers among `Counters`.
SUMMED = ("batches", "items", "cost", "padded_cost", "forward_seconds", "out_of_memory", "duplicates", "beside")


@dataclass
class Counters:
    """One model's, or the sum of several models'."""

    batches: int = 0
    items: int = 0
    #: Cost units computed, without and with padding.
    cost: int = 0
    padded_cost: int = 0
    #: Seconds inside `forward`.
    forward_seconds: float = 0.0
    #: Batches that ran out of memory.
    out_of_memory: int = 0
    #: Items that were not computed, since their batch had an equal one.
    duplicates: int = 0
    #: Batches that a stream computed, beside the main thread.
    beside: int = 0
    #: For metrics.
    shape: Shape = field(default_factory=Shape, compare=False, repr=False)

    def __add__(self, other: Counters) -> Counters:
        mine, others = vars(self), vars(other)
        return Counters(**{name: mine[name] + others[name] for name in SUMMED})

    def note(self, costs: Sequence[int], padded_cost: int, seconds: float) -> None:
        """A batch of items of these costs went well, and took this long."""
        self.batches += 1
        self.items += len(costs)
        self.cost += sum(costs)
        self.padded_cost += padded_cost
        self.forward_seconds += seconds
        self.shape.note(len(costs), padded_cost, seconds)

    @property
    def waste(self) -> float:
        """The part of all computed cost that was padding, 0 to 1."""
        return 1 - self.cost / self.padded_cost if self.padded_cost else 0.0

    def report(self) -> dict[str, float]:
        """As `inspect stats` gives it: JSON-safe, `mean_batch` in items, `waste` from 0 to 1."""
        return {
            "batches": self.batches,
            "items": self.items,
            "mean_batch": round(self.items / self.batches, 2) if self.batches else 0.0,
            "waste": round(self.waste, 4),
            **{name: count for name in ("out_of_memory", "duplicates", "beside") if (count := getattr(self, name))},
        }
