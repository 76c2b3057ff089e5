"""Ends of tasks that their own fibers don't tell: they expired, were revoked or cancelled, or nobody has them.

In: Celery's calls that tell such an end. Out: the same calls in fibers of their own, which park until the end is stored
and its app is told. Only then the message is acked, as with any other task. A call that comes too late, since the
task's own code is over and only the delivery of its result is left, does nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from celery.worker.consumer.consumer import Consumer
from celery.worker.request import Request

from legit_worker.broker.refusals import refuse
from legit_worker.pool.fibers import Phase, fiber_of
from legit_worker.pool.hooks import is_of_one_message
from legit_worker.pool.own import is_stray
from legit_worker.pool.strays import Strays

logger = logging.getLogger(__name__)

#: Takes Celery's call and the task's name, and makes the call, in a fiber if one can park here.
Run = Callable[[Callable[[], Any], str], None]


def end_in_fibers(run: Run, strays: Strays) -> Callable[[], None]:
    """Have Celery's calls made by `run`. Returns what undoes this.

    `Request._announce_revoked`, `_announce_cancelled` and `Consumer.on_unknown_task` (celery.worker, 5.5 to 5.7)
    store the end, and ack before or after that. Whoever calls them needs nothing of the end itself.
    """
    announce, cancel, on_unknown = Request._announce_revoked, Request._announce_cancelled, Consumer.on_unknown_task

    def announce_in_fiber(request: Request, *args: Any) -> None:
        request._already_revoked = True  # from now on, nobody announces it again
        end = partial(announce, request, *args)
        run(_surviving(end, request.message, strays, request), f"{request.name}[{request.id}]")

    def cancel_in_fiber(request: Request, *args: Any, **options: Any) -> None:
        run(partial(cancel, request, *args, **options), f"{request.name}[{request.id}]")

    def on_unknown_in_fiber(consumer: Consumer, body: Any, message: Any, exc: Exception) -> None:
        def end() -> None:
            try:
                raise exc  # Celery logs the error that is being handled, and a fiber begins without one
            except type(exc):
                with _rejected_later(message):
                    on_unknown(consumer, body, message, exc)

        run(_surviving(end, message, strays), f"a task that nobody has: {exc}")

    def undo() -> None:
        Request._announce_revoked, Request._announce_cancelled = announce, cancel
        Consumer.on_unknown_task = on_unknown

    Request._announce_revoked, Request._announce_cancelled = announce_in_fiber, cancel_in_fiber
    Consumer.on_unknown_task = on_unknown_in_fiber
    return undo


def _surviving(
    end: Callable[[], Any], message: Any, strays: Strays, request: Request | None = None
) -> Callable[[], None]:
    """The same call. A message that Celery can't deal with leaves its queue; if a signal interrupts, it goes back."""

    def run() -> None:
        try:
            end()
        except Exception as error:
            stray = is_stray(error, "Celery's code for a task that ends without running")
            if stray and request is not None:
                strays.give_back(request, error)
            elif stray or is_of_one_message(request, error):
                refuse(message, error)
            else:
                raise

    return run


@contextmanager
def _rejected_later(message: Any) -> Iterator[None]:
    """Put off a message's rejection, which Celery asks for before it tells the task's end."""
    rejections: list[tuple[Any, ...]] = []
    message.reject_log_error = lambda *args: rejections.append(args)
    try:
        yield
    finally:
        del message.reject_log_error
        for args in rejections:
            message.reject_log_error(*args)


def ignore_late_revokes() -> Callable[[], None]:
    """Have a task that is over stay what it is. Returns what undoes this.

    `Request.terminate` and `Request.cancel` (celery.worker.request, 5.5 to 5.7) store REVOKED or RETRY whatever the
    pool makes of it.
    """
    terminate, cancel = Request.terminate, Request.cancel

    def terminate_in_time(request: Request, *args: Any, **options: Any) -> None:
        if not _is_over(request):
            terminate(request, *args, **options)

    def cancel_in_time(request: Request, *args: Any, **options: Any) -> None:
        if not _is_over(request):
            cancel(request, *args, **options)

    def undo() -> None:
        Request.terminate, Request.cancel = terminate, cancel

    Request.terminate, Request.cancel = terminate_in_time, cancel_in_time
    return undo


def _is_over(request: Request) -> bool:
    fiber = fiber_of(request.worker_pid)
    is_over = fiber is not None and fiber.phase is Phase.ENDING
    if is_over:
        logger.warning("task %s[%s] is over but for its delivery: too late to revoke it", request.name, request.id)
    return is_over
