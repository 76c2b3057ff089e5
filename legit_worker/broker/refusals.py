"""Messages that can't become a task: one such message must not end a worker.

In: messages of any broker, as a worker's consumer gets them. Out: the same to Celery; one that Celery stumbles over,
before any task of it began, is logged and leaves the queue.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery import Celery
from celery.worker import state
from kombu.exceptions import ContentDisallowed, SerializationError
from kombu.utils.encoding import safe_repr

from legit_worker.broker.redis import UNREADABLE_KEY, ReservingChannel

logger = logging.getLogger(__name__)

#: What Celery and kombu raise over data that are not as they expect. Nothing here is a server's or a network's fault.
DATA_ERRORS = (
    ArithmeticError,
    AttributeError,
    ContentDisallowed,
    LookupError,
    RecursionError,
    SerializationError,
    TypeError,
    ValueError,
)

#: Is given a message, and what is wrong with it if that is known.
Handler = Callable[..., Any]

#: Characters of a message's headers and body that an error's log line shows.
SHOWN = 300


def refuse_unreadable(app: Celery, *, begun: Callable[[], int]) -> None:
    """From now on, this app's workers outlive any message. `begun` counts the tasks that the worker has started."""
    consumer = app.amqp.Consumer
    if not issubclass(consumer, RefusingConsumer):
        consumer = type(consumer.__name__, (RefusingConsumer, consumer), {})
        app.amqp.Consumer = consumer
    consumer.begun = staticmethod(begun)


class RefusingConsumer:
    """Mixed into the consumer that a worker takes its tasks from. Lives on the main thread."""

    #: How many tasks have begun.
    begun: Callable[[], int]

    _on_message: Handler | None = None
    _on_decode_error: Handler | None = None

    @property
    def on_message(self) -> Handler | None:
        """What Celery does with a message that kombu could read."""
        return self._on_message

    @on_message.setter
    def on_message(self, handler: Handler | None) -> None:
        self._on_message = self._guarded(handler)

    @property
    def on_decode_error(self) -> Handler | None:
        """What Celery does with one that kombu could not read: it logs, which can fail in its turn."""
        return self._on_decode_error

    @on_decode_error.setter
    def on_decode_error(self, handler: Handler | None) -> None:
        self._on_decode_error = self._guarded(handler)

    def _guarded(self, handler: Handler | None) -> Handler | None:
        """The same, but for errors over a message's data. What a task raises that has begun is the pool's business."""
        if handler is None:
            return None

        def handle(message: Any, *rest: Any) -> Any:
            before = self.begun()
            try:
                return handler(message, *rest)
            except DATA_ERRORS as error:
                if self.begun() != before:
                    raise
                refuse(message, error)

        return handle


def give_up_request(request: Any, error: Exception) -> None:
    """A task has begun, and Celery could not tell how it ended. Raises the error if what ran is no task.

    Celery's own state of a request that is over is set as `Request.on_failure` sets it (celery.worker, 5.7).
    """
    if request is None:
        raise error
    state.task_ready(request)
    request.acknowledged = True
    refuse(request.message, error)


def refuse(message: Any, error: Exception) -> None:
    """Take a message out of its queue: on Redis it is put aside, elsewhere its broker has dead letters if set up.

    Celery may have rejected it before it stumbled; or the connection that it came by is gone, and it will come again.
    """
    logger.error(
        "a message can't become a task, or its task's end can't be told (%r): headers %.*s, body %.*s",
        error,
        SHOWN,
        safe_repr(message.headers),
        SHOWN,
        safe_repr(message.body),
        exc_info=error,
    )
    if message.acknowledged or getattr(message.channel, "closed", False):
        return
    if isinstance(message.channel, ReservingChannel):
        message.channel.put_aside(message)
        logger.error("the message was put into the list %s", UNREADABLE_KEY)
    else:
        message.reject_log_error(logger, (Exception,))
