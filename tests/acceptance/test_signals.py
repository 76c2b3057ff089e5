"""Celery's signals, in a table: per task the same ones, as often, in the same order, with the same arguments."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from celery import signals
from celery.utils import uuid
from harness import SIDES, Broker, StartWorker, poll
from journal import Life, begin_both, begin_life

#: How often each task is sent, all at once.
COPIES = 5

BEGINS = ["task_received", "task_prerun"]
SENDS = ["before_task_publish", "after_task_publish"]
AGAIN = [*BEGINS, *SENDS, "task_retry", "task_postrun"]
PASSES = ["task_success", "task_postrun"]

Send = Callable[[Life, str], Any]


def ends(end: str) -> Send:
    """Send the task that comes to this end after two parks."""
    return lambda life, task: life.send("ends", end, 2, task_id=task)


def named(name: str, *args: Any, **options: Any) -> Send:
    """Send this one."""
    return lambda life, task: life.send(name, *args, task_id=task, **options)


#: What is sent, and the signals that are about it, in their order. Where one is about no task, it is counted by itself.
TABLE: dict[str, tuple[Send, list[str]]] = {
    "returns": (ends("returns"), [*BEGINS, *PASSES]),
    "raises": (ends("raises"), [*BEGINS, "task_failure", "task_postrun"]),
    "is retried": (ends("retries_twice"), [*AGAIN, *AGAIN, *BEGINS, *PASSES]),
    "is retried in vain": (ends("retries_in_vain"), [*AGAIN, *BEGINS, "task_failure", "task_postrun"]),
    "is ignored": (ends("ignores"), [*BEGINS, "task_postrun"]),
    "is requeued": (ends("requeues_once"), [*BEGINS, "task_postrun", *BEGINS, *PASSES]),
    "calls no model": (lambda life, task: life.send("ends", "returns", 0, task_id=task), [*BEGINS, *PASSES]),
    "expired": (
        named("ends", "returns", 1, expires=datetime(2020, 1, 1, tzinfo=timezone.utc)),
        ["task_revoked"],
    ),
    "is due later": (named("ends", "returns", 1, countdown=0.2), [*BEGINS, *PASSES]),
    "is unknown": (named("nowhere"), ["task_unknown"]),
    "has a hook that fails": (
        named("fails_clumsily"),
        [*BEGINS, "task_postrun", "task_internal_error", "task_failure"],
    ),
}

#: Those of a worker's life, in their order. `worker_process_shutdown` is none of them: a solo pool has no processes.
WORKERS = [
    "celeryd_init",
    "worker_init",
    "after_setup_logger",
    "after_setup_task_logger",
    "worker_process_init",
    "celeryd_after_setup",
    "worker_ready",
    "worker_shutting_down",
    "worker_shutdown",
]


@pytest.fixture(scope="module")
def lives(start_module_worker: StartWorker, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Life]:
    """A worker on each side."""
    return begin_both(start_module_worker, tmp_path_factory.mktemp("signals"), project="signalled")


def test_each_task_has_the_signals_that_it_has_under_stock_solo(lives: dict[str, Life]) -> None:
    """All are on their way at once. The table says which signals; in their arguments, the sides are compared."""
    heard = {side: signals_of_all(life) for side, life in lives.items()}
    for row, all_of_them in heard["stock"].items():
        assert [[name for name, _ in of_one] for of_one in all_of_them] == [TABLE[row][1]] * COPIES
    assert heard["modelpool"] == heard["stock"]


@pytest.mark.parametrize("side", SIDES)
def test_they_have_them_under_rabbitmq_too(
    start_worker: StartWorker, tmp_path: Path, rabbitmq: Broker, side: str
) -> None:
    life = begin_life(start_worker, tmp_path, side, broker=rabbitmq, project="signalled")
    for row, all_of_them in signals_of_all(life).items():
        assert [[name for name, _ in of_one] for of_one in all_of_them] == [TABLE[row][1]] * COPIES


def test_a_message_that_is_no_task_is_rejected_with_a_signal(lives: dict[str, Life]) -> None:
    heard = {}
    for side, life in lives.items():
        client = life.worker.client
        with client.producer_or_acquire() as producer:
            producer.publish({"not": "a task"}, routing_key=life.worker.broker.queue)
        poll(lambda life=life: "task_rejected" in dict(signals_of(life, None)), "the signal")
        heard[side] = dict(signals_of(life, None))["task_rejected"]
        assert life.ask("ends", "returns", 1)
    assert heard["modelpool"] == heard["stock"]


def test_a_worker_has_its_own_signals_in_their_order(start_worker: StartWorker, tmp_path: Path) -> None:
    heard = {}
    for side, life in begin_both(start_worker, tmp_path, project="signalled").items():
        life.ask("ends", "returns", 1)
        assert life.worker.stop() == 0
        heard[side] = signals_of(life, None)
    assert [name for name, _ in heard["stock"]] == WORKERS
    assert heard["modelpool"] == heard["stock"]


def signals_of_all(life: Life) -> dict[str, list[list[Any]]]:
    """Send all rows of the table, several times, and wait until each has its signals."""
    # A message that expired, RabbitMQ drops by itself.
    rows = TABLE if life.worker.broker.url.startswith("redis") else TABLE.keys() - {"expired"}
    ids = {row: [uuid() for _ in range(COPIES)] for row in rows}
    for number in range(COPIES):
        for row, tasks in ids.items():
            TABLE[row][0](life, tasks[number])
    for row, tasks in ids.items():
        expected = TABLE[row][1]
        for task in tasks:
            poll(partial(has_signals, life, task, expected), f"{row}: {expected}")
    return {row: [signals_of(life, task) for task in tasks] for row, tasks in ids.items()}


def has_signals(life: Life, task: str, expected: list[str]) -> bool:
    return len(signals_of(life, task)) >= len(expected)


def signals_of(life: Life, task: str | None) -> list[Any]:
    """Names and arguments."""
    notes = life.journal.of(task) if task else [rest for of, *rest in life.journal.notes() if of is None]
    return [note for note in notes if note[0] in signals.__all__]
