"""Batches on their way through the device.

In: batches, each with the queue that it is from. Out: the same queues are told how each batch ended.

Torch has computed a batch on a CPU by the time it was handed over. A GPU, OpenVINO or a stream is still at it: the
batch is then in flight, the main thread goes on with other tasks, and `collect` takes what is done.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from time import monotonic, sleep
from typing import Any

from legit_worker.batching.fairness import Item
from legit_worker.batching.twins import distinct
from legit_worker.device.devices import Launch
from legit_worker.device.streams import StreamLaunch, Streams
from legit_worker.errors import DeviceLostError, said
from legit_worker.pool.calls import ENDS
from legit_worker.pool.clock import Work
from legit_worker.pool.queue import ModelQueue, calls_of
from legit_worker.tracing import BatchSpan, batch_span

#: A `forward` behind another batch that keeps this thread for more than this part of its own time waits for the device.
BLOCKING = 0.5

#: Seconds between two looks whether a batch is done that nobody waits for any more.
FLIGHT_LOOK = 0.01


@dataclass(frozen=True, kw_only=True)
class Flight:
    """A batch that a device is at."""

    queue: ModelQueue
    batch: list[Item]
    launch: Launch
    #: What the tasks' clocks count of it.
    work: Work
    #: In traces; None if no task of it is traced.
    span: BatchSpan | None
    #: Whether another batch was in flight when it was handed over.
    is_behind: bool

    @property
    def is_beside(self) -> bool:
        """Whether a stream computes it."""
        return isinstance(self.launch, StreamLaunch)


class Flights:
    """The batches in flight, in the order of their launches. Lives on the main thread, inside the engine."""

    def __init__(self, watch: Callable[[Launch, Callable[[], None]], None], streams: Streams) -> None:
        """`watch` is told of each launch that is not done at once, and that no stream computes.

        When it is done, `watch` calls the function that it was given, on any thread, and wakes the loop.
        """
        self._watch, self._streams = watch, streams
        self._flights: deque[Flight] = deque()

    def __repr__(self) -> str:
        return f"<Flights: {len(self)}>"

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def are_beside(self) -> bool:
        """Whether streams compute them all."""
        return bool(self._flights) and all(flight.is_beside for flight in self._flights)

    @property
    def are_under_way(self) -> bool:
        """Whether one of them is not done."""
        return any(not flight.launch.is_done for flight in self._flights)

    @property
    def has_landed(self) -> bool:
        """Whether a stream is done with one of them."""
        return any(flight.is_beside and flight.launch.is_done for flight in self._flights)

    def launch(self, queue: ModelQueue, batch: list[Item], *, beside: bool = False) -> None:
        """Hand a batch to the device, or to a stream. Raises `DeviceLostError`, and what ends the worker."""
        start = monotonic()
        work = self._follow(batch, beside=beside)
        span = batch_span(queue.model.alias, len(batch), (call.asker for call in calls_of(batch)))
        try:
            launch = queue.launch(batch, partial(self._hand_over, work) if beside else None)
        except ENDS as error:  # whoever drains the worker finds the batch where it was
            _over(batch, work, span, error=error)
            queue.put_back(batch)
            raise
        except BaseException as error:
            _over(batch, work, span, error=error)
            queue.seconds += monotonic() - start
            self._failed(queue, batch, error)
            return
        is_behind = bool(self._flights)
        flight = Flight(queue=queue, batch=batch, launch=launch, work=work, span=span, is_behind=is_behind)
        if beside and not flight.is_beside and not is_behind:  # the model has none for this batch
            work.begin()
        if flight.is_beside:
            self._flights.append(flight)
        elif launch.is_done:
            self._land(flight)
        else:
            self._flights.append(flight)
            self._watch(launch, work.end)

    def _hand_over(self, work: Work, compute: Callable[[], Any]) -> Launch:
        return self._streams.launch(compute, on_begin=work.begin, on_done=work.end)

    def collect(self) -> bool:
        """Take the outputs of the batches that are done. Whether there were any. Raises `DeviceLostError`."""
        landed = [flight for flight in self._flights if flight.is_beside and flight.launch.is_done]
        for flight in landed:
            self._flights.remove(flight)
            self._land(flight)
        found = bool(landed)
        while self._flights and self._flights[0].launch.is_done and not self._flights[0].is_beside:
            flight, found = self._flights.popleft(), True
            if self._flights and not self._flights[0].is_beside:  # the device got to it when it was done with this one
                self._flights[0].work.begin()
            self._land(flight)
        return found

    def collect_all(self) -> None:
        """Wait for all that is in flight, and take the outputs. Raises `DeviceLostError`."""
        while self._flights:
            self._flights[0].launch.wait()
            self.collect()

    def forget(self, seconds: float) -> None:
        """Wait until nothing is in flight, at most for this many seconds: the tasks that it was for are gone."""
        until = monotonic() + seconds
        while self._flights and monotonic() < until:
            if self._flights[0].launch.is_done:
                self._flights.popleft()
            else:
                sleep(FLIGHT_LOOK)

    def _follow(self, batch: list[Item], *, beside: bool) -> Work:
        """The clocks of its tasks count this batch, from when the device is free for it. A stream begins by itself."""
        work = Work(is_batch=True)
        if not self._flights and not beside:
            work.begin()
        for call in calls_of(batch):
            call.clock.follow(work)
        return work

    def _land(self, flight: Flight) -> None:
        """A batch is over."""
        queue, batch, launch = flight.queue, flight.batch, flight.launch
        if not flight.is_beside:
            flight.work.end(launch.seconds if launch.error is None else None)
        _over(batch, flight.work, flight.span, launch.seconds, launch.error)
        queue.seconds += launch.seconds
        queue.waits = queue.waits or (flight.is_behind and launch.host_seconds > launch.seconds * BLOCKING)
        if launch.error is None:
            queue.counters.beside += flight.is_beside
            queue.succeeded(batch, launch)
        else:
            self._failed(queue, batch, launch.error)

    def _failed(self, queue: ModelQueue, batch: list[Item], error: BaseException) -> None:
        if not queue.model.is_lost(error):  # which can look as if memory were short
            queue.failed(batch, error)
            return
        # Nothing can be computed any more. An item that was alone is to blame; of several, nobody knows which.
        if len(distinct(batch)) == 1 and not self._flights:
            for item in batch:
                item.chunk.fail(error)
        else:
            queue.put_back(batch)
        raise DeviceLostError(
            f"a batch of {len(batch)} broke model {queue.model.alias!r}'s device for this process: {said(error)}"
        ) from error


class Waiter:
    """Waits for a GPU or OpenVINO on a thread, so that the main thread need not. Owns the thread, which runs no task.

    It starts with the first launch that is not done, so with torch on a CPU there is none. It touches no tensor.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._launches: SimpleQueue[tuple[Launch, Callable[[], None]]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def watch(self, launch: Launch, on_done: Callable[[], None]) -> None:
        """Call `on_done` and wake the loop when this launch is done. A device's launches are done in their order."""
        self._launches.put((launch, on_done))
        if self._thread is None:
            # A daemon: when the worker has ended, nobody needs the launch.
            self._thread = threading.Thread(target=self._run, name="legit-waiter", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            launch, on_done = self._launches.get()
            launch.wait()
            on_done()
            self._wake()


def _over(
    batch: list[Item],
    work: Work,
    span: BatchSpan | None,
    seconds: float | None = None,
    error: BaseException | None = None,
) -> None:
    """End what followed a batch: its tasks' clocks, and its span."""
    for call in calls_of(batch):
        call.clock.settle(work)
    if span is not None:
        span.end(seconds, error)
