"""An app's tasks in flight and its rate: what is over them waits in the worker, and holds up no other app."""

from __future__ import annotations

from typing import Any

import pytest
from celery.result import AsyncResult
from harness import CUSTOM, LATE, SIMULATED, StartWorker, Worker, poll

#: The slow app's tasks: more than it may have at once.
TASKS = 8


@pytest.fixture(scope="module")
def gated(start_module_worker: StartWorker) -> Worker:
    """A worker for three apps, two of which have limits."""
    limits = {
        "LEGIT_WORKER_ENABLED": "1",
        "LEGIT_WORKER_APPS__FREE__WEIGHT": "1",
        "LEGIT_WORKER_APPS__SLOW__MAX_IN_FLIGHT": "2",
        "LEGIT_WORKER_APPS__RARE__RATE": "1/h",
    }
    return start_module_worker("project", environment=SIMULATED | CUSTOM | LATE | limits)


def send(worker: Worker, app: str, task: str, *args: Any) -> AsyncResult[Any]:
    return worker.client.send_task(task, args, headers={"app": app})


def test_tasks_over_the_number_in_flight_wait_and_others_pass(gated: Worker) -> None:
    slow = [send(gated, "slow", "encode", ["a"], "late") for _ in range(TASKS)]
    free = [send(gated, "free", "no_model", number) for number in range(TASKS)]
    assert gated.answers(free) == [number + 1 for number in range(TASKS)]
    limits = gated.pool()["limits"]["slow"]
    if not slow[0].ready():  # the model is not loaded yet
        assert limits == {"in_flight": 2, "max_in_flight": 2, "rate": None, "waiting": TASKS - 2}
    answers = gated.answers(slow)
    assert all(isinstance(answer, dict) for answer in answers), answers
    poll(lambda: gated.pool()["limits"]["slow"]["in_flight"] == 0, "the end of all")


def test_a_task_that_expires_while_it_waits_does_not_run(gated: Worker) -> None:
    slow = [send(gated, "slow", "many", 10_000, "sluggish") for _ in range(2)]
    short = gated.client.send_task("no_model", [1], headers={"app": "slow"}, expires=1)
    gated.answers(slow)
    assert poll(lambda: short.ready() and short.state, "the end of what expired") == "REVOKED"
    assert "TaskRevokedError('expired')" in repr(short.result)


def test_a_task_that_is_revoked_while_it_waits_does_not_run(gated: Worker) -> None:
    slow = [send(gated, "slow", "many", 10_000, "sluggish") for _ in range(2)]
    waiting, kept = [send(gated, "slow", "no_model", number) for number in range(2)]
    poll(lambda: gated.pool()["limits"]["slow"]["waiting"] == 2, "two to wait")
    gated.client.control.revoke(waiting.id, destination=[gated.name], reply=True, timeout=10)
    gated.answers([*slow, kept])
    gated.wait_for_log(f"Discarding revoked task: no_model[{waiting.id}]")
    assert waiting.state == "REVOKED"


def test_tasks_over_the_rate_wait_and_others_pass(gated: Worker) -> None:
    rare = [send(gated, "rare", "no_model", number) for number in range(3)]
    free = [send(gated, "free", "no_model", number) for number in range(TASKS)]
    assert gated.answers([rare[0], *free]) == [1, *(number + 1 for number in range(TASKS))]
    limits = poll(lambda: gated.pool()["limits"]["rare"]["in_flight"] == 0 and gated.pool()["limits"], "its end")[
        "rare"
    ]
    assert limits == {"in_flight": 0, "max_in_flight": None, "rate": "1/h", "waiting": 2}
    assert not any(result.ready() for result in rare[1:])
    assert gated.stop() == 0  # what waits goes back
