"""Turns parked calls into batches and hands them to the device.

In: calls and their items, from the fibers. Out: outputs in the calls, and a word to each call that got some.

A CPU has computed a batch by the time it was handed over. A GPU is still at it: the batch is then in flight, the main
thread goes on with other tasks, and `collect` takes what is done.

Which model is next: the one that had least of the device, in seconds. Which items: the queue's first in fair order
(`fairness`), and with that one its neighbours in length (`packer`), so the fairest item is in every batch.
"""

from __future__ import annotations

import gc
import logging
import traceback
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from time import monotonic, sleep
from typing import Any

from legit_worker.batching.demand import Demand
from legit_worker.batching.fairness import FairQueue, Item
from legit_worker.batching.packer import pack, padded
from legit_worker.batching.sizing import Sizing
from legit_worker.device.devices import Launch
from legit_worker.device.memory import is_out_of_memory
from legit_worker.errors import DeviceLostError, DeviceOutOfMemoryError
from legit_worker.models.entry import Entry
from legit_worker.pool.calls import Call
from legit_worker.pool.clock import Work

logger = logging.getLogger(__name__)

#: How many of the fairest items a batch is picked from. More gives batches of more even length; packing them takes
#: about a millisecond per 256.
HORIZON = 256

#: Seconds that a task counts for while its model has computed nothing: twice those of an item in a first batch that
#: takes as long as it may by default, 0.5 s for 8 items.
UNKNOWN_SECONDS = 0.125

#: Batches in flight: one that the device computes, and one behind it, so that it never waits for this thread.
DEPTH = 2

#: A `forward` behind another batch that keeps this thread for more than this part of its own time waits for the device.
BLOCKING = 0.5

#: Seconds between two looks whether a batch is done that nobody waits for any more.
FLIGHT_LOOK = 0.01

#: A batch of this part of the limit shows that the limit holds, and raises it by so much: it has doubled after 36.
NEAR, RAISE = 0.8, 1.02

#: How often an item that runs out of memory, alone in its batch, is tried before it fails. Others come and go on a
#: device; an item that never fits costs so many failures, which are quick.
TRIES_ALONE = 8


@dataclass
class Counters:
    """What the engine did so far; `inspect stats` shows it."""

    batches: int = 0
    items: int = 0
    #: Cost units computed, without and with padding.
    cost: int = 0
    padded_cost: int = 0
    #: Seconds inside `forward`.
    forward_seconds: float = 0.0
    #: Batches that ran out of memory.
    out_of_memory: int = 0

    def __add__(self, other: Counters) -> Counters:
        mine, others = vars(self), vars(other)
        return Counters(**{name: mine[name] + others[name] for name in mine})

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
            **({"out_of_memory": self.out_of_memory} if self.out_of_memory else {}),
        }


@dataclass
class Room:
    """The padded cost of the batches that fit into memory, learned from those that did not. At first, any does."""

    most: float = inf

    def did_not_fit(self, cost: int) -> None:
        """A batch of this padded cost ran out of memory: half of it may fit."""
        self.most = max(1.0, min(self.most, cost / 2))

    def did_fit(self, cost: int) -> None:
        """A batch that came near the limit went well: perhaps the memory that was short is free again."""
        if cost > self.most * NEAR:
            self.most *= RAISE


@dataclass(eq=False)
class Queue:
    """What waits for one model."""

    entry: Entry
    fair: FairQueue
    sizing: Sizing
    #: Halves of a batch that failed, to be tried again on their own before anything new.
    halves: deque[list[Item]] = field(default_factory=deque)
    #: Device seconds this model had: the least goes first.
    seconds: float = 0.0
    #: What memory was seen to hold.
    room: Room = field(default_factory=Room)
    #: Its `forward` waits for the device: behind a batch in flight, it would keep this thread until that is done.
    waits: bool = False

    def __len__(self) -> int:
        return len(self.fair) + sum(map(len, self.halves))

    @property
    def cost(self) -> int:
        """Of all that waits."""
        return self.fair.cost + sum(item.cost for half in self.halves for item in half)


@dataclass(frozen=True, kw_only=True)
class Flight:
    """A batch that a device is at."""

    queue: Queue
    batch: list[Item]
    launch: Launch
    #: What the tasks' clocks count of it.
    work: Work
    #: Whether another batch was in flight when it was handed over.
    is_behind: bool


