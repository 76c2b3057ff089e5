"""Messages that come again while this worker still has their tasks.

If a connection breaks, a broker delivers its messages again, and tasks that have begun go on. Here such a message finds
its task: the task is not run again, and acks its message by the new delivery.

In: messages before Celery sees them, and acks before they go out. Out: the messages that must run, and the acks.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from time import monotonic
from typing import Any

import kombu
from celery.worker import state

from legit_worker.pool.fibers import Phase
from legit_worker.pool.messages import came_again, is_copy, is_gone, is_numbered, key_of
from legit_worker.pool.requests import is_cancelled, never_ack, redeliver
from legit_worker.pool.running import Key, Running
from legit_worker.pool.suspects import Suspects

logger = logging.getLogger(__name__)

#: Seconds for which a done task waits for its message to come again: a broker notices a connection that is only half
#: open after some minutes. Afterwards the message ran elsewhere.
OWED_SECONDS = 600.0

#: The most done tasks that wait so. A lost connection leaves a window of them at most.
MOST_OWED = 10_000

#: Celery's name for a method that acks or rejects, and the method of `kombu.Message` that it calls.
ENDS = {"ack_log_error": "ack", "reject_log_error": "reject"}


class Adoption:
    """One worker's. Lives on the main thread. Owns the ends of tasks that their broker has not heard of."""

    def __init__(self, running: Running, suspects: Suspects) -> None:
        self._running = running
        self._suspects = suspects
        self._thread = 0
        self._errors: tuple[type[BaseException], ...] = (OSError,)
        self._call_soon: Callable[..., Any] = lambda call, *args: None
        #: For each task that is done, whose message comes again: when it ended, and how.
        self._owed: OrderedDict[Key, tuple[float, str]] = OrderedDict()
        #: Messages that went to a task that has begun, or is done.
        self.count = 0

    def meet(self, consumer: Any) -> None:
        """See a worker's messages and acks first. `consumer` has not connected yet (celery.worker, 5.5 to 5.7)."""
        self._suspects.meet(consumer)
        self._thread, self._errors = threading.get_ident(), consumer.connection_errors
        create = consumer.create_task_handler
        consumer.create_task_handler = lambda *args, **options: self._handler(create(*args, **options))
        name = "call_soon_ack" if hasattr(consumer, "call_soon_ack") else "call_soon"
        self._call_soon = getattr(consumer, name)
        setattr(consumer, name, self._end_soon)

    def lost(self) -> None:
        """The connection is gone. Tasks that Celery cancelled with it run again, unless they ended nevertheless."""
        for fiber in self._running:
            if is_cancelled(fiber.request) and fiber.phase is not Phase.ENDING:
                never_ack(fiber.request)
        self._suspects.lost(self._running)

    # Messages

    def _handler(self, handle: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def receive(message: kombu.Message) -> Any:
            is_done = self._adopt(message) or self._suspects.receive(message)
            return None if is_done else handle(message)

        return receive

    def _adopt(self, message: kombu.Message) -> bool:
        """Give a message that came again to the task that this worker has. False if it must run."""
        if not came_again(message) or (key := key_of(message)) is None:
            return False
        adopted = self._end_owed(key, message) or self._give_to_running(key, message)
        self.count += adopted
        return adopted

    def _end_owed(self, key: Key, message: kombu.Message) -> bool:
        ended_at, how = self._owed.pop(key, (0.0, ""))
        if not how or monotonic() - ended_at > OWED_SECONDS:
            return False
        logger.info("task %s is done already, and its message came again", key[0])
        self._end(message, how)
        return True

    def _give_to_running(self, key: Key, message: kombu.Message) -> bool:
        for fiber in self._running.find(key):
            request = fiber.request
            if not is_cancelled(request) and is_copy(message, request.message):
                logger.info("task %s goes on, and its message came again", fiber.name)
                self._replace(request, message)
                return True
        return False

    def _replace(self, request: Any, message: kombu.Message) -> None:
        """Let a request ack by another delivery. Celery 5.5 forgets running requests with their connection."""
        self._suspects.adopted(message, former=request.message)
        is_due = redeliver(request, message, self._end_soon)
        if request.acknowledged and not is_due:  # when it began, or when it was revoked
            self._end(message, "ack")
        elif request in state.active_requests:  # others have ended for Celery, and nobody would say so again
            state.task_reserved(request)

    # Ends

    def _end_soon(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Ack or reject now, in place of the consumer's method, which has the hub do it.

        A lost connection makes Celery empty the hub's list, and such an end would be forgotten.
        """
        message = getattr(call, "__self__", None)
        if not isinstance(message, kombu.Message) or threading.get_ident() != self._thread:
            return self._call_soon(call, *args, **options)
        _, _, *requeue = args  # a logger, and the errors of a lost connection
        how = "requeue" if any([*requeue, options.get("requeue")]) else ENDS[call.__name__]
        return self._end(message, how)

    def _end(self, message: kombu.Message, how: str) -> None:
        """Ack, reject or requeue. If the message's connection is gone, do so when the message comes again."""
        if is_gone(message):
            self._owe(message, how)
            return
        try:
            getattr(message, how)()
            self._suspects.settled(message, comes_again=how == "requeue")
        except self._errors as error:
            logger.warning("could not %s message %s: %r", how, message.delivery_tag, error)
            self._owe(message, how)

    def _owe(self, message: kombu.Message, how: str) -> None:
        """Remember a task's end. A message that goes back to its queue does so by itself."""
        key = key_of(message)
        if key is not None and how != "requeue" and is_numbered(message):
            self._owed[key] = monotonic(), how
            if len(self._owed) > MOST_OWED:
                self._owed.popitem(last=False)
