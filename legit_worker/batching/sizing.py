"""How large a model's next batch may be, in time. Pure; memory is bounded elsewhere.

In: what each batch took, and the user's bound on the seconds of one. Out: items of the next batch, and the seconds of
work that waits.
"""

from __future__ import annotations

from legit_worker.batching.costmodel import CostModel

#: Items in the first batch of all, which nothing is known about.
FIRST_BATCH = 8

#: A batch is at most this many times as large as any before it that kept the bound: however well a fit explains the
#: batches that ran, it knows little about one far beyond them.
GROWTH = 4

#: A batch of several items that took too long is followed by one of this part of its size.
SHRINK = 0.5

#: A batch that is over its bound by less than this is one that kept it: no two take the same time.
SLACK = 1.1

#: A batch may always last this many launches, even beyond the user's bound. Otherwise a model with a launch of 0.5 s
#: would compute one item at a time.
LAUNCHES = 2.0

#: The share of a batch's time that its launch may take. A smaller share would mean longer batches, which the next
#: task waits for, for less than this much more throughput.
LAUNCH_SHARE = 0.05

#: Seconds of a batch that is short enough for anyone. On a CPU larger batches gain by more than the launch they save,
#: which the model doesn't know: with MiniLM, batches this long are about 5 % faster per item than ones of a third.
SHORT = 0.15


#: The share of the user's target latency that a batch, or a wait for company, may take. A task waits for the batch that
#: runs and for its own, and perhaps for one of another model.
TARGET_SHARE = 1 / 3

#: Seconds of a batch beside an app that sends little: the least that they are bounded to, and how many times what that
#: app's items take alone. Its next item waits for the batch that runs, and for its own.
SHARED_SECONDS, SHARED = 0.02, 1.0


class Sizing:
    """The size of one model's batches, learned from those that ran. Lives on the main thread, inside the engine."""

    def __init__(self, max_seconds: float, target: float | None = None) -> None:
        self._max_seconds = max_seconds
        # The seconds within which 99 of 100 tasks should be done, if the user has said so.
        self._target = target
        self.costs = CostModel()
        # The most that may be tried, in items and in padded cost units.
        self._items = self._padded = 0.0

    def __repr__(self) -> str:
        return f"<Sizing: at most {self._items:.0f} items or {self._padded:.0f} units, {self.costs!r}>"

    def observe(self, count: float, longest: float, seconds: float) -> None:
        """Learn from a batch that ran."""
        self.costs.observe(count, longest, seconds)
        if seconds <= SLACK * max(self._max_seconds, LAUNCHES * self.costs.launch_seconds):
            self._items = max(self._items, GROWTH * count)
            self._padded = max(self._padded, GROWTH * count * longest)
        elif count > 1:  # a single item that takes too long says nothing about batches of shorter ones
            self._items = min(self._items, SHRINK * count)
            self._padded = min(self._padded, SHRINK * count * longest)

    def items(self, longest: int, light_cost: int = 0, round_seconds: float = 0.0, streams: int = 1) -> int:
        """The most items, padded to `longest`, that the next batch may have; at least 1.

        `light_cost` is what an app that sends little adds to a batch; 0 if there is none. `round_seconds` is how long
        one item of each call that waits would take. `streams`: how many batches share the device.
        """
        if not self.costs.is_known:
            return FIRST_BATCH
        grown = int(min(self._items, self._padded // longest))
        seconds = self._batch_seconds(round_seconds, streams)
        if light_cost:
            shared = max(SHARED_SECONDS, SHARED * self.costs.predict(1, light_cost))
            return max(1, min(grown, self.costs.largest(longest, min(seconds, shared))))
        return max(1, min(grown, self.costs.largest(longest, seconds)), self.costs.worth_a_try(longest, seconds))

    def _batch_seconds(self, round_seconds: float, streams: int) -> float:
        """How long a batch should be: its launch matters little, and the user's bound is kept.

        So is the target, unless more calls wait than can have an item each within it. Then only large batches make the
        queue shorter.
        """
        launch = self.costs.launch_seconds
        seconds = min(self._max_seconds, max(SHORT, launch / LAUNCH_SHARE))
        if self._target is not None and round_seconds <= self._target:
            seconds = min(seconds, TARGET_SHARE * self._target)
        return max(seconds / streams, LAUNCHES * launch)

    def surplus_seconds(self, cost: float, longest: int) -> float:
        """Seconds of device time for this much cost of items this long, in full batches, less the next batch.

        Counted with caution. A model that never ran counts as if its first batch took the user's bound.
        """
        items = self.items(longest)
        batch = self.costs.at_most(items, longest) if self.costs.is_known else self._max_seconds
        return batch * max(0.0, cost / (items * longest) - 1)
