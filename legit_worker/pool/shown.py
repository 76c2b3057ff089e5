"""How Celery shows a task's result in its log and events: at most 1,024 characters of its `repr`.

In: results. Out: the same text as Celery's, faster for a list of floats, which is what most models give.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery.app import trace
from celery.utils.saferepr import saferepr
from celery.utils.text import truncate

#: Lists, and lengths of their text, for which both ways are compared before the faster one is taken.
SAMPLES = ([0.5], [0.25, -1e-7, 3.0], [0.1 + 0.2] * 5, [0.5, 0.25, [1.0], "text"])
LENGTHS = (1, 2, 4, 6, 7, 8, 9, 12, 20, 50, 1024)


def show_quickly(is_seen: Callable[[], bool]) -> Callable[[], None]:
    """Let Celery's tracer show results quickly, and only while somebody sees them. Returns what undoes this.

    The tracer shows each result, and gives the text to its log line and to the event `task-succeeded` alone. For 384
    floats, that takes nearly as long as to encode them as JSON.
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
    events = getattr(consumer, "event_dispatcher", None)
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
