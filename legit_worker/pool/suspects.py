"""Messages on RabbitMQ of which a worker may have died: each runs alone.

RabbitMQ gives back all that a dead worker had, and does not say which task killed it. If one such message runs alone, a
death is its own. On Redis, the script that reserves messages sees to that (`broker/reserve.py`).

In: messages before Celery sees them, and fibers. Out: how many tasks may run, and messages that go behind others.
"""

from __future__ import annotations

import logging
from collections.abc import Container
from math import inf
from typing import Any

import kombu
from cachetools import LRUCache

from legit_worker.broker.behind import COUNT, Behind, unpack
from legit_worker.broker.returning import DELIVERIES, count
from legit_worker.pool.fibers import Fiber
from legit_worker.pool.messages import came_again, is_numbered, key_of
from legit_worker.pool.running import Key

logger = logging.getLogger(__name__)


#: The most messages that are known by name: more than a worker holds. Celery rejects those of unknown tasks by itself.
MOST_KNOWN = 10_000


class Suspects:
    """One worker's. Lives on the main thread. Owns which tasks are suspects, and what comes back by nobody's death."""

    def __init__(self, most: int) -> None:
        """`most` is the setting MAX_DELIVERIES."""
        self._most = most
        self._fibers: set[Fiber] = set()
        self._behind = Behind()
        self._consumer: Any = None
        # By consumer tag, each queue that this worker consumes or consumed.
        self._queues: dict[str, str] = {}
        # Messages that this worker has, and those that it gave back while it lived.
        self._received: LRUCache[Key, bool] = LRUCache(MOST_KNOWN)
        self._given_back: LRUCache[Key, bool] = LRUCache(MOST_KNOWN)
        # Whether the last message was a suspect. Those of a dead worker come one after the other.
        self._is_careful = False

    def meet(self, consumer: Any) -> None:
        """Meet the worker's consumer, before it connects."""
        self._consumer = consumer

    @property
    def bound(self) -> float:
        """How many tasks may run now, and how many messages the worker should have."""
        return 1 if self._is_careful or self._fibers else inf

    # Messages

    def receive(self, message: kombu.Message) -> bool:
        """Look at a message before Celery does. True if it went behind the others in its queue."""
        if not is_numbered(message):
            return False
        key = key_of(message)
        counted = count(message.headers.get(COUNT))
        deliveries, is_news = self._deliveries(message, key)
        self._is_careful = self._is_suspect(deliveries)
        if self._is_careful and (is_news or self._fibers) and self._goes_behind(message, deliveries):
            return True
        # Without a copy, only the queue's own count goes on.
        message.delivery_info[DELIVERIES] = max(deliveries, counted) if is_news and self._is_careful else deliveries
        if key is not None:
            self._received[key] = True
        return False

    def _is_suspect(self, deliveries: int) -> bool:
        """Whether a message runs and may be deadly. One that came too often does not run."""
        return deliveries > 0 and not 0 < self._most <= deliveries

    def _deliveries(self, message: kombu.Message, key: Key | None) -> tuple[int, bool]:
        """Return how many workers may have died of a message, and whether that is news: no copy says so yet.

        A worker that gave the message back and lives did not die of it. A quorum queue also counts deliveries that no
        worker has read, and each lost connection. So whatever it counts since the last copy is one.
        """
        was_ours = key is not None and self._given_back.pop(key, False)
        counted = count(message.headers.get(COUNT))
        is_news = (came_again(message) or counted > 0) and not was_ours and self._most > 0
        copied = unpack(message)  # after that, a copy seems to have come again, too
        return copied + (is_news if self._most else max(0, counted - was_ours)), is_news

    def _goes_behind(self, message: kombu.Message, deliveries: int) -> bool:
        tags = getattr(self._consumer.task_consumer, "_active_tags", {})
        self._queues |= {tag: queue for queue, tag in tags.items()}
        queue = self._queues.get(message.delivery_info.get("consumer_tag", ""))
        return queue is not None and self._behind.put(message, queue, deliveries)

    def settled(self, message: kombu.Message, *, comes_again: bool) -> None:
        """A message was acked or rejected; or its task put it back into its queue, which is nobody's death."""
        key = key_of(message) if is_numbered(message) else None
        if key is not None:
            self._received.pop(key, None)
            if comes_again:
                self._given_back[key] = True

    def lost(self, running: Container[Fiber]) -> None:
        """The connection is gone: what this worker has comes again, and so far nobody died of it."""
        self._given_back, self._received = self._received, LRUCache(MOST_KNOWN)
        self._queues.clear()
        self._behind.close()
        self._fibers = {fiber for fiber in self._fibers if fiber in running}

    # Fibers

    def add(self, fiber: Fiber) -> None:
        """A task came."""
        message = getattr(fiber.request, "message", None)
        if message is None or not is_numbered(message):
            return
        if self._is_suspect(count((message.delivery_info or {}).get(DELIVERIES))):
            self._fibers.add(fiber)
            logger.info("task %s runs alone: a worker that had its message died, or lost its connection", fiber.name)

    def discard(self, fiber: Fiber) -> None:
        """A task is over."""
        self._fibers.discard(fiber)
