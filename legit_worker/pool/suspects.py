"""Messages on RabbitMQ of which a worker may have died: each runs alone.

RabbitMQ gives back all that a dead worker had, and does not say which task killed it. If one such message runs alone, a
death is its own. On Redis, the script that reserves messages sees to that (`broker/reserve.py`).

A worker that gets such a message can't know whether the one that had it died, or only lost its connection. So a worker
that lives tells the others, a while after it has connected anew: they count that as no death.

In: messages before Celery sees them, fibers, and what other workers tell. Out: how many tasks may run, messages that go
behind others, and what this worker tells.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Mapping
from math import inf
from time import monotonic, time
from typing import Any

import kombu
from cachetools import LRUCache

from legit_worker.broker.behind import ACQUIRED, COUNT, Behind, unpack
from legit_worker.broker.returning import DELIVERIES, count, eta_seconds
from legit_worker.pool.fibers import Fiber
from legit_worker.pool.messages import came_again, is_numbered, key_of
from legit_worker.pool.requests import message_of
from legit_worker.pool.running import Key, key_from

logger = logging.getLogger(__name__)

#: The most messages that are known by name: more than a worker holds. Celery itself rejects unknown tasks' messages.
MOST_KNOWN = 10_000

#: Seconds in which suspects that come one after the other are one dead worker's, which ran the first of them alone.
ROW_SECONDS = 1.0

#: Seconds after a connection is back until this worker tells others that it lives: they may have lost theirs, too.
VOUCH_SECONDS = 5.0

#: The event by which a worker says so, and its routing key. It goes to the exchange of Celery's gossip.
EVENT, ROUTING_KEY = "worker-vouches", "worker.vouches"


class Suspects:
    """One worker's. Lives on the main thread. Owns which tasks are suspects, and what comes back by nobody's death."""

    def __init__(self, most: int) -> None:
        """`most` is the setting MAX_DELIVERIES."""
        #: Whether a task waits for its app's limits: it can kill nobody, and nobody waits for it.
        self.is_blocked: Callable[[Fiber], bool] = lambda fiber: False
        self._most = most
        self._fibers: set[Fiber] = set()
        self._behind = Behind()
        self._consumer: Any = None
        # By consumer tag, each queue that this worker consumes or consumed.
        self._queues: dict[str, str] = {}
        # Messages that this worker has, and those that it gave back while it lived.
        self._received: LRUCache[Key, bool] = LRUCache(MOST_KNOWN)
        self._given_back: LRUCache[Key, bool] = LRUCache(MOST_KNOWN)
        # How often workers that live have said that they gave a message back.
        self._vouched: LRUCache[Key, int] = LRUCache(MOST_KNOWN)
        # Until when a suspect belongs to the same dead worker as the last one, by the monotonic clock.
        self._row_until = 0.0
        # Until when the next message may be a suspect, as the last one was. It may have gone behind the others.
        self._careful_until = 0.0

    def meet(self, consumer: Any) -> None:
        """Meet the worker's consumer, before it connects."""
        self._consumer = consumer
        if getattr(consumer, "gossip", None) is not None:
            consumer.gossip.event_handlers[ROUTING_KEY] = self.hear

    @property
    def bound(self) -> float:
        """How many tasks may run now, and how many messages the worker should have."""
        return 1 if monotonic() < self._careful_until or self._runs_one else inf

    @property
    def _runs_one(self) -> bool:
        return any(not self.is_blocked(fiber) for fiber in self._fibers)

    # Messages

    def receive(self, message: kombu.Message) -> bool:
        """Look at a message before Celery does. True if it went behind the others in its queue."""
        if not is_numbered(message):
            return False
        key = key_of(message)
        counted = count(message.headers.get(COUNT))
        came, vouched, is_news = self._deliveries(message, key)
        deaths = max(0, came - vouched)
        is_over = 0 < self._most <= deaths  # then it does not run
        is_suspect = deaths > 0 and not is_over
        self._careful_until = monotonic() + ROW_SECONDS if is_suspect else 0.0
        must_go = is_news or (is_suspect and self._runs_one)
        if must_go and not is_over and self._goes_behind(message, came, vouched):
            return True
        # Without a copy, only the queue's own count goes on.
        message.delivery_info[DELIVERIES] = max(deaths, counted) if is_news and is_suspect else deaths
        if key is not None:
            self._received[key] = True
        return False

    def _deliveries(self, message: kombu.Message, key: Key | None) -> tuple[int, int, bool]:
        """Return how many workers may have died of a message, how many of them live, and whether the first is news.

        News is in no copy yet. A worker that gave the message back and lives did not die of it. A quorum queue also
        counts deliveries that no worker has read, and each lost connection. So whatever it counts since the last copy
        is one. From RabbitMQ 4.3 on, it does not count what was only given back. Of the suspects that a dead worker
        had, the first one ran, and the others had not begun. A task whose time has not come never ran.
        """
        was_ours = key is not None and self._given_back.pop(key, False)
        counted = count(message.headers.get(COUNT))
        may_be_death = counted > 0 or (came_again(message) and ACQUIRED not in message.headers)
        is_news = may_be_death and not was_ours and self._most > 0
        copied, vouched = unpack(message)  # after that, a copy seems to have come again, too
        if eta_seconds(message.headers.get("eta")) > time():
            return 0, 0, False
        if copied and is_news:
            now = monotonic()
            is_news, self._row_until = now > self._row_until, now + ROW_SECONDS
        came = copied + (is_news if self._most else max(0, counted - was_ours))
        return came, max(vouched, self._vouched.get(key, 0) if key else 0), is_news

    def _goes_behind(self, message: kombu.Message, deliveries: int, vouched: int) -> bool:
        tasks = self._consumer.task_consumer
        self._queues |= {} if tasks is None else {tag: queue for queue, tag in tasks._active_tags.items()}
        queue = self._queues.get(message.delivery_info.get("consumer_tag", ""))
        return queue is not None and self._behind.put(message, queue, deliveries, vouched)

    def adopted(self, message: kombu.Message, *, former: kombu.Message) -> None:
        """A message came again to its task, which goes on: it brings what is known, and this worker has it again."""
        if is_numbered(message) and (key := key_of(message)) is not None:
            message.delivery_info[DELIVERIES] = deaths_of(former)
            self._received[key] = True

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

    # What workers that live tell each other

    def vouch(self, *, ends: bool = False) -> None:
        """Tell others that this worker lives, and what it gave back and has not again; as it ends, all that it has."""
        given_back = [key for key in self._given_back if key not in self._received]
        keys = [*given_back, *(self._received if ends else ())]
        dispatcher = None if self._consumer is None else self._consumer.event_dispatcher
        if not keys or dispatcher is None:
            return
        try:
            dispatcher.send(EVENT, keys=keys)
        except Exception as error:  # as if this worker had died
            logger.warning("can't tell the other workers which %d messages were given back: %r", len(keys), error)
            return
        self._given_back.clear()
        self._note(keys)

    def hear(self, event: Mapping[str, Any]) -> None:
        """Another worker lives, and gave messages back. If they run here, they need not run alone any more."""
        if event.get("hostname") != self._consumer.hostname:
            self._note(event.get("keys"))

    def _note(self, told: Any) -> None:
        """Whatever others send: an error here would end this worker."""
        pairs = (
            [one for one in told if isinstance(one, list | tuple) and len(one) == 2] if isinstance(told, list) else []
        )
        keys = {key for one in pairs if (key := key_from(*one))}
        for key in keys:
            self._vouched[key] = self._vouched.get(key, 0) + 1
        for message in [fiber.request.message for fiber in self._fibers]:
            message.delivery_info[DELIVERIES] = deaths_of(message) - (key_of(message) in keys)
        self._fibers = {fiber for fiber in self._fibers if deaths_of(fiber.request.message) > 0}
        self._careful_until = 0.0

    # Fibers

    def add(self, fiber: Fiber) -> None:
        """A task came."""
        message = message_of(fiber.request)
        if message is None or not is_numbered(message):
            return
        if 0 < deaths_of(message) < (self._most or inf):
            self._fibers.add(fiber)
            logger.info("task %s runs alone: a worker that had its message died, or lost its connection", fiber.name)

    def discard(self, fiber: Fiber) -> None:
        """A task is over."""
        self._fibers.discard(fiber)


def deaths_of(message: kombu.Message) -> int:
    """Return how many workers may have died of a message, as was found when it came."""
    return count((message.delivery_info or {}).get(DELIVERIES))
