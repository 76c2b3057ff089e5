"""Turns parked calls into batches and hands them to the device.

In: chunks of calls' items, from the fibers. Out: their outputs or errors, in the chunks' futures.

The model that had the fewest seconds of the device has the next batch. `queue` decides what is in it, and `flights`
computes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from legit_worker.batching.demand import Demand
from legit_worker.device.devices import Launch
from legit_worker.device.streams import Streams
from legit_worker.pool.calls import Call, Chunk, trusted
from legit_worker.pool.counters import Counters
from legit_worker.pool.flights import Flights
from legit_worker.pool.queue import BatchModel, ModelQueue

#: Seconds that a task counts for while its model has computed nothing. An item counts half as much in a first batch
#: that takes as long as it may by default, 0.5 s for 8 items.
UNKNOWN_SECONDS = 0.125

#: A call whose items take this many times a task's own code, or longer, gains little by streams: an eighth of its time.
OWN = 8

#: Model calls between two looks whether they fill a stream's batch. A look takes 40 µs.
CALLS = 8

#: Batches in flight: one that the device computes, and one behind it, so that it never waits for this thread.
DEPTH = 2


class Engine:
    """The batches' side of the pool. Lives on the main thread; owns the queues; never runs task code."""

    def __init__(
        self,
        *,
        max_batch_seconds: float,
        target_latency: float | None = None,
        weight_of: Callable[[str], float],
        watch: Callable[[Launch, Callable[[], None]], None] = lambda launch, on_done: None,
        streams: Streams | None = None,
        own_seconds: Callable[[], float] = lambda: 0.0,
        more_there: Callable[[], bool] = lambda: False,
    ) -> None:
        """`watch` is as by `Flights`. `own_seconds`: what a task's own code takes, on average. `more_there`
        tells whether messages are known to wait at the broker."""
        self._new_queue = partial(
            ModelQueue, max_batch_seconds=max_batch_seconds, target_latency=target_latency, weight_of=weight_of
        )
        self._streams = streams or Streams()
        self._own_seconds, self._more_there = own_seconds, more_there
        self._flights = Flights(watch, self._streams)
        self._queues: dict[str, ModelQueue] = {}
        self._demand = Demand()
        # Tasks that wait for a model's load, by its alias.
        self._loading: Counter[str] = Counter()
        #: The same, of all models.
        self.loading = 0
        #: What was computed so far, by the model's alias.
        self.counters: dict[str, Counters] = {}
        #: Model calls so far, and when `refill` last looked.
        self.calls = self._looked = 0

    def __repr__(self) -> str:
        return f"<Engine: {self.waiting()} waiting, {len(self._flights)} batches in flight>"

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def submit(self, model: BatchModel, call: Call, prepared: Sequence[Any]) -> Chunk:
        """Queue more items of a call. Raises what the model raises when it is asked for their costs and keys."""
        queue = self._queue(model)
        queue.model = model  # which may have been loaded anew since the last call
        if not len(queue):
            queue.seconds = max(queue.seconds, _level(self._queues.values()))
        chunk = queue.submit(call, prepared)
        self._demand.arrived(model.alias, [item.cost for item in chunk.items], is_new=not call.chunks)
        self.calls += not call.chunks
        call.chunks += 1
        return chunk

    @property
    def computed(self) -> Counters:
        """What was computed so far, of all models."""
        return sum(self.counters.values(), Counters())

    @contextmanager
    def expecting(self, alias: str) -> Iterator[None]:
        """While a task waits for its model to load. Its item is not here yet, and will be."""
        self._loading[alias] += 1
        self.loading += 1
        try:
            yield
        finally:
            self._loading[alias] -= 1
            self.loading -= 1

    @property
    def set_aside(self) -> int:
        """Tasks that wait for a load while another model has work: they must not keep that model's tasks out."""
        if not self.loading or not any(
            queue.sizing.costs.is_known and not self._loading[alias] for alias, queue in self._queues.items()
        ):
            return 0
        return self.loading

    def drop(self, chunk: Chunk) -> None:
        """Forget what is left of a chunk whose task is gone, or needs it no more."""
        self._queues[chunk.alias].drop(chunk)

    def forget(self) -> None:
        """Nothing that waits will be computed any more."""
        for queue in self._queues.values():
            queue.forget()

    def waiting(self) -> dict[str, int]:
        """How many items wait, by model. Any thread may ask."""
        return {alias: len(queue) for alias, queue in list(self._queues.items())}

    def waiting_seconds(self) -> float:
        """How long all that waits would take, as predicted, if all items of a model had one length."""
        return sum(queue.waiting_seconds() for queue in self._queues.values())

    def held_seconds(self, more: float = 0) -> float | None:
        """Seconds of device time that it takes to compute all that waits and `more` further calls like the last ones.

        For deciding how many tasks to hold, so it is counted with caution: until a model's batches have shown what its
        launch takes, all of their time is the items'. Each model's next batch counts nothing: it is always worth
        holding. Tasks that are `set_aside` count nothing, and calls of tasks that have not begun belong to `more`. None
        if no batch ever ran and nothing waits.
        """
        loading = Counter[str]() if self.set_aside else self._loading
        unknown = sum(count for alias, count in loading.items() if alias not in self._queues)
        if any(queue.sizing.costs.is_known for queue in self._queues.values()):
            known = (
                queue.surplus_seconds(self._demand, loading=loading[alias], calls=more)
                for alias, queue in self._queues.items()
            )
            return sum(known) + unknown * UNKNOWN_SECONDS
        waiting = len(self) + unknown
        return (waiting + more) * UNKNOWN_SECONDS if waiting else None

    def surplus_seconds(self) -> float:
        """Seconds of device time for all that waits here beside each model's next batch, counted with caution."""
        return sum(queue.surplus_seconds(self._demand) for queue in self._queues.values())

    def launch_seconds(self) -> float:
        """What the next batch takes at least, however small; 0 while that is not known."""
        queue = _next(self._queues.values())
        return queue.sizing.costs.launch_seconds if queue else 0.0

    def has_full_batch(self) -> bool:
        """Whether waiting longer would not make the next batch larger."""
        return any(queue.is_full for queue in self._queues.values() if len(queue))

    @property
    def is_urgent(self) -> bool:
        """Whether the next batch should not wait for company."""
        queue = _next(self._queues.values())
        return queue is not None and queue.is_urgent

    @property
    def is_hurried(self) -> bool:
        """Whether such a batch can be handed over now."""
        return self.is_urgent and self.can_step

    @property
    def is_shared(self) -> bool:
        """Whether an app that sends little has sent something of late."""
        return any(queue.is_shared for queue in self._queues.values())

    @property
    def is_ready(self) -> bool:
        """Whether the next batch can't get any larger, and runs beside this thread: to wait for company is no use."""
        queue = self._next()
        if queue is None or (self._flights.are_beside and queue.streams == 1):
            return False
        return queue.is_full if queue.streams > 1 else bool(self._flights)

    @property
    def can_step(self) -> bool:
        """Whether a batch is worth handing over now. Behind one in flight, only one that can't get any larger.

        A stream that has none may have any.
        """
        queue = self._next()
        if queue is None or not self._flights:
            return queue is not None
        if self._flights.are_beside:
            most = queue.streams if queue.streams > 1 else 0
            return len(self._flights) < most or (len(self._flights) == most and queue.is_full)
        # Streams begin when all cores are free for them.
        return len(self._flights) < DEPTH and not queue.waits and queue.streams == 1 and queue.is_full

    def step(self) -> bool:
        """Hand over one batch. False when nothing waits. Raises `DeviceLostError`."""
        queue = self._next()
        if queue is None:
            return False
        beside = self._goes_beside(queue)
        if not beside:  # it has all cores
            queue.streams = 1
        with trusted():
            self._flights.launch(queue, queue.next_batch(), beside=beside)
        return True

    def _goes_beside(self, queue: ModelQueue) -> bool:
        return queue.streams > 1 and (self._flights.are_beside or self._more_there() or queue.is_full)

    def _next(self) -> ModelQueue | None:
        """The queue that has the next batch, and knows how many streams there are for it."""
        queue = _next(self._queues.values())
        if queue is not None:
            queue.streams = self._streams.count if self._gains_by_streams(queue) else 1
        return queue

    def _gains_by_streams(self, queue: ModelQueue) -> bool:
        """Whether much of the time is this thread's work for tasks, which streams let go on beside batches.

        An app that sends little has its batches from all cores: they are quicker.
        """
        return (
            queue.model.computes_beside
            and not queue.is_shared
            and self._streams.are_open()
            and queue.sizing.costs.is_known
            and queue.seconds_of_call(self._demand) <= OWN * self._own_seconds()
        )

    def collect(self) -> bool:
        """Take the outputs of the batches that are done. Whether there were any. Raises `DeviceLostError`."""
        with trusted():
            found = self._flights.collect()
        if found:
            self._looked = self.calls - CALLS
        return found

    def refill(self) -> bool:
        """Between two tasks: take what streams have done, and give them a full batch. Whether any were done.

        Otherwise a stream would wait for the end of this thread's turn. Raises `DeviceLostError`, if this code fails.
        """
        found = self._flights.has_landed and self.collect()
        if len(self._flights) <= self._streams.count and self.calls - self._looked >= CALLS:
            self._looked = self.calls
            queue = self._next()
            if queue is not None and self._goes_beside(queue) and self.can_step:
                is_idle = len(self._flights) < queue.streams
                if queue.is_full or (is_idle and queue.is_enough):
                    self.step()
        return found

    @property
    def is_computing(self) -> bool:
        """Whether a thread computes a batch, or waits for the device that does."""
        return self._flights.are_under_way

    def wait(self, seconds: float) -> None:
        """Until nothing is in flight, at most for this many seconds; the tasks that it was for are gone."""
        self._flights.forget(seconds)

    def drive(self, chunk: Chunk) -> None:
        """Run one batch with items of this chunk, whoever's turn it is, and wait for all that is in flight.

        Raises `DeviceLostError`.
        """
        queue = self._queues[chunk.alias]
        with trusted():
            if batch := queue.batch_of(chunk):
                self._flights.launch(queue, batch)
            self._flights.collect_all()

    def _queue(self, model: BatchModel) -> ModelQueue:
        queue = self._queues.get(model.alias)
        if queue is None:
            queue = self._queues[model.alias] = self._new_queue(model)
            self.counters[model.alias] = queue.counters
        return queue


def _level(queues: Collection[ModelQueue]) -> float:
    """The device seconds that a model begins with after its time away, which earns no credit and costs nothing.

    If no model has items, each has had all that it wanted, so all are level. Batches out of turn count, too.
    """
    least = _next(queues)
    return max(map(_seconds, queues)) if least is None else least.seconds


def _next(queues: Iterable[ModelQueue]) -> ModelQueue | None:
    """Of those that have items, the one whose model had least of the device."""
    return min((queue for queue in queues if len(queue)), key=_seconds, default=None)


def _seconds(queue: ModelQueue) -> float:
    return queue.seconds
