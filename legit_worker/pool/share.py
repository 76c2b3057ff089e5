"""How many tasks a worker holds, so that other workers get their share.

In: the predicted seconds that the device needs for the held tasks, and the seconds of the tasks' own code. Out: the
prefetch count, which is the number of tasks that the broker may hand over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic, sleep
from typing import Any

from celery.utils.quorum_queues import detect_quorum_queues
from celery.worker import state

from legit_worker.pool.engine import UNKNOWN_SECONDS

logger = logging.getLogger(__name__)

#: The predicted seconds of work that one worker holds beside the next batch of each model. A new worker holds 32 tasks,
#: since an unknown task counts as `UNKNOWN_SECONDS`. Another worker that starts now waits at most this long for its
#: share, and more seconds make batches no more even: `scripts/bench` with LEGIT_WORKER_MAX_HELD_SECONDS measures it.
MAX_HELD_SECONDS = 4.0

#: The number of tasks over which their own seconds are averaged: enough for a mix, few enough to follow a change.
MEMORY = 256

#: Seconds between two decisions. A decision takes up to 0.1 ms.
DECIDE_SECONDS = 0.02

#: An AMQP broker hears of a new prefetch count only if it is this many times the last one, or smaller by this factor.
WORTH_TELLING = 1.25

#: Seconds between two replacements of the consumers, which take three round trips each. See `_consume_anew`.
CONSUMER_SECONDS = 2.0

#: Seconds after an ack until RabbitMQ has sent the message that takes its place; a cluster writes the ack to several
#: disks. A message that is on its way to a consumer as that is cancelled goes back, and a quorum queue counts it as
#: delivered, as if a worker had died of it (rabbit_fifo_client, 3.10 to 4.1).
ACK_SECONDS = 0.02


class Share:
    """Decides how many tasks the worker holds. Lives on the main thread; asks the engine, and knows no broker."""

    def __init__(
        self,
        device_seconds: Callable[[float], float | None],
        *,
        calls: Callable[[], int],
        max_seconds: float | None = None,
    ) -> None:
        # The seconds for all waiting calls and this many more; None while no model is known.
        self._device_seconds = device_seconds
        self._calls_so_far = calls
        self._max_seconds = MAX_HELD_SECONDS if max_seconds is None else max_seconds
        # The last tasks: the seconds of their own code, their model calls, and their number.
        self._own = self._calls = self._ended = 0.0
        self._calls_before = 0

    def __repr__(self) -> str:
        return f"<Share: {self._max_seconds} s, a task's own code takes {self.own_seconds():.2e} s>"

    def ended(self, seconds: float) -> None:
        """A task is over, whose own code ran for this long in all."""
        self._own += seconds
        calls = self._calls_so_far()
        self._ended += 1
        self._calls, self._calls_before = self._calls + calls - self._calls_before, calls
        if self._ended > MEMORY:
            self._own, self._calls, self._ended = self._own / 2, self._calls / 2, self._ended / 2

    def most(self, held: int, waiting: int, window: int) -> int:
        """Return how many tasks the worker may hold, from 1 to `window`.

        It holds `held` tasks now, and `waiting` of them have not begun.
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
        """Return how many tasks the worker may hold before the first one has come."""
        return max(1, min(window, int(self._max_seconds / UNKNOWN_SECONDS)))

    def _seconds(self, tasks: int) -> float:
        """Predict the seconds for all parked tasks, and for this many tasks that have not begun."""
        calls = self._calls / self._ended if self._ended else 1.0
        on_device = self._device_seconds(tasks * calls)
        if on_device is None and not self._ended:
            return tasks * UNKNOWN_SECONDS
        return (on_device or 0.0) + tasks * self.own_seconds()

    def own_seconds(self) -> float:
        """Return the seconds of a task's own code, on average."""
        return self._own / self._ended if self._ended else 0.0


