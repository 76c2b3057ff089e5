"""OpenTelemetry code that raises: a project's sampler, or its span processor."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from legit_worker import tracing


def fails(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("a processor of the project")


@pytest.fixture(autouse=True)
def api(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", SimpleNamespace(get_current_span=fails))  # type: ignore[arg-type]


def test_a_trace_lacks_what_failed_and_nothing_is_raised(caplog: pytest.LogCaptureFixture) -> None:
    span: Any = SimpleNamespace(add_event=fails, end=fails, set_attribute=fails)
    assert tracing.asker() is None
    assert tracing.traceparent() is None
    assert tracing.batch_span("minilm", 1, [tracing.Asker(span, 0)]) is None
    batch = object.__new__(tracing.BatchSpan)
    batch._span = span
    batch.end(0.1)
    assert caplog.text.count("a trace lacks something") == 4
