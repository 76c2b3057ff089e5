"""Tasks that are acked before they run: a kill loses few of them, the log says so, and no other task waits for them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from harness import LATE, SIMULATED, StartWorker, Worker, poll

#: Tasks that are acked early and may run at once, as `legit_worker.pool.pool` has it.
BOUND = 32

TASKS = 100

CUSTOM_POOL = {"CELERY_CUSTOM_WORKER_POOL": "legit_worker.pool:ModelPool", "PROJECT_INSTALL": "0"}

MODELS = {
    "LEGIT_WORKER_MODELS__LENGTHY__KIND": "limited:Lengthy",
    "LEGIT_WORKER_MODELS__NEVER__KIND": "simulated",
    "LEGIT_WORKER_MODELS__NEVER__PATH": "0,0,0,600",
}


def start(start_worker: StartWorker, tmp_path: Path, project: str = "limited", **options: Any) -> Worker:
    ours = {
        "LEGIT_WORKER_ENABLED": "1",
        "LEGIT_WORKER_DEVICE": "cpu",
        "LEGIT_WORKER_MAX_HELD_SECONDS": "1000",
        "PROJECT_JOURNAL": str(tmp_path / "journal"),
    }
    environment = SIMULATED | LATE | MODELS | ours | options.pop("environment", {})
    return start_worker(project, environment=environment, **options)


def send(worker: Worker, count: int, task: str, alias: str) -> list[Any]:
    return [worker.send(task, f"{task} {number}", alias) for number in range(count)]


def test_a_kill_loses_no_more_tasks_than_the_log_says(start_worker: StartWorker, servers: Any, tmp_path: Path) -> None:
    broker, chosen = servers.fresh(redelivery_seconds=1), {"PROJECT_ACKS_LATE": "0"}
    first = start(start_worker, tmp_path, broker=broker, environment=chosen)
    assert f"up to {BOUND}, and nobody is told" in first.log
    results = send(first, TASKS, "in_a_model_call", "never")
    poll(lambda: len(first.received) == TASKS, "all tasks to come")
    poll(lambda: first.pool()["parked"] == BOUND, "as many as may to start")
    first.kill()
    second = start(start_worker, tmp_path, broker=broker, environment=chosen | {"LEGIT_WORKER_MODELS__NEVER__PATH": ""})
    poll(lambda: sum(result.ready() for result in results) == TASKS - BOUND, "those that had not started")
    assert second.ask("in_its_own_code", "text", 0) == "text"


def test_tasks_that_are_acked_early_wait_for_each_other_and_hold_up_no_others(
    start_worker: StartWorker, tmp_path: Path
) -> None:
    worker = start(start_worker, tmp_path)
    early = send(worker, BOUND + 20, "acked_early", "never")
    poll(lambda: len(worker.received) == len(early), "all tasks to come")
    others = send(worker, BOUND + 20, "in_a_model_call", "sim")
    assert all(len(answer) == 8 for answer in worker.answers(others))
    assert worker.pool()["in_flight"] == BOUND
    started = [result for result in early if result.state == "STARTED"]
    worker.client.control.revoke([result.id for result in started[:5]], terminate=True)
    poll(lambda: sum(result.state == "REVOKED" for result in early) == 5, "some to end")
    poll(lambda: worker.pool()["in_flight"] == BOUND, "the next to take their place")


def test_a_task_that_is_acked_late_does_not_count_where_the_project_acks_early(
    start_worker: StartWorker, tmp_path: Path
) -> None:
    worker = start(start_worker, tmp_path, environment={"PROJECT_ACKS_LATE": "0"})
    results = send(worker, BOUND + 20, "acked_late", "never")
    poll(lambda: len(worker.received) == len(results), "all tasks to come")
    poll(lambda: worker.pool()["in_flight"] == BOUND + 20, "all of them to start")


@pytest.mark.parametrize(
    ("project", "pool", "environment", "expected"),
    [
        pytest.param("project", "solo", {}, 0, id="all late"),
        pytest.param("project", "solo", {"PROJECT_ACKS_LATE": "0"}, 1, id="the project's choice"),
        pytest.param("limited", "solo", {}, 1, id="one task's choice"),
        pytest.param("project", "custom", CUSTOM_POOL, 1, id="a custom pool without install"),
        pytest.param("project", "custom", CUSTOM_POOL | {"PROJECT_ACKS_LATE": "1"}, 0, id="a custom pool, all late"),
    ],
)
def test_a_worker_says_once_at_its_start_what_a_kill_would_lose(
    start_worker: StartWorker, tmp_path: Path, project: str, pool: str, environment: dict[str, str], expected: int
) -> None:
    worker = start(start_worker, tmp_path, project, pool=f"--pool={pool}", environment=environment)
    assert worker.ask("no_model", 1) == 2
    warnings = re.findall(r"WARNING.*acked before they run \((.*): (\d+) in all\).*acks_late=True", worker.log)
    assert len(warnings) == expected
    if project == "limited":
        assert warnings == [("acked_early", "1")]
