"""How many tasks a worker holds, so that other workers get theirs.

In: predicted seconds of the device for the tasks that are held, and the seconds of their own code that tasks took. Out:
the number that the broker may hand over: the prefetch count.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any

from celery.utils.quorum_queues import detect_quorum_queues

from legit_worker.pool.engine import UNKNOWN_SECONDS

#: Predicted seconds of work that one worker holds beside the next batch of each model: 32 tasks while it knows nothing,
#: since each then counts as `UNKNOWN_SECONDS`. Another worker that starts now waits no longer than this for its part,
#: and batches are as even as they get: `scripts/bench` with LEGIT_WORKER_MAX_HELD_SECONDS set measures it again.
MAX_HELD_SECONDS = 4.0

#: The tasks that the mean of their own seconds is about: enough for a mix, few enough to follow one that changes.
MEMORY = 256

#: Seconds between two decisions, which cost up to 0.1 ms each.
DECIDE_SECONDS = 0.02

#: A broker across a network is told only of a prefetch count that is this many times the last one, or a part of it.
WORTH_TELLING = 1.25

#: Seconds between two new consumers, each of which costs two round trips, where a consumer's prefetch count is final.
CONSUMER_SECONDS = 2.0


class Share:
    """Decides how many tasks to hold. Lives on the main thread; asks the engine, and knows no broker."""

    def __init__(
        self,
        device_seconds: Callable[[float], float | None],
        *,
        calls: Callable[[], int],
        max_seconds: float | None = None,
    ) -> None:
        # For all that waits and this many model calls more; None while nothing is known.
        self._device_seconds = device_seconds
        # Model calls so far.
        self._calls_so_far = calls
        self._max_seconds = MAX_HELD_SECONDS if max_seconds is None else max_seconds
        # Of the last tasks: seconds of their own code, their model calls, and how many ended.
        self._own = self._calls = self._ended = 0.0
        self._calls_before = 0

    def __repr__(self) -> str:
        return f"<Share: {self._max_seconds} s, a task's own code takes {self._own_seconds():.2e} s>"

    def ran(self, seconds: float, *, ended: bool) -> None:
        """A task's own code ran for this long, and is over or parked."""
        self._own += seconds
        if not ended:
            return
        calls = self._calls_so_far()
        self._ended += 1
        self._calls, self._calls_before = self._calls + calls - self._calls_before, calls
        if self._ended > MEMORY:
            self._own, self._calls, self._ended = self._own / 2, self._calls / 2, self._ended / 2

    def most(self, held: int, waiting: int, window: int) -> int:
        """How many tasks the worker may hold, from 1 to `window`.

        `held` tasks are there, of which `waiting` have not begun.
        """
        if self._seconds(waiting) > self._max_seconds:
            return max(1, min(held // 2, window))
        low, high = 0, max(0, window - held)
        while low < high:
            more = (low + high + 1) // 2
            if self._seconds(waiting + more) <= self._max_seconds:
                low = more
            else:
                high = more - 1
        return max(1, min(held + low, window))

    def cold(self, window: int) -> int:
        """The same before the first task has come."""
        return max(1, min(window, int(self._max_seconds / UNKNOWN_SECONDS)))

    def _seconds(self, tasks: int) -> float:
        """For the work of all parked tasks, and of this many that have not begun."""
        calls = self._calls / self._ended if self._ended else 1.0
        on_device = self._device_seconds(tasks * calls)
        if on_device is None and not self._ended:
            return tasks * UNKNOWN_SECONDS
        return (on_device or 0.0) + tasks * self._own_seconds()

    def _own_seconds(self) -> float:
        return self._own / self._ended if self._ended else 0.0


class Prefetch:
    """Has the broker hand over as many tasks as the pool wants. Lives on the main thread; one per worker.

    Celery's own part of the prefetch count, one for each task that it holds for later, stays on top.
    """

    def __init__(self, consumer: Any, count: int) -> None:
        self._consumer = consumer
        consumer.prefetch_multiplier = 1
        consumer.initial_prefetch_count = count
        # Celery tells of `pool_grow` by this; the pool's next decision has it in mind.
        consumer._update_prefetch_count = lambda index=0: None
        self._qos: Any = None
        # The pool's part of the count that the broker was told.
        self._told = count
        self._decided_at = self._consumed_at = 0.0
        # Consumers that were replaced, and whose last messages may be on their way.
        self._cancelled: list[str] = []

    def is_due(self) -> bool:
        """Whether it is worth deciding again."""
        return monotonic() - self._decided_at >= DECIDE_SECONDS

    def want(self, count: int) -> None:
        """The broker may hand over this many tasks."""
        self._decided_at = monotonic()
        qos, before = self._consumer.qos, self._consumer.initial_prefetch_count
        self._consumer.initial_prefetch_count = count
        if qos is None:
            return
        if qos is not self._qos:  # a new connection
            self._qos, self._told, self._cancelled = qos, before, []
            # What Celery would do after a lost connection, to raise a count by and by, is done here.
            self._consumer._maximum_prefetch_restored = True
        if self._is_worth_telling(count):
            self._tell(count)
            if self._is_by_consumer:
                self._consume_anew()

    def _tell(self, count: int) -> None:
        """The hub hands it on. `worker_eta_task_limit` bounds the tasks that are held for later, and nothing else."""
        with self._qos._mutex:
            later = max(0, self._qos.value - self._told)
            limit = getattr(self._qos, "max_prefetch", None)  # kombu 5.6
            if limit is not None:
                later = min(later, max(0, limit - count))
            self._told, self._qos.value = count, count + later

    @property
    def _is_by_consumer(self) -> bool:
        """Whether a prefetch count is each consumer's own, and final. RabbitMQ's quorum queues have no other."""
        driver = self._consumer.connection.transport.driver_type
        found, _ = detect_quorum_queues(self._consumer.app, driver)
        return bool(found and self._consumer.app.conf.worker_detect_quorum_queues)

    def _is_worth_telling(self, count: int) -> bool:
        if self._consumer.connection.transport.driver_type != "amqp":
            return count != self._told
        if self._is_by_consumer and self._decided_at - self._consumed_at < CONSUMER_SECONDS:
            return False
        return not self._told / WORTH_TELLING < count < self._told * WORTH_TELLING

    def _consume_anew(self) -> None:
        """What was handed over stays; the next consumers begin with the new count, in equal parts.

        Nothing may wait for the broker between the first and the last of the old ones: a wait lets a remote command
        come in, which may add or cancel a consumer.
        """
        self._consumed_at = monotonic()
        tasks, channel = self._consumer.task_consumer, self._consumer.task_consumer.channel
        for tag in self._cancelled:  # no message of theirs is on its way any more
            channel.callbacks.pop(tag, None)
        self._cancelled = list(tasks._active_tags.values())
        tasks._active_tags.clear()
        getattr(tasks, "_active_queue_no_ack", {}).clear()  # kombu 5.7
        for tag in self._cancelled:
            channel.basic_cancel(tag, nowait=True)
        channel.basic_qos(0, max(1, self._qos.value // max(1, len(self._cancelled))), False)
        self._qos.prev = self._qos.value
        tasks.consume()
