"""Options of `celery worker` that are made for pools of processes: taken under ModelPool as under stock solo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import celery
import pytest
from harness import SIDES, StartWorker, poll
from journal import begin_both

#: More than one child would be allowed.
TASKS = 5

#: Twice a second, without anybody's asking.
SCHEDULE = {"tick": {"task": "runs_at", "schedule": 0.5}}

OPTIONS = [
    ["--max-tasks-per-child=1"],
    ["--max-memory-per-child=1"],
    ["--autoscale=4,1"],
    ["-c", "3"],
    ["-O", "fair"],
    ["-B"],
]


@pytest.mark.parametrize("arguments", OPTIONS, ids=" ".join)
def test_an_option_for_pools_of_processes_is_taken_and_changes_nothing(
    start_worker: StartWorker, tmp_path: Path, arguments: list[str]
) -> None:
    lives = begin_both(start_worker, tmp_path, *arguments, conf={"beat_schedule": SCHEDULE})
    for side in SIDES:
        worker = lives[side].worker
        assert worker.answers([worker.send("no_model", number) for number in range(TASKS)]) == list(range(1, TASKS + 1))
        assert worker.pool()["max-concurrency"] == {"stock": 1, "modelpool": 1024}[side]
        if arguments == ["-B"]:
            poll(lambda worker=worker: "Task runs_at[" in worker.log, "what beat sends")
        assert worker.stop() == 0
        assert "Traceback" not in worker.log


@pytest.mark.skipif(celery.__version__ < "5.6", reason="the setting is Celery 5.6's")
def test_no_more_tasks_are_held_for_later_than_the_project_allows(start_worker: StartWorker, tmp_path: Path) -> None:
    """Nor is any other fetched meanwhile, as under stock solo."""
    lives = begin_both(start_worker, tmp_path, conf={"worker_eta_task_limit": 5})
    for side in SIDES:
        worker = lives[side].worker
        for number in range(20):
            worker.client.send_task("no_model", [number], countdown=3600)
        poll(lambda worker=worker: len(worker.received) >= 5, "as many as it may hold")
        later = worker.send("no_model", 1)
        assert worker.stats()["prefetch_count"] == 5
        held = len(worker.inspect().scheduled()[worker.name])
        assert held == len(worker.received)
        # Stock is handed one or two more now and then: it raises its count while RabbitMQ sends.
        assert held == 5 or (side == "stock" and held < 20)
        assert not later.ready()
        assert worker.stop() == 0


@pytest.mark.skipif(celery.__version__ < "5.6", reason="the option is Celery 5.6's")
def test_without_prefetch_a_worker_holds_the_task_that_it_runs(start_worker: StartWorker, tmp_path: Path) -> None:
    lives = begin_both(start_worker, tmp_path, "--disable-prefetch")
    if not lives["stock"].worker.broker.url.startswith("redis"):
        pytest.skip("Celery has it for Redis only")
    for side in SIDES:
        worker = lives[side].worker
        results = [worker.send("sleeps", 0.1) for _ in range(10)]
        client = worker.client.connection_for_read().default_channel.client
        held = []

        def watch(results: list[Any] = results, held: list[int] = held, client: Any = client) -> bool:
            held.append(client.hlen("unacked"))
            return all(result.ready() for result in results)

        poll(watch, "all answers")
        assert max(held) == 1
        assert ("and computes no two together" in worker.log) == (side == "modelpool")
        assert worker.stop() == 0
