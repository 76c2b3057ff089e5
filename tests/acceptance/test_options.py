"""Options of `celery worker` that are made for pools of processes: taken under ModelPool as under stock solo."""

from __future__ import annotations

from pathlib import Path

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
