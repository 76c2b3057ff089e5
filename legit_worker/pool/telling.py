"""What Celery says about a task's time: the runtime is the task's own seconds, and its wait stands beside it.

In: the clocks of fibers. Out: log lines and events. Outside a fiber nothing changes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic
from typing import Any

from celery.app import trace
from celery.worker.consumer import consumer
from celery.worker.request import Request

from legit_worker.pool import fibers
from legit_worker.pool.bodies import mark_body

#: The least wait, in seconds, that a log line mentions. Any task may wait less than this for its batch.
NOTICEABLE = 0.1

#: Celery's events at a task's end.
ENDS = {"task-succeeded", "task-failed", "task-retried"}

#: The part of `celery.app.trace.LOG_SUCCESS` with the runtime, and its replacement.
RUNTIME, BOTH = "%(runtime)ss", "%(runtime)ss, waited %(waited)ss"


def tell_own_time() -> Callable[[], None]:
    """Let Celery report tasks' own time. Returns a function that undoes this.

    `celery.app.trace.build_tracer` (5.5 to 5.7) gets a clock. The consumer builds a task's tracer, and `trace` builds
    one for a task that another task calls.
    """
    modules: tuple[Any, ...] = (trace, consumer)
    before = [module.build_tracer for module in modules]
    send_event = Request.send_event

    def send_with_wait(request: Request, type: str, **fields: Any) -> None:
        waited = _waited() if type in ENDS else None
        send_event(request, type, **fields, **({} if waited is None else {"waited": waited}))

    def undo() -> None:
        for module, function in zip(modules, before, strict=True):
            module.build_tracer = function
        Request.send_event = send_event
        trace.logger.removeFilter(add_wait)

    for module, function in zip(modules, before, strict=True):
        module.build_tracer = _telling(function)
    Request.send_event = send_with_wait
    trace.logger.addFilter(add_wait)
    return undo


def _telling(build_tracer: Callable[..., Any]) -> Callable[..., Any]:
    def build(*args: Any, **options: Any) -> Any:
        return mark_body(build_tracer(*args, **{"monotonic": own_time, **options}))

    return build


def own_time() -> float:
    """Return the running task's own seconds; outside a fiber, the monotonic clock."""
    fiber = fibers.current()
    return monotonic() if fiber is None else fiber.clock.seconds(monotonic())


def add_wait(record: logging.LogRecord) -> bool:
    """Add a task's wait to the log line with its runtime. As a filter, it drops nothing."""
    waited = _waited()
    if waited is not None and isinstance(record.args, dict) and "runtime" in record.args:
        record.args["waited"] = waited  # the record's `data` is this dictionary, for loggers that write fields
        if waited >= NOTICEABLE and isinstance(record.msg, str):
            record.msg = record.msg.replace(RUNTIME, BOTH)
    return True


def _waited() -> float | None:
    fiber = fibers.current()
    return None if fiber is None else round(fiber.clock.waited(monotonic()), 3)
