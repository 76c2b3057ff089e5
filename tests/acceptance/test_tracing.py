"""Traces: one span for each batch, linked to the spans of its tasks, and the task's span in its envelope."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import pytest
from appqueues import app_queue, routed
from harness import StartWorker, Worker, poll
from journal import Life, begin_life

#: Tasks whose calls are computed together.
TASKS = 5


@pytest.fixture(scope="module")
def life(start_module_worker: StartWorker, servers: Any, tmp_path_factory: pytest.TempPathFactory) -> Life:
    """A worker whose project has OpenTelemetry, and an app that gets results."""
    broker = servers.fresh()
    return begin_life(
        start_module_worker,
        tmp_path_factory.mktemp("traced"),
        "modelpool",
        project="observed",
        broker=broker,
        **routed(broker, "vod"),
    )


def sent_together(life: Life, gate: Path, **headers: str) -> tuple[list[str], list[dict[str, Any]]]:
    """Ids of tasks that called a model together, and all spans."""
    results = [life.send("traced", f"item {number}", str(gate), headers=headers) for number in range(TASKS)]
    together = {result.id for result in results}
    poll(lambda: together <= set(life.journal.happened("waits")), "all tasks to be parked")
    gate.touch()
    children = life.worker.answers(results)
    for child in children:
        life.worker.answer(life.worker.client.AsyncResult(child))
    return [result.id for result in results], life.ask("spans")


def test_a_batch_has_a_span_with_links_to_its_tasks_spans(life: Life, tmp_path: Path) -> None:
    ids, spans = sent_together(life, tmp_path / "gate")
    batches = [span for span in spans if span["name"] == "legit_worker.batch"]
    assert batches
    assert all(span["model"] == "sim" and span["parent"] is None for span in batches)
    linked = {link for span in batches for link in span["links"]}
    assert max(len(span["links"]) for span in batches) > 1
    callers = [span for span in spans if span["name"] == "after"]
    assert len(callers) == TASKS
    for span in callers:
        assert span["id"] in linked
        name, attributes = span["events"][0]
        assert name == "legit_worker.waited"
        assert attributes["legit_worker.model"] == "sim"
        assert attributes["legit_worker.wait_seconds"] >= 0
    assert {span["task"] for span in spans if span["name"] == "run/traced"} == set(ids)


def test_an_envelope_names_its_tasks_span(life: Life, tmp_path: Path) -> None:
    trace = secrets.token_hex(16)
    ids, spans = sent_together(life, tmp_path / "gate", app="vod", traceparent=f"00-{trace}-{secrets.token_hex(8)}-01")
    queue = app_queue(life.worker.broker, "vod")
    queue.wait_for(ids)
    envelopes = {one["id"]: one for one in queue.seen}
    own = {span["task"]: span for span in spans if span["name"] == "run/traced"}
    for task_id in ids:
        assert envelopes[task_id]["traceparent"] == f"00-{trace}-{own[task_id]['id']}-01"


def test_without_opentelemetry_the_messages_own_word_counts(start_worker: StartWorker, servers: Any) -> None:
    broker = servers.fresh()
    settings = {"LEGIT_WORKER_ENABLED": "1"} | routed(broker, "vod")
    worker: Worker = start_worker("routed", broker=broker, environment=settings)
    good = f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00"
    sent = [
        worker.client.send_task("fails", headers={"app": "vod", "traceparent": one})
        for one in (good, "x", f"00-{'0' * 32}-{'1' * 16}-00")
    ]
    worker.settle(sent)
    queue = app_queue(broker, "vod")
    queue.wait_for(one.id for one in sent)
    found = {one["id"]: one for one in queue.seen}
    assert [found[one.id]["traceparent"] for one in sent] == [good, None, None]
