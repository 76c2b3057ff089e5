"""Who is next. Pure: items go in with the call and the app they belong to, and come out in a fair order.

In: items as tasks park. Out: the first N of them in fair order; the engine packs a batch from these.

Between apps, and within an app between calls: weighted fair queueing (Demers, Keshav and Shenker, 1989), counted in
cost. A call of 10,000 items so takes turns with the calls of one item that arrive after it, neither starving the
other, and calls of one item among themselves go oldest first.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count, islice
from math import inf
from typing import Any, Protocol

from legit_worker.batching.twins import Group, Twins, distinct

#: Items per app that are kept sorted; those behind them are in a heap. No batch is picked from more. Texts of mixed
#: lengths so have 1 % of padding; with 512 it would be 2 %, with 256 3 %. To pick a batch from all takes 0.2 ms.
FRONT = 1024

#: A batch is picked from the first of several apps' items. To put them in order takes three times as long for each.
INTERLEAVED = 256

#: For this many batches an app counts as light, after one that left nothing of it behind although others had to wait
#: and it had had no more than they, or had at least twice as much of it. It takes less than its part, so it goes first,
#: and batches beside it are short.
LIGHT_BATCHES = 100


class Flow(Protocol):
    """A call, as fairness sees it."""

    app: str
    #: How far its items reach in its app's virtual time.
    finish_tag: float
    #: Its items that wait.
    waiting: int


@dataclass(eq=False, slots=True)
class Item:
    """One text, pair or image that waits for its batch."""

    #: A `Flow`.
    call: Any
    #: Who waits for its output.
    chunk: Any
    prepared: Any
    #: Size in the model's unit, at least 1.
    cost: int
    #: Only items with equal keys share a batch.
    key: Hashable
    #: Items of equal keys and identities have the same output; None if nobody knows. `Twins` turns it into a group.
    identity: Hashable = None
    group: Group | None = None
    #: Position in its app's virtual time, and among the items at that position; set by `FairQueue.add`.
    tag: float = 0.0
    number: int = 0
    #: Where it waits; None if it does not.
    place: Any = None
    #: How often it ran out of memory, alone in its batch.
    tries: int = 0
    output: Any = None


@dataclass(eq=False)
class _Lane:
    """The items of one app, in fair order, and how much of the device the app has had.

    An item that leaves is only marked. It is taken out of the list when that is read, and out of the heap when it is
    the first there, or when more have left than wait.
    """

    weight: float
    #: The first ones, sorted; none of those in the heap is before any of them.
    front: list[Item] = field(default_factory=list)
    #: A heap of (tag, number, item).
    rest: list[tuple[float, int, Item]] = field(default_factory=list)
    #: Items that wait, and those that left and are still in `front` or `rest`.
    waiting: int = 0
    gone: int = 0
    #: Calls with items that wait.
    calls: int = 0
    #: The app's virtual time: the cost that each of its waiting calls has had, were they served in equal parts.
    now: float = 0.0
    #: Cost served so far, divided by weight: the app with the least goes first.
    served: float = 0.0
    #: Batches for which it still counts as light, and what its items in the last batch cost.
    light: int = 0
    last_cost: int = 0

    def __iter__(self) -> Iterator[Item]:
        """In fair order."""
        self.tidy()
        for at in count():
            if not self._fill(at + 1):
                return
            yield self.front[at]

    def first(self, count: int) -> list[Item]:
        """The first `count` items."""
        self.tidy()
        self._fill(count)
        return self.front[:count]

    def add(self, item: Item) -> None:
        """Put an item in its place, behind others with its tag."""
        item.place = self
        self.waiting += 1
        self.calls += not item.call.waiting
        item.call.waiting += 1
        if self.front and item.tag < self.front[-1].tag:
            insort(self.front, item, key=_tag)
            if len(self.front) <= FRONT:
                return
            item = self.front.pop()
        heapq.heappush(self.rest, (item.tag, item.number, item))

    def remove(self, item: Item) -> None:
        """This item waits no more."""
        item.place = None
        self.waiting -= 1
        self.gone += 1
        item.call.waiting -= 1
        self.calls -= not item.call.waiting
        if self.gone > self.waiting:
            self.tidy()
            self.rest = [entry for entry in self.rest if entry[2].place is self]
            heapq.heapify(self.rest)
            self.gone = 0

    def tidy(self) -> None:
        """Leave in front what waits."""
        if self.gone:
            before = len(self.front)
            self.front = [item for item in self.front if item.place is self]
            self.gone -= before - len(self.front)

    def _fill(self, count: int) -> bool:
        """Have `count` items in front. Whether there are as many."""
        while len(self.front) < count and self.rest:
            item = heapq.heappop(self.rest)[2]
            if item.place is self:
                self.front.append(item)
            else:
                self.gone -= 1
        return len(self.front) >= count


class FairQueue:
    """The items that wait for one model. Lives on the main thread, inside the engine.

    Adding or removing an item costs about as much with a million items as with one.
    """

    def __init__(self, weight_of: Callable[[str], float]) -> None:
        self._weight_of = weight_of
        self._lanes: dict[str, _Lane] = {}
        self._numbers = count()
        self._size = 0
        self._twins = Twins()
        #: The cost of all items that wait.
        self.cost = 0

    def __len__(self) -> int:
        return self._size

    def __repr__(self) -> str:
        return f"<FairQueue { ({app: lane.waiting for app, lane in self._lanes.items()}) }>"

    def add(self, item: Item) -> None:
        """Put an item in its place: behind what its call already queued, level with others that arrive now."""
        lane, call = self._lane(item.call.app), item.call
        item.tag, item.number = max(lane.now, call.finish_tag), next(self._numbers)
        call.finish_tag = item.tag + item.cost
        lane.add(item)
        self._twins.add(item)
        self._size += 1
        self.cost += item.cost

    def first(self, count: int) -> list[Item]:
        """The first `count` items in fair order; they stay queued."""
        return list(self._first(count, count))

    def front(self) -> Iterator[Item]:
        """The items that a batch may be picked from, in fair order; they stay queued."""
        return self._first(FRONT, INTERLEAVED)

    @property
    def calls(self) -> int:
        """The calls that have items here."""
        return sum(lane.calls for lane in self._lanes.values())

    @property
    def has_twins(self) -> bool:
        """Whether equal items wait."""
        return self._twins.more > 0

    def _first(self, of_one: int, of_several: int) -> Iterator[Item]:
        """As many items of one app if no other waits, else as many of all."""
        busy = [(not lane.light, lane.served, app, lane) for app, lane in self._lanes.items() if lane.waiting]
        if len(busy) == 1:
            return iter(busy[0][3].first(of_one))
        return islice(_interleave(busy), of_several)

    def due(self, budget: int) -> list[Item]:
        """The items of a fair batch of this cost whose apps have no more than a batch waiting, if another has more.

        A batch is picked by length from many more items. An app that sends little would wait for its items' turn.
        """
        if sum(lane.waiting > 0 for lane in self._lanes.values()) < 2:
            return []
        fair: list[Item] = []
        for item in self.front():
            budget -= item.cost
            if fair and budget < 0:
                break
            fair.append(item)
        if all(lane.waiting <= len(fair) for lane in self._lanes.values()):
            return []
        return [item for item in fair if item.place.waiting <= len(fair)]

    @property
    def has_light(self) -> bool:
        """Whether items of a light app wait."""
        return any(lane.light and lane.waiting for lane in self._lanes.values())

    @property
    def light_cost(self) -> int:
        """What a light app's items in its last batch cost, the most of all light apps; 0 if no app is light."""
        return max((lane.last_cost for lane in self._lanes.values() if lane.light), default=0)

    def take(self, batch: Collection[Item]) -> None:
        """Remove a batch that is about to run and charge its apps for it. Of equal items, the first one's app pays."""
        costs: Counter[_Lane] = Counter({item.place: 0 for item in batch})
        for item in distinct(batch):
            costs[item.place] += item.cost
        for lane, cost in costs.items():
            lane.now += cost / lane.calls
            lane.served += cost / lane.weight
        self.remove(batch)
        for lane in costs:
            lane.tidy()  # who waits behind the batch would keep its items
        self._note_light(costs)

    def _note_light(self, costs: Mapping[_Lane, int]) -> None:
        """A batch with these costs was taken: is anybody light beside those who wait?"""
        small = sum(costs.values()) / (2 * len(costs)) if costs else 0
        least = min((lane.served for lane in self._lanes.values() if lane.waiting), default=inf)
        for lane in self._lanes.values():
            if lane in costs and (lane.waiting or lane.served - costs[lane] / lane.weight > least):
                lane.light = 0
            elif lane in costs and (self._size or costs[lane] <= small):
                lane.light, lane.last_cost = LIGHT_BATCHES, costs[lane]
            elif lane.light:
                lane.light -= 1

    def remove(self, items: Collection[Item]) -> None:
        """Forget items that wait here."""
        for item in items:
            item.place.remove(item)
            self._twins.remove(item)
            self.cost -= item.cost
        self._size -= len(items)

    def _lane(self, app: str) -> _Lane:
        """The app's lane. One that was idle starts level with the least served of those who wait.

        If nobody waits, each app has had all that it wanted, so all are level. Otherwise an app of long standing would
        wait until a new one has had as much as itself.
        """
        lane = self._lanes.get(app)
        if lane is None:
            lane = self._lanes[app] = _Lane(self._weight_of(app))
        if not lane.waiting:
            lanes = self._lanes.values()
            least = min((other.served for other in lanes if other.waiting), default=None)
            level = max(other.served for other in lanes) if least is None else least
            lane.served = max(lane.served, level)
        return lane


def _tag(item: Item) -> float:
    return item.tag


def _interleave(busy: list[tuple[bool, float, str, _Lane]]) -> Iterator[Item]:
    """Items as the apps would be served one at a time, the least served app first, and light apps before all others."""
    heap = [(is_heavy, served, app, lane, iter(lane)) for is_heavy, served, app, lane in busy]
    heapq.heapify(heap)
    while heap:
        is_heavy, served, app, lane, items = heap[0]
        item = next(items, None)
        if item is None:
            heapq.heappop(heap)
            continue
        heapq.heapreplace(heap, (is_heavy, served + item.cost / lane.weight, app, lane, items))
        yield item