class Engine:
    """The batches' side of the pool. Lives on the main thread; owns the queues; never runs task code."""

    def __init__(
        self,
        *,
        max_batch_seconds: float,
        weight_of: Callable[[str], float],
        free_memory: Callable[[], None] = lambda: None,
        watch: Callable[[Launch, Callable[[], None]], None] = lambda launch, on_done: None,
    ) -> None:
        # Called after a batch ran out of memory, before the next one.
        self._free_memory = free_memory
        # Told of each launch that is not done at once; once it is, whoever it is calls the function and wakes the loop.
        self._watch = watch
        self._flights: deque[Flight] = deque()
        self._max_batch_seconds = max_batch_seconds
        self._weight_of = weight_of
        self._queues: dict[str, Queue] = {}
        self._demand = Demand()
        # Tasks that wait for a model's load, by its alias.
        self._loading: Counter[str] = Counter()
        self.counters: dict[str, Counters] = {}
        #: Model calls so far.
        self.calls = 0

    def __repr__(self) -> str:
        waiting = {alias: len(queue) for alias, queue in self._queues.items()}
        return f"<Engine: {waiting} waiting, {len(self._flights)} batches in flight>"

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def add(self, entry: Entry, call: Call, start: int, prepared: Sequence[Any]) -> None:
        """Queue items of a call; the first one's output goes to `call.outputs[start]`."""
        queue = self._queue(entry)
        # All of them first: what a user's model raises here is the task's error, and leaves nothing queued.
        items = [
            Item(call, index, item, entry.cost(item), entry.batch_key(item))
            for index, item in enumerate(prepared, start)
        ]
        for item in items:
            queue.fair.add(item)
        self._demand.arrived(entry.alias, [item.cost for item in items], is_new=start == 0)
        self.calls += start == 0
        call.queued += len(items)

    @contextmanager
    def expecting(self, entry: Entry) -> Iterator[None]:
        """While a task waits for its model to load. Its item is not here yet, and will be."""
        self._loading[entry.alias] += 1
        try:
            yield
        finally:
            self._loading[entry.alias] -= 1
            self._loading += Counter()  # without those that nobody waits for

    def drop(self, entry: Entry, call: Call) -> None:
        """Forget what is left of a call whose task is gone."""
        queue = self._queues.get(entry.alias)
        if queue is None:
            return
        queue.fair.drop(call)
        halves = ([item for item in half if item.call is not call] for half in queue.halves)
        queue.halves = deque(half for half in halves if half)

    def forget(self) -> None:
        """Nothing that waits will be computed any more."""
        self._queues.clear()

    def waiting_seconds(self) -> float:
        """How long all that waits would take, as predicted, were the items of each model of one length."""
        return sum(
            queue.sizing.costs.predict(count, round(queue.fair.cost / count))
            for queue in self._queues.values()
            if (count := len(queue.fair))
        )

    def held_seconds(self, more: float = 0) -> float | None:
        """Seconds of device time that it takes to compute all that waits and `more` further calls like the last ones.

        For deciding how many tasks to hold, so it is counted with caution: until a model's batches have shown what its
        launch takes, all of their time is the items'. Each model's next batch counts nothing: it is always worth
        holding. Calls of tasks that have not begun belong to `more`. None if no batch ever ran and
        nothing waits.
        """
        loading = sum(count for alias, count in self._loading.items() if alias not in self._queues)
        if any(queue.sizing.costs.is_known for queue in self._queues.values()):
            return sum(self._held_seconds(queue, more) for queue in self._queues.values()) + loading * UNKNOWN_SECONDS
        waiting = loading + len(self)
        return (waiting + more) * UNKNOWN_SECONDS if waiting else None

    def _held_seconds(self, queue: Queue, more: float) -> float:
        alias = queue.entry.alias
        longest = self._demand.cost_per_item(alias)
        cost = queue.cost + self._loading[alias] * longest + more * self._demand.cost_per_call(alias)
        return queue.sizing.surplus_seconds(cost, longest)

    def surplus_seconds(self) -> float:
        """Seconds of device time for all that waits here beside each model's next batch, counted with caution."""
        return sum(
            queue.sizing.surplus_seconds(queue.cost, self._demand.cost_per_item(queue.entry.alias))
            for queue in self._queues.values()
        )

    def launch_seconds(self) -> float:
        """What the next batch takes at least, however small; 0 while that is not known."""
        queue = self._next_queue()
        return queue.sizing.costs.launch_seconds if queue else 0.0

    def has_full_batch(self) -> bool:
        """Whether waiting longer would not make the next batch larger."""
        return any(self._is_full(queue) for queue in self._queues.values() if len(queue))

    def _is_full(self, queue: Queue) -> bool:
        return bool(queue.halves) or sum(item.cost for item in queue.fair.first(HORIZON)) >= self._budget(queue)

    @property
    def is_busy(self) -> bool:
        """Whether a batch is in flight."""
        return bool(self._flights)

    @property
    def can_step(self) -> bool:
        """Whether a batch is worth handing over now. Behind one in flight, only one that can't get any larger."""
        queue = self._next_queue()
        if queue is None or len(self._flights) >= DEPTH:
            return False
        return not self._flights or (not queue.waits and self._is_full(queue))

    def step(self) -> bool:
        """Hand over one batch. False when nothing waits. Raises `DeviceLostError`."""
        queue = self._next_queue()
        if queue is None:
            return False
        self._run(queue, queue.halves.popleft() if queue.halves else self._pick(queue, queue.fair.first(HORIZON)))
        return True

    def collect(self) -> bool:
        """Take the outputs of the batches that are done. Whether there were any. Raises `DeviceLostError`."""
        found = False
        while self._flights and self._flights[0].launch.is_done:
            flight, found = self._flights.popleft(), True
            if self._flights:  # the device got to it when it was done with this one
                self._flights[0].work.begin()
            self._land(flight)
        return found

    def wait(self, seconds: float) -> None:
        """Until nothing is in flight, at most so long; whoever it was for is gone."""
        until = monotonic() + seconds
        while self._flights and monotonic() < until:
            if self._flights[0].launch.is_done:
                self._flights.popleft()
            else:
                sleep(FLIGHT_LOOK)

    def step_for(self, entry: Entry, call: Call) -> None:
        """Run one batch with items of this call, whoever's turn it is, and wait for all that is in flight.

        Raises `DeviceLostError`.
        """
        queue = self._queue(entry)
        halves = next((half for half in queue.halves if any(item.call is call for item in half)), None)
        if halves is not None:
            queue.halves.remove(halves)
            self._run(queue, halves)
        elif mine := queue.fair.of(call):
            others = [item for item in queue.fair.first(HORIZON) if item.call is not call]
            self._run(queue, self._pick(queue, (mine + others)[:HORIZON]))
        while self._flights:
            self._flights[0].launch.wait()
            self.collect()

    def _queue(self, entry: Entry) -> Queue:
        queue = self._queues.get(entry.alias)
        if queue is None:
            queue = self._queues[entry.alias] = Queue(
                entry, FairQueue(self._weight_of), Sizing(self._max_batch_seconds)
            )
            self.counters[entry.alias] = Counters()
        return queue

    def _next_queue(self) -> Queue | None:
        waiting = [queue for queue in self._queues.values() if len(queue)]
        if not waiting:
            return None
        chosen = min(waiting, key=lambda queue: queue.seconds)
        for idle in self._queues.values():
            if not len(idle):  # time away earns no credit
                idle.seconds = max(idle.seconds, chosen.seconds)
        return chosen

    def _budget(self, queue: Queue) -> int:
        """The largest padded cost of a batch of items as long as the next one."""
        longest = queue.fair.first(1)[0].cost if len(queue.fair) else 1
        by_memory = min(queue.room.most, queue.entry.largest_cost(longest))
        return int(min(by_memory, longest * queue.sizing.items(longest)))

    def _pick(self, queue: Queue, candidates: list[Item]) -> list[Item]:
        """The batch that holds the first candidate, taken out of the queue."""
        first = candidates[0]
        batch = self._cut(queue, _same_key(candidates), self._budget(queue))
        by_memory = queue.entry.largest_cost(max(item.cost for item in batch))
        if padded([item.cost for item in batch]) > by_memory:  # longer ones take more for each unit
            batch = self._cut(queue, [first, *(item for item in batch if item is not first)], by_memory)
        queue.fair.take(batch)
        return batch

    @staticmethod
    def _cut(queue: Queue, candidates: list[Item], budget: int) -> list[Item]:
        cuts = pack([item.cost for item in candidates], budget, queue.sizing.costs)
        return [candidates[index] for index in next(cut for cut in cuts if 0 in cut)]

    def _run(self, queue: Queue, batch: list[Item]) -> None:
        start = monotonic()
        work = self._follow(batch)
        try:
            launch = queue.entry.launch([item.prepared for item in batch])
        except Exception as error:
            _settle(batch, work)
            queue.seconds += monotonic() - start
            self._failed(queue, batch, error)
            return
        except BaseException:  # the worker is going down: whoever drains it finds the batch where it was
            _settle(batch, work)
            queue.halves.appendleft(batch)
            raise
        flight = Flight(queue=queue, batch=batch, launch=launch, work=work, is_behind=bool(self._flights))
        if launch.is_done:
            self._land(flight)
        else:
            self._flights.append(flight)
            self._watch(launch, work.end)

    def _follow(self, batch: list[Item]) -> Work:
        """The clocks of its tasks count this batch, from when the device is free for it."""
        work = Work(is_batch=True)
        if not self._flights:
            work.begin()
        for call in _calls(batch):
            call.clock.follow(work)
        return work

    def _land(self, flight: Flight) -> None:
        """A batch is over."""
        queue, batch, launch = flight.queue, flight.batch, flight.launch
        flight.work.end(launch.seconds if launch.error is None else None)
        _settle(batch, flight.work)
        queue.seconds += launch.seconds
        queue.waits = queue.waits or (flight.is_behind and launch.host_seconds > launch.seconds * BLOCKING)
        if launch.error is not None:
            self._failed(queue, batch, launch.error)
            return
        self._count(queue, batch, launch)
        for item, output in zip(batch, launch.outputs, strict=True):
            item.call.deliver(item.index, output)
        _tell(batch)

    def _count(self, queue: Queue, batch: list[Item], launch: Launch) -> None:
        costs = [item.cost for item in batch]
        queue.sizing.observe(len(batch), max(costs), launch.seconds)
        queue.entry.observe(len(batch), max(costs), launch)
        queue.room.did_fit(padded(costs))
        counters = self.counters[queue.entry.alias]
        counters.batches += 1
        counters.items += len(batch)
        counters.cost += sum(costs)
        counters.padded_cost += padded(costs)
        counters.forward_seconds += launch.seconds

    def _failed(self, queue: Queue, batch: list[Item], error: Exception) -> None:
        if queue.entry.is_lost(error):  # which can look as if memory were short
            self._lose(queue, batch, error)
        elif is_out_of_memory(error):
            self._split_and_free(queue, batch, error)
        else:
            self._split(queue, batch, error)

    def _lose(self, queue: Queue, batch: list[Item], error: Exception) -> None:
        """Nothing can be computed any more. Where one item alone did it, its task is told; of several, nobody knows."""
        if len(batch) == 1 and not self._flights:
            batch[0].call.fail(error)
            _tell(batch)
        else:
            queue.halves.appendleft(batch)
        raise DeviceLostError(
            f"a batch of {len(batch)} broke model {queue.entry.alias!r}'s device for this process: {error}"
        ) from error

    def _split_and_free(self, queue: Queue, batch: list[Item], error: Exception) -> None:
        """Too much at once: halves may fit, and from now on batches are no larger. One item alone is tried again."""
        cost = padded([item.cost for item in batch])
        self.counters[queue.entry.alias].out_of_memory += 1
        traceback.clear_frames(error.__traceback__)  # where `forward` stopped, it still holds what it had
        if len(batch) == 1 and batch[0].tries == TRIES_ALONE - 2:
            # Before the last try, since it takes long: tracebacks of tasks that failed otherwise hold what they had,
            # too, and Celery leaves those to the collector.
            gc.collect()
        try:
            self._free_memory()
        except Exception:
            logger.exception("memory could not be freed after model %r ran out of it", queue.entry.alias)
        if len(batch) > 1:
            queue.room.did_not_fit(cost)
            logger.warning(
                "model %r ran out of memory with %d items, padded cost %d; batches have at most %.0f from now on: %s",
                queue.entry.alias,
                len(batch),
                cost,
                queue.room.most,
                error,
            )
            self._split(queue, batch, error)
            return
        item = batch[0]
        item.tries += 1
        if item.tries < TRIES_ALONE:
            queue.halves.append(batch)  # last, so that what others hold may be given back meanwhile
            return
        refused = DeviceOutOfMemoryError(
            f"an item of cost {cost} does not fit into the device's memory beside model {queue.entry.alias!r}, even "
            f"alone in its batch and after {item.tries} tries: shorten it, or give the model more memory ({error})"
        )
        refused.__cause__ = error
        item.call.fail(refused)
        _tell(batch)

    def _split(self, queue: Queue, batch: list[Item], error: Exception) -> None:
        """One item may have spoilt the batch: try its halves, down to the item, which then fails by itself."""
        if len(batch) == 1:
            batch[0].call.fail(error)
            _tell(batch)
        else:
            middle = len(batch) // 2
            queue.halves.extendleft([batch[middle:], batch[:middle]])


def _same_key(items: list[Item]) -> list[Item]:
    key: Hashable = items[0].key
    return [item for item in items if item.key == key]


def _calls(batch: list[Item]) -> Iterable[Call]:
    return {id(item.call): item.call for item in batch}.values()


def _settle(batch: list[Item], work: Work) -> None:
    for call in _calls(batch):
        call.clock.settle(work)


def _tell(batch: list[Item]) -> None:
    for call in _calls(batch):
        call.on_progress()
