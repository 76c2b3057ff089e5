"""Celery's `Request`: all that this pool reads of it, and changes in it, that Celery keeps to itself.

In: requests of `celery.worker.request` (5.5 to 5.7); None if what runs is no task. Out: their messages, acks that wait
or that go by another delivery, and failures that Celery would not store. `ends` has the methods that it replaces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import kombu
from billiard.einfo import ExceptionInfo
from celery import signals
from celery.worker import state

#: The functions by which a request acks and rejects, and the methods of its message that they stand for.
ENDS = {"_on_ack": "ack_log_error", "_on_reject": "reject_log_error"}


class LaterEnd:
    """Stands for a request's ack or rejection until its end is stored."""

    def __init__(self, call: Callable[..., Any]) -> None:
        #: What acks or rejects: of the message's last delivery.
        self.call = call
        self._args: tuple[Any, ...] | None = None

    @property
    def is_due(self) -> bool:
        """Whether Celery has acked or rejected."""
        return self._args is not None

    def __call__(self, *args: Any) -> None:
        """Celery acks, or rejects."""
        self._args = args

    def send(self) -> None:
        """Do what Celery has asked for, if anything."""
        if self._args is not None:
            self.call(*self._args)


def message_of(request: Any) -> kombu.Message | None:
    """Return the message that a task came in."""
    return None if request is None else request.message


def may_be_revoked(request: Any) -> bool:
    """Look quickly at what `Request.revoked` looks at."""
    if request is None:
        return False
    has_stamps = state.revoked_stamps and request.stamped_headers
    return bool(has_stamps or request.expires or request.id in state.revoked)


def is_cancelled(request: Any) -> bool:
    """Whether Celery has cancelled the task, since its connection was lost or the worker ends."""
    return request is not None and bool(request._already_cancelled)


def never_ack(request: Any) -> None:
    """Leave the message to the broker, however the task ends."""
    request._on_ack = request._on_reject = lambda *_: None


@contextmanager
def ended_last(request: Any) -> Iterator[None]:
    """Ack or reject, once `Request.on_failure` is over, what it acks or rejects. It stores the failure after that.

    A worker that is killed between the two would lose the task's end; and the result backend may be away.
    """
    if request is None:
        yield
        return
    ends = {name: LaterEnd(getattr(request, name)) for name in ENDS}
    for name, end in ends.items():
        setattr(request, name, end)
    try:
        yield
    finally:
        for name, end in ends.items():
            if getattr(request, name) is end:
                setattr(request, name, end.call)
    for end in ends.values():
        end.send()


def redeliver(request: Any, message: kombu.Message, end: Callable[..., Any]) -> bool:
    """Let a request end by another delivery. Returns whether its end is due, and only waits until it is stored.

    `end` gets the delivery's own method that acks or rejects, and its arguments.
    """
    request._message, is_due = message, False
    for name, method in ENDS.items():
        call, before = partial(end, getattr(message, method)), getattr(request, name)
        if isinstance(before, LaterEnd):
            before.call = call
            is_due = is_due or before.is_due
        else:
            setattr(request, name, call)
    return is_due


def store_failure(request: Any, error: Exception, failure: ExceptionInfo) -> None:
    """Store and tell a failure as `Request.on_failure` does, unless the worker ends."""
    task, context = request.task, request._context
    task.backend.mark_as_failure(request.id, error, request=context, store_result=request.store_errors)
    signals.task_failure.send(
        sender=task,
        task_id=request.id,
        exception=error,
        args=request.args,
        kwargs=request.kwargs,
        traceback=failure.traceback,
        einfo=failure,
    )
