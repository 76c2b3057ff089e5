"""The watchdog: a task that keeps all others from going on is named, with the cause and the way out; no other is."""

from __future__ import annotations

import re
from typing import Any

import pytest
from harness import LATE, SIDES, SIMULATED, StartWorker, Worker, poll

#: More than there are connections, or locks.
TASKS = 50

#: One that loads, and one that computes, for longer than a task may keep the main thread.
MODELS = (
    SIMULATED
    | LATE
    | {
        "LEGIT_WORKER_DEVICE": "cpu",
        "LEGIT_WORKER_MODELS__LENGTHY__KIND": "pooled:Lengthy",
    }
)

#: Seconds after which a task is told of, and those for which it waits for a connection or a lock. The watchdog looks
#: once a second.
STALL, PATIENCE = 0.5, 4.0

WARNING = "has held the main thread"


def start(start_worker: StartWorker, side: str = "modelpool", **settings: str) -> Worker:
    ours = {"LEGIT_WORKER_STALL_SECONDS": str(STALL), "PROJECT_POOL_SECONDS": str(PATIENCE)}
    return start_worker("pooled", environment=SIDES[side] | MODELS | ours | settings)


@pytest.fixture(scope="module")
def watched(start_module_worker: StartWorker) -> Worker:
    """A worker with an impatient watchdog."""
    return start(start_module_worker)


def send(worker: Worker, task: str, count: int = TASKS) -> list[Any]:
    return [worker.send(task, number) for number in range(count)]


@pytest.mark.parametrize(
    ("side", "task", "window"),
    [
        pytest.param("stock", "holds_a_connection", "1024", id="stock solo"),
        pytest.param("modelpool", "holds_a_connection", "1024", id="connections that SQLAlchemy gives"),
        pytest.param("modelpool", "holds_one_alone", "1024", id="exclusive"),
        pytest.param("modelpool", "holds_a_lock", "2", id="a window no larger than there are locks"),
    ],
)
def test_tasks_that_hold_what_there_is_little_of_are_no_stall(
    start_worker: StartWorker, side: str, task: str, window: str
) -> None:
    worker = start(start_worker, side, LEGIT_WORKER_WINDOW=window)
    assert worker.answers(send(worker, task)) == list(range(TASKS))
    assert WARNING not in worker.log


def test_a_stall_is_told_once_with_its_task_its_cause_and_the_way_out(start_worker: StartWorker) -> None:
    worker = start(start_worker)
    worker.send("computes", 1.0)  # or each may end before the next one comes
    send(worker, "holds_a_lock", 8)  # the first failure is stored once all have begun
    poll(lambda: "both locks are taken" in worker.log, "a task's patience to end")
    before = worker.log.partition("both locks are taken")[0]
    stalled = re.findall(rf"(holds_a_lock\[\S+\]) {WARNING} for \d\.\d s, and \d+ parked tasks can't go on", before)
    assert stalled
    assert len(stalled) == len(set(stalled)), "each is told of once"
    failed = re.search(r"Task (holds_a_lock\[\S+\]) raised unexpected: TimeoutError", worker.log)
    assert failed
    assert failed[1] == stalled[0], "whose failure is stored while the next one holds the thread"
    report = before.partition(WARNING)[2]
    for word in ("legit_worker.exclusive()", "LEGIT_WORKER_WINDOW", "BATCHING=off", "before the call"):
        assert word in report
    assert re.search(r'File ".*pooled\.py", line \d+, in holds_a_lock\n +if not locks\.acquire', report)


def test_a_task_whose_own_code_takes_long_is_told_of_while_others_are_parked(watched: Worker) -> None:
    parked = [watched.send("one", f"text {number}", "late") for number in range(3)]
    long = watched.send("computes", 2.5)
    watched.answers([*parked, long])
    assert len(re.findall(rf"computes\[{long.id}\] {WARNING}", watched.log)) == 1


def test_a_task_whose_own_code_takes_long_is_not_told_of_while_it_is_alone(watched: Worker) -> None:
    long = watched.send("computes", 2.5)
    watched.answer(long)
    assert f"computes[{long.id}] {WARNING}" not in watched.log


@pytest.mark.parametrize("task", ["one", "alone"])
def test_long_batches_and_loads_are_no_stall(start_worker: StartWorker, task: str) -> None:
    """Nor are they in an exclusive section, where they hold up all others."""
    worker = start(start_worker)
    parked = [worker.send("one", f"text {number}", "late") for number in range(3)]
    served = [worker.send(task, "text", alias) for alias in ("lengthy", "late")]
    worker.settle([*parked, *served])
    assert all(result.successful() for result in served)
    assert WARNING not in worker.log


def test_a_helper_that_takes_long_is_no_stall(start_worker: StartWorker) -> None:
    worker = start(start_worker, LEGIT_WORKER_PREP_PROCESSES="1")
    parked = [worker.send("one", f"text {number}", "late") for number in range(3)]
    worker.answers([*parked, worker.send("helped_alone", 2.5)])
    assert WARNING not in worker.log
