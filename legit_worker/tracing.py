"""Traces by OpenTelemetry, if the project has it.

In: tasks that have a span, and batches that are computed for them. Out: one span per batch, linked to the spans of its
tasks; in each task's span, an event that says how long the task waited for the batch; and the traceparent of a task.

What a project's sampler or span processor raises is logged: a trace lacks something then, and all tasks go on.

Nothing here imports OpenTelemetry: a process that has not imported it has no spans. Then all of this costs a look into
a dictionary. A batch of which no task has a span has none either.

Sources: the API of opentelemetry-api (1.20 to 1.45); W3C Trace Context, https://www.w3.org/TR/trace-context/.
"""

from __future__ import annotations

import functools
import logging
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import time_ns
from typing import Any, ParamSpec, TypeVar

Returned = TypeVar("Returned")
Given = ParamSpec("Given")

logger = logging.getLogger(__name__)

#: The instrumentation's name, the batch's span, and the event.
NAME, BATCH, WAITED = "legit_worker", "legit_worker.batch", "legit_worker.waited"

#: The form of a traceparent. All zeros is no trace, and no span.
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def _harmless(function: Callable[Given, Returned | None]) -> Callable[Given, Returned | None]:
    """Return None if OpenTelemetry, or what a project has put into it, raises."""

    @functools.wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Returned | None:
        try:
            return function(*args, **kwargs)
        except Exception:
            logger.warning("OpenTelemetry failed, and a trace lacks something", exc_info=True)
            return None

    return call


@dataclass(slots=True)
class Asker:
    """A task's span, from when the task asks a model."""

    span: Any
    #: Nanoseconds since the epoch.
    asked_at: int
    #: Whether the span has the event by now: a large call has several batches.
    is_told: bool = False


@_harmless
def asker() -> Asker | None:
    """The span of the current task or thread; None if it has none, or one that is not recorded."""
    api = sys.modules.get("opentelemetry.trace")
    if api is None:
        return None
    span = api.get_current_span()
    return Asker(span, time_ns()) if span.is_recording() else None


class BatchSpan:
    """One batch's span. From its launch to the moment when its outputs are taken."""

    def __init__(self, model: str, items: int, askers: Iterable[Asker]) -> None:
        from opentelemetry.context import Context
        from opentelemetry.trace import Link, get_tracer

        now, attributes = time_ns(), {"legit_worker.model": model}
        links = []
        for one in askers:
            waited = {"legit_worker.wait_seconds": max(0, now - one.asked_at) / 1e9}
            if not one.is_told:
                one.is_told = True
                one.span.add_event(WAITED, {**attributes, **waited}, timestamp=now)
            links.append(Link(one.span.get_span_context(), waited))
        self._span = get_tracer(NAME).start_span(
            BATCH,
            context=Context(),  # a trace of its own: it belongs to several tasks
            attributes={**attributes, "legit_worker.items": items, "legit_worker.calls": len(links)},
            links=links,
            start_time=now,
        )

    @_harmless
    def end(self, seconds: float | None = None, error: BaseException | None = None) -> None:
        """The batch is over. `seconds` are the device's."""
        if seconds is not None:
            self._span.set_attribute("legit_worker.device_seconds", seconds)
        if error is not None:
            from opentelemetry.trace import Status, StatusCode

            self._span.record_exception(error)
            self._span.set_status(Status(StatusCode.ERROR, str(error)[:200]))
        self._span.end()


@_harmless
def batch_span(model: str, items: int, askers: Iterable[Asker | None]) -> BatchSpan | None:
    """Begin a batch's span; None if no task in it has one."""
    found = [one for one in askers if one is not None]
    return BatchSpan(model, items, found) if found else None


@_harmless
def traceparent() -> str | None:
    """The current span, as W3C Trace Context writes it; None if there is none."""
    api = sys.modules.get("opentelemetry.trace")
    context = api.get_current_span().get_span_context() if api is not None else None
    if context is None or not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def checked(value: Any) -> str | None:
    """A message's header `traceparent`, if it is one."""
    return value if isinstance(value, str) and _TRACEPARENT.fullmatch(value) else None
