"""What Celery's log and events say about a task: its time, and its result.

In: the clocks of fibers; results. Out: the runtime is the task's own seconds, and its wait stands beside it, unless the
code runs outside a fiber. A result's text is Celery's, at most 1,024 characters of its `repr`, but is made faster.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic
from typing import Any

from celery.app import trace
from celery.utils.saferepr import saferepr
from celery.utils.text import truncate
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

#: Lists, and lengths of their text, for which both ways are compared before the faster one is taken.
SAMPLES = ([0.5], [0.25, -1e-7, 3.0], [0.1 + 0.2] * 5, [0.5, 0.25, [1.0], "text"])
LENGTHS = (1, 2, 4, 6, 7, 8, 9, 12, 20, 50, 1024)


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


def show_quickly(is_seen: Callable[[], bool]) -> Callable[[], None]:
    """Let Celery's tracer show results quickly, and only while somebody sees them. Returns what undoes this.

    A list of floats, which is what most models give, is shown faster than by Celery. The tracer shows each result, and
    gives the text to its log line and to the event `task-succeeded` alone. For 384 floats, Celery's own way takes
    nearly as long as to encode them as JSON.
    """
    show = shown if is_alike() else saferepr

    def show_if_seen(value: Any, maxlen: int | None = None) -> str:
        return show(value, maxlen) if is_seen() else ""

    trace.saferepr = show_if_seen

    def undo() -> None:
        trace.saferepr = saferepr

    return undo


def are_seen(consumer: Any) -> bool:
    """Whether the worker's log or its events have what Celery tells of results. A worker's own events have not."""
    events = None if consumer is None else consumer.event_dispatcher
    are_sent = events is None or (events.enabled and (not events.groups or "task" in events.groups))
    return bool(are_sent or trace.logger.isEnabledFor(logging.INFO))


def is_alike() -> bool:
    """Whether this release of Celery writes what `shown` writes: before 5.7 it cuts in another place."""
    return all(shown(sample, length) == saferepr(sample, length) for sample in SAMPLES for length in LENGTHS)


def shown(value: Any, maxlen: int | None = None) -> str:
    """Write what `celery.utils.saferepr.saferepr` (5.7) writes."""
    text = _floats(value, maxlen) if type(value) is list and maxlen else None
    return saferepr(value, maxlen) if text is None else text


def _floats(values: list[Any], left: int) -> str | None:
    """Write a list that has only floats as far as it is shown; None for any other."""
    parts = ["["]
    left -= 1
    last = len(values) - 1
    for number, value in enumerate(values):
        if type(value) is not float:
            return None
        if left <= 0:
            parts.append(", ...")
            break
        text = repr(value)
        if len(text) >= left:
            text = truncate(text, left)
        left -= len(text)
        parts.append(text)
        if number == last:
            break
        if left <= 0:
            parts.append(", ...")
            break
        parts.append(", ")
        left -= 2
    parts.append("]")
    return "".join(parts)
