"""What a worker keeps of tasks that are over: nothing, whatever they named and however they ended."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from celery.result import AsyncResult
from harness import SIMULATED, StartWorker, Worker, poll

#: Tasks of each kind in one round: two rounds name more unknown apps than the worker tells of in its log.
TASKS = 100

#: Rounds before anything is counted, and those that count: a list with a bound may fill in one of them, not in all.
WARM_ROUNDS, ROUNDS = 2, 3

#: Times that blocks are counted after a round.
LOOKS = 5

#: App `alpha` has its results routed, also to queues that its tasks name; Celery's own lists are full after one round.
ENVIRONMENT = SIMULATED | {
    "LEGIT_WORKER_ENABLED": "1",
    "LEGIT_WORKER_APP_FROM": "header:app,reply_to",
    "LEGIT_WORKER_APPS__ALPHA__RESULT_ROUTING": "1",
    "LEGIT_WORKER_APPS__ALPHA__REPLY_TO_PREFIX": "answers.",
    "CELERY_WORKER_SUCCESSFUL_MAX": "10",
    "CELERY_WORKER_REVOKES_MAX": "10",
}


def send(worker: Worker, number: int) -> list[AsyncResult[Any]]:
    """One task of each kind, that names what no other has named."""
    own = {"headers": {"app": "alpha"}}
    task = worker.client.send_task
    return [
        task("one", [number], **own),
        task("one", [number], headers={"app": f"unknown-{number}"}),
        task("double", [number], reply_to=f"answers.{number}"),
        task("one", [number], {"alias": f"unknown{number}"}),
        task("raises_before", [f"text {number}"]),
        task("fails", [], {"message": f"error {number}"}, **own),
        task("again", **own),
        task("two_models", [f"text {number}"]),
        task("exclusive_pair", [f"text {number}"]),
        task("calls_another", [f"text {number}"]),
        *([task("many", [300])] if number % 5 == 0 else []),
        *([task("blocks")] if number % 20 == 10 else []),  # Python's collector, while tasks are parked
    ]


def least_blocks(worker: Worker) -> int:
    """Of a few looks: what the last tasks had goes within some turns of the worker's loop."""
    return min(worker.ask("blocks") for _ in range(LOOKS))


def test_nothing_is_kept_of_tasks_that_are_over(start_worker: StartWorker) -> None:
    worker = start_worker("remembers", environment=ENVIRONMENT)
    seen = []
    for start in range(0, (WARM_ROUNDS + ROUNDS) * TASKS, TASKS):
        worker.settle([result for number in range(start, start + TASKS) for result in send(worker, number)])
        seen.append(least_blocks(worker))
    counted = seen[WARM_ROUNDS - 1 :]
    # A single thing that each task of one kind left behind would be so many blocks in each round, or more.
    assert min(after - before for before, after in pairwise(counted)) < TASKS, seen


@pytest.mark.parametrize("limits", [{}, {"soft_time_limit": 3600, "time_limit": 7200}], ids=["no limits", "limits"])
def test_a_tasks_payload_is_gone_at_its_end_without_the_collector(
    start_worker: StartWorker, limits: dict[str, int]
) -> None:
    worker = start_worker("remembers", environment=ENVIRONMENT)
    worker.settle([worker.client.send_task("noted", [f"text {number}"], **limits) for number in range(50)])
    poll(lambda: worker.ask("requests_left") == 0, "the last of them to go")
