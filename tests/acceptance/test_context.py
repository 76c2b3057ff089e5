"""What watches tasks by their context keeps them apart: OpenTelemetry, Sentry and structlog, unchanged, on both sides.

Fifty tasks are parked at once, each with a span, a scope or a binding of its own, and go on in whatever order.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import pytest
from celery.result import AsyncResult
from harness import SIDES, StartWorker, poll
from journal import Life, begin_life

#: Tasks at once.
TASKS = 50

ITEMS = [f"item {number}" for number in range(TASKS)]


@pytest.fixture(scope="module", params=SIDES)
def life(
    request: pytest.FixtureRequest, start_module_worker: StartWorker, tmp_path_factory: pytest.TempPathFactory
) -> Life:
    """A worker under stock Celery and then one under ModelPool."""
    return begin_life(start_module_worker, tmp_path_factory.mktemp("observed"), request.param, project="observed")


def park_together(life: Life, results: list[AsyncResult[Any]], gate: Path) -> None:
    """Let all go on at once, when all that can be parked at once are: under stock solo, that is one."""
    together = {result.id for result in results[: TASKS if life.side == "modelpool" else 1]}
    poll(lambda: together <= set(life.journal.happened("waits")), "all tasks to be parked")
    assert not any(result.ready() for result in results)
    gate.touch()
    life.worker.settle(results)


def test_each_tasks_spans_are_in_its_own_trace_below_their_parents(life: Life, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    origins = [(secrets.token_hex(16), secrets.token_hex(8)) for _ in ITEMS]
    results = [
        life.send("traced", item, str(gate), headers={"traceparent": f"00-{trace}-{span}-01"})
        for item, (trace, span) in zip(ITEMS, origins, strict=True)
    ]
    park_together(life, results, gate)
    children = [AsyncResult(result.result, app=life.worker.client) for result in results]
    for child in children:
        life.end(child)
    spans = life.ask("spans")
    for item, (trace, origin), task, child in zip(ITEMS, origins, results, children, strict=True):
        own = {span["name"]: span for span in spans if span["item"] == item or span["task"] in (task.id, child.id)}
        assert {span["trace"] for span in own.values()} == {trace}
        parents = {"run/traced": origin} | {
            name: own[parent]["id"]
            for name, parent in (
                ("before", "run/traced"),
                ("after", "run/traced"),
                ("apply_async/traced_child", "after"),
                ("run/traced_child", "apply_async/traced_child"),
                ("child", "run/traced_child"),
            )
        }
        assert {name: span["parent"] for name, span in own.items()} == parents


def test_an_error_is_reported_with_its_own_tasks_tags_and_breadcrumbs_only(life: Life, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    results = [life.send("goes_wrong", item, str(gate)) for item in ITEMS]
    park_together(life, results, gate)
    events = {event["error"]: event for event in life.ask("sentry_events")}
    assert events.keys() == set(ITEMS)
    for item, result in zip(ITEMS, results, strict=True):
        event = events[item]
        assert event["tags"] == {"item": item, "celery_task_id": result.id}
        assert event["user"] == {"id": item}
        assert event["breadcrumbs"] == [f"{item} before", f"{item} after"]


def test_log_lines_have_the_bindings_of_their_own_task(life: Life, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    results = [life.send("logs", item, str(gate)) for item in ITEMS]
    park_together(life, results, gate)
    lines = life.ask("lines")
    expected = [{"event": event, "own": item, "item": item} for item in ITEMS for event in ("before", "after")]
    expected += [{"event": "within", "own": item, "item": item, "step": item} for item in ITEMS]
    assert sorted(map(str, map(sorted, map(dict.items, lines)))) == sorted(
        map(str, map(sorted, map(dict.items, expected)))
    )
