"""The project `life`, watched by OpenTelemetry, Sentry and structlog, each set up as its own documentation says.

In: as `life`. Out: tasks that leave traces, errors and log lines before and after they were parked among many others,
and tasks that return what the three made of it.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import sentry_sdk
import structlog
from life import Noted, app, call_model, wait_for_file
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sentry_sdk.envelope import Envelope
from sentry_sdk.integrations.celery import CeleryIntegration
from sentry_sdk.transport import Transport

exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
CeleryInstrumentor().instrument()
tracer = trace.get_tracer(__name__)

events: list[dict[str, Any]] = []
lines: list[dict[str, Any]] = []


class Kept(Transport):
    """Sends nothing anywhere."""

    def capture_envelope(self, envelope: Envelope) -> None:
        """Keep the event."""
        event = envelope.get_event()
        if event is not None:
            events.append(dict(event))


def keep_line(_: Any, __: str, line: MutableMapping[str, Any]) -> str:
    """structlog's last processor."""
    lines.append(dict(line))
    return ""


sentry_sdk.init(dsn="http://key@localhost/1", transport=Kept, integrations=[CeleryIntegration()])
structlog.configure(processors=[structlog.contextvars.merge_contextvars, keep_line])


@app.task(name="traced", bind=True, base=Noted)
def traced(self: Noted, item: str, path: str) -> str:
    """One span of its own is open while it is parked, one begins after that, and there it sends another task."""
    with tracer.start_as_current_span("before", attributes={"item": item}):
        wait_for_file(self, path)
    with tracer.start_as_current_span("after", attributes={"item": item}):
        call_model()
        child = traced_child.delay(item)
    return str(child.id)


@app.task(name="traced_child", base=Noted)
def traced_child(item: str) -> None:
    """Has a span of its own."""
    call_model()
    with tracer.start_as_current_span("child", attributes={"item": item}):
        call_model()


@app.task(name="spans")
def spans() -> list[dict[str, Any]]:
    """All that ended so far."""
    return [describe(span) for span in exporter.get_finished_spans()]


def describe(span: ReadableSpan) -> dict[str, Any]:
    """What says where it belongs."""
    context = span.get_span_context()
    assert context is not None
    attributes = span.attributes or {}
    return {
        "name": span.name,
        "trace": f"{context.trace_id:032x}",
        "id": f"{context.span_id:016x}",
        "parent": f"{span.parent.span_id:016x}" if span.parent else None,
        "task": attributes.get("messaging.message.id") or attributes.get("messaging.message_id"),
        "item": attributes.get("item"),
        "model": attributes.get("legit_worker.model"),
        "links": [f"{link.context.span_id:016x}" for link in span.links],
        "events": [[event.name, dict(event.attributes or {})] for event in span.events],
    }


@app.task(name="goes_wrong", bind=True, base=Noted)
def goes_wrong(self: Noted, item: str, path: str) -> None:
    """Tells Sentry something before it is parked and after that, and fails."""
    sentry_sdk.set_tag("item", item)
    sentry_sdk.set_user({"id": item})
    sentry_sdk.add_breadcrumb(category="own", message=f"{item} before")
    wait_for_file(self, path)
    sentry_sdk.add_breadcrumb(category="own", message=f"{item} after")
    raise ValueError(item)


@app.task(name="sentry_events")
def sentry_events() -> list[dict[str, Any]]:
    """What Sentry was told."""
    return [
        {
            "error": event["exception"]["values"][-1]["value"],
            "tags": event.get("tags"),
            "user": event.get("user"),
            "breadcrumbs": [
                crumb["message"] for crumb in event["breadcrumbs"]["values"] if crumb.get("category") == "own"
            ],
        }
        for event in events
    ]


@app.task(name="logs", bind=True, base=Noted)
def logs(self: Noted, item: str, path: str) -> None:
    """Binds its item once, and logs before it is parked and after that."""
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(item=item)
    structlog.get_logger().info("before", own=item)
    with structlog.contextvars.bound_contextvars(step=item):
        wait_for_file(self, path)
        structlog.get_logger().info("within", own=item)
    structlog.get_logger().info("after", own=item)


@app.task(name="lines")
def log_lines() -> list[dict[str, Any]]:
    """What structlog was told."""
    return lines
