"""Who is next. Pure: items go in with the call and the app they belong to, and come out in a fair order.

In: items as tasks park. Out: the first N of them in fair order; the engine packs a batch from these.

Between apps, and within an app between calls: weighted fair queueing (Demers, Keshav and Shenker, 1989), counted in
cost. A call of 10,000 items so takes turns with the calls of one item that arrive after it, neither starving the
other, and calls of one item among themselves go oldest first.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable, Collection, Hashable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol


class Flow(Protocol):
    """A call, as fairness sees it: which app it is for, and how far its items reach in virtual time."""

    app: str
    finish_tag: float


@dataclass(eq=False, slots=True)
class Item:
    """One text, pair or image that waits for its batch."""

    #: A `Flow`.
    call: Any
    #: Who gets its output, and where among the others it belongs.
    chunk: Any
    index: int
    prepared: Any
    #: Size in the model's unit, at least 1.
    cost: int
    #: Only items with equal keys share a batch.
    key: Hashable
    #: Position in its app's virtual time; set by `FairQueue.add`.
    tag: float = 0.0
    #: How often it ran out of memory, alone in its batch.
    tries: int = 0


@dataclass(eq=False)
class _Lane:
    """The items of one app, in fair order, and how much of the device the app has had."""

    weight: float
    items: list[Item] = field(default_factory=list)
    #: The app's virtual time: the cost that each of its waiting calls has had, were they served in equal parts.
    now: float = 0.0
    #: Cost served so far, divided by weight: the app with the least goes first.
    served: float = 0.0


class FairQueue:
    """The items that wait for one model. Lives on the main thread, inside the engine."""

    def __init__(self, weight_of: Callable[[str], float]) -> None:
        self._weight_of = weight_of
        self._lanes: dict[str, _Lane] = {}
        #: The cost of all items that wait.
        self.cost = 0

    def __len__(self) -> int:
        return sum(len(lane.items) for lane in self._lanes.values())

    def __repr__(self) -> str:
        return f"<FairQueue { ({app: len(lane.items) for app, lane in self._lanes.items()}) }>"

    def add(self, item: Item) -> None:
        """Put an item in its place: behind what its call already queued, level with others that arrive now."""
        lane = self._lane(item.call.app)
        item.tag = max(lane.now, item.call.finish_tag)
        item.call.finish_tag = item.tag + item.cost
        insort(lane.items, item, key=_tag)
        self.cost += item.cost

    def first(self, count: int) -> list[Item]:
        """The first `count` items in fair order; they stay queued."""
        busy = [(lane.served, app, lane) for app, lane in self._lanes.items() if lane.items]
        if len(busy) == 1:
            return busy[0][2].items[:count]
        return list(islice(_interleave(busy), count))

    def of(self, chunk: Any) -> list[Item]:
        """What is queued of one chunk, in order."""
        return [item for item in self._lane(chunk.call.app).items if item.chunk is chunk]

    def take(self, batch: Collection[Item]) -> None:
        """Remove a batch that is about to run and charge its apps for it."""
        taken = {id(item) for item in batch}
        for app in {item.call.app for item in batch}:
            lane = self._lanes[app]
            cost = sum(item.cost for item in batch if item.call.app == app)
            lane.now += cost / len({id(item.call) for item in lane.items})
            lane.served += cost / lane.weight
            lane.items = [item for item in lane.items if id(item) not in taken]
            self.cost -= cost

    def drop(self, chunk: Any) -> None:
        """Remove what is left of a chunk whose task ended early."""
        lane = self._lanes[chunk.call.app]
        self.cost -= sum(item.cost for item in lane.items if item.chunk is chunk)
        lane.items = [item for item in lane.items if item.chunk is not chunk]

    def clear(self) -> None:
        """Forget all that waits."""
        self._lanes.clear()
        self.cost = 0

    def _lane(self, app: str) -> _Lane:
        """The app's lane. One that was idle starts level with the least served, so that time away earns no credit."""
        lane = self._lanes.setdefault(app, _Lane(self._weight_of(app)))
        if not lane.items:
            lane.served = max(
                lane.served, min((other.served for other in self._lanes.values() if other.items), default=0)
            )
        return lane


def _tag(item: Item) -> float:
    return item.tag


def _interleave(busy: list[tuple[float, str, _Lane]]) -> Iterator[Item]:
    """Items as the apps would be served one at a time, the least served app first."""
    heap = [(served, app, lane, iter(lane.items)) for served, app, lane in busy]
    heapq.heapify(heap)
    while heap:
        served, app, lane, items = heap[0]
        item = next(items, None)
        if item is None:
            heapq.heappop(heap)
            continue
        heapq.heapreplace(heap, (served + item.cost / lane.weight, app, lane, items))
        yield item
