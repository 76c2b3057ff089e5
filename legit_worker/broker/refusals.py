"""Messages that can't become a task: they must not end a worker.

In: messages of any broker, as a worker's consumer gets them. Out: the same messages to Celery. If Celery fails over a
message before its task began, the error is logged and the message leaves the queue.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import kombu
from celery import Celery
from celery.worker import state
from kombu.exceptions import ContentDisallowed, SerializationError
from kombu.utils.encoding import safe_repr

from legit_worker.broker.redis import UNREADABLE_KEY, ReservingChannel
from legit_worker.broker.tally import tally

logger = logging.getLogger(__name__)

#: Celery and kombu raise these over unexpected data. None of them is the fault of a server or a network.
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

#: Takes a message, and the error if kombu could not read it.
Handler = Callable[..., Any]

#: Characters of a message's headers and body that an error's log line shows.
SHOWN = 300


def refuse_unreadable(app: Celery, *, begun: Callable[[], int]) -> None:
    """Let this app's workers survive any message. `begun` counts the tasks that the worker has started."""
    consumer = app.amqp.Consumer
    if not issubclass(consumer, RefusingConsumer):
        consumer = type(consumer.__name__, (RefusingConsumer, consumer), {})
        app.amqp.Consumer = consumer
    consumer.begun = staticmethod(begun)


class RefusingConsumer:
    """Mixed into the consumer that a worker takes its tasks from. Lives on the main thread."""

    #: The number of tasks that have begun.
    begun: Callable[[], int]

    def __setattr__(self, name: str, value: Any) -> None:
        """Guard the handlers that Celery sets, for messages that kombu could read and for the others."""
        guards = name in ("on_message", "on_decode_error") and value is not None
        super().__setattr__(name, self._guarded(value) if guards else value)

    def _guarded(self, handler: Handler) -> Handler:
        """Wrap a handler: an error over a message's data removes the message, unless its task has begun."""

        def handle(message: Any, *rest: Any) -> Any:
            before = self.begun()
            try:
                return handler(message, *rest)
            except DATA_ERRORS as error:
                if self.begun() != before:
                    raise
                refuse(message, error)

        return handle


def keep_discarded(consumer: Any) -> None:
    """Let a worker's consumer put what Celery discards into the list of unreadable messages, if the broker is Redis.

    Celery logs these messages, and rejects or acks them (celery.worker.consumer, 5.5 to 5.7). Nobody is told of them.
    """
    for name in ("on_decode_error", "on_invalid_task", "on_unknown_message"):
        setattr(consumer, name, _keeping(getattr(consumer, name)))


def _keeping(discard: Handler) -> Handler:
    @functools.wraps(discard)
    def keep(*args: Any) -> Any:
        message = next(one for one in args if isinstance(one, kombu.Message))
        if isinstance(message.channel, ReservingChannel) and not message.acknowledged:
            message.channel.keep_copy(message)
        return discard(*args)

    return keep


def give_up_request(request: Any, error: Exception) -> None:
    """End a request whose result Celery could not store. Raises the error if no task ran.

    Sets Celery's state of the request as `Request.on_failure` does (celery.worker, 5.7).
    """
    if request is None:
        raise error
    state.task_ready(request)
    request.acknowledged = True
    refuse(request.message, error)


def give_back_request(request: Any) -> None:
    """Put the message of a request that ended half-way back into its queue, unless it was acked or rejected."""
    state.task_ready(request)
    if request.message.acknowledged:
        return
    request.acknowledged = True
    request.on_reject(logger, request.connection_errors, True)


def refuse(message: Any, error: Exception) -> None:
    """Remove a message from its queue. On Redis a list keeps it; other brokers may have a dead-letter exchange."""
    logger.error(
        "a message can't become a task, or its task's end can't be told (%r): headers %.*s, body %.*s",
        error,
        SHOWN,
        safe_repr(message.headers),
        SHOWN,
        safe_repr(message.body),
        exc_info=error,
    )
    # Celery has rejected it already; or its connection is gone, and the message comes again.
    if message.acknowledged or getattr(message.channel, "closed", False):
        return
    if isinstance(message.channel, ReservingChannel):
        message.channel.put_aside(message)
        logger.error("the message was put into the list %s", UNREADABLE_KEY)
    else:
        tally["unreadable"] += 1
        message.reject_log_error(logger, (Exception,))