class Prefetch:
    """Sets the prefetch count to the number of tasks that the pool wants. Lives on the main thread; one per worker.

    Each task with an ETA that Celery holds adds one to the count, up to `worker_eta_task_limit`, as Celery has it.
    """

    def __init__(self, consumer: Any, count: int) -> None:
        conf = consumer.app.conf
        count = 1 if conf.get("worker_disable_prefetch") else min(count, conf.get("worker_eta_task_limit") or count)
        self._consumer = consumer
        consumer.prefetch_multiplier = 1
        consumer.initial_prefetch_count = count
        # Celery calls this on `pool_grow`. The pool's next decision uses the new window anyway.
        consumer._update_prefetch_count = lambda index=0: None
        self._qos: Any = None
        # The pool's part of the count that the broker knows, and the number of tasks that Celery holds for later.
        self._told, self._later = count, 0
        self._decided_at = self._consumed_at = 0.0
        # The tags of replaced consumers, whose last messages may still arrive.
        self._cancelled: list[str] = []
        # Whether there are no consumers until the worker holds no more than it wants.
        self._is_draining = False

    def is_due(self) -> bool:
        """Tell whether it is time to decide again: at once while there are no consumers."""
        return self._is_draining or monotonic() - self._decided_at >= DECIDE_SECONDS

    def has_told(self, count: int) -> bool:
        """Tell whether the broker knows that it may hand over no more than this many tasks."""
        qos = self._consumer.qos
        return qos is self._qos and self._told <= count and qos.prev == qos.value

    def want(self, count: int, *, at_most: bool = False) -> None:
        """Let the broker hand over this many tasks, or about as many; never more if `at_most`."""
        self._decided_at = monotonic()
        if self._is_one_at_a_time():
            count = 1
        qos, before = self._consumer.qos, self._consumer.initial_prefetch_count
        self._consumer.initial_prefetch_count = count
        if qos is None:
            return
        if qos is not self._qos:
            self._meet(qos, before)
        if self._consumer.connection.transport.driver_type != "amqp":
            if count != self._told:
                self._tell(count)
        elif (
            self._is_draining
            or (at_most and count < self._told)
            or not self._told / WORTH_TELLING < count < self._told * WORTH_TELLING
        ):
            self._tell_amqp(count)

    def _tell_amqp(self, count: int) -> None:
        """Tell the broker. A consumer of a quorum queue keeps its first count, so replace the consumers."""
        conf = self._consumer.app.conf
        if not (conf.worker_detect_quorum_queues and detect_quorum_queues(self._consumer.app, "amqp")[0]):
            self._tell(count)
        elif self._is_draining or self._decided_at - self._consumed_at >= CONSUMER_SECONDS:
            self._tell(count)
            self._consume_anew()

    def _is_one_at_a_time(self) -> bool:
        """Whether `worker_disable_prefetch` (Celery 5.6) says so, which Celery heeds on Redis only."""
        conf, connection = self._consumer.app.conf, getattr(self._consumer, "connection", None)
        return bool(conf.get("worker_disable_prefetch")) and (
            connection is not None and connection.transport.driver_type == "redis"
        )

    def _meet(self, qos: Any, count: int) -> None:
        """A new connection, whose broker knows this count. Celery holds nothing for later any more, or not yet."""
        if self._qos is None and self._is_one_at_a_time():
            logger.warning(
                "worker_disable_prefetch is set: this worker takes one task at a time, and computes no two together; "
                "unset it to have batches, and LEGIT_WORKER_MAX_HELD_SECONDS bounds what a worker holds"
            )
        self._qos, self._told, self._cancelled, self._is_draining = qos, count, [], False
        self._later = max(0, qos.value - count)
        # kombu would forget what is over the limit.
        qos.increment_eventually, qos.decrement_eventually = self._hold_later, lambda n=1: self._hold_later(-n)
        # After a lost connection Celery would raise the count step by step. The pool decides instead.
        self._consumer._maximum_prefetch_restored = True

    def _hold_later(self, n: int = 1) -> int:
        """Celery holds `n` more tasks with an ETA, or gives them to the pool now."""
        with self._qos._mutex:
            self._later = max(0, self._later + n)
            self._tell(self._told)
            return int(self._qos.value)

    def _tell(self, count: int) -> None:
        """Set the count, which the hub tells the broker. All that the worker holds is bounded by the limit."""
        with self._qos._mutex:
            limit = getattr(self._qos, "max_prefetch", None)  # kombu 5.6
            value = count + self._later
            self._told, self._qos.value = count, min(value, limit) if limit else value

    def _consume_anew(self) -> None:
        """Replace the consumers: each new one gets an equal part of the new count. The worker keeps its messages.

        These don't count for the new consumers. So if they are more than the new count, they become fewer first,
        however long that takes. Then the worker holds at most twice the count, until it has done what it had.
        """
        tasks, channel = self._consumer.task_consumer, self._consumer.task_consumer.channel
        self._qos.prev = self._qos.value
        if not self._is_draining:  # set first: while RabbitMQ answers, a remote command may come, and decide
            self._is_draining, self._consumed_at = True, self._decided_at
            sleep(ACK_SECONDS)
            self._cancel(tasks, channel)
            self._limit(tasks, channel)  # what the former consumers still get comes before RabbitMQ's answer
        if self._held(channel) <= self._told:
            self._limit(tasks, channel)
            tasks.consume()
            self._is_draining, self._consumed_at = False, self._decided_at

    def _cancel(self, tasks: Any, channel: Any) -> None:
        """Cancel the consumers without a wait: meanwhile a remote command could add or cancel one.

        RabbitMQ deletes a queue such as a `Broadcast` with its last consumer. So the consumer stays: the queue is no
        quorum queue.
        """
        for tag in self._cancelled:  # their last messages have arrived
            channel.callbacks.pop(tag, None)
        staying = {queue.name for queue in tasks.queues if queue.auto_delete}
        names = [name for name in tasks._active_tags if name not in staying]
        self._cancelled = [tasks._active_tags.pop(name) for name in names]
        for name in names:
            getattr(tasks, "_active_queue_no_ack", {}).pop(name, None)  # kombu 5.7
        for tag in self._cancelled:
            channel.basic_cancel(tag, nowait=True)

    def _limit(self, tasks: Any, channel: Any) -> None:
        """Give each consumer that comes from now on its part. Tasks for later are messages of the former ones."""
        channel.basic_qos(0, max(1, (self._qos.value - self._later) // max(1, len(tasks.queues))), False)

    def _held(self, channel: Any) -> int:
        """Count the messages of this connection that are not acked, without those of tasks for later.

        Celery reserves a task once its rate limit lets it go.
        """
        limited = sum(len(bucket.contents) for bucket in self._consumer.task_buckets.values() if bucket)
        reserved = [request for request in state.reserved_requests if request.message.channel is channel]
        return limited + sum(not request.acknowledged for request in reserved)
