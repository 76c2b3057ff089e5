"""What was found by hurting workers, or by looking at them in company, and stands in no other file."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
from harness import SIMULATED, Broker, Client, Sides, StartWorker, Worker, poll
from ownserver import Server

#: A model that takes a fifth of a second for each item, however many there are.
FIFTH = {"LEGIT_WORKER_MODELS__FIFTH__KIND": "simulated", "LEGIT_WORKER_MODELS__FIFTH__PATH": "0,0.2"}

#: Tasks of a fifth of a second each.
TASKS = 200

#: Seconds between two tasks that come one by one.
APART = 0.02

#: The part of all tasks that each of two workers must get. A half is ideal.
PART = 0.4


def done(worker: Worker) -> int:
    """Tasks that this worker has finished."""
    return worker.log.count(" succeeded in ")


def send(client: Client, number: int) -> Any:
    return client.send_task("one", [f"text{number}"], {"alias": "fifth"})


def burst(client: Client) -> list[Any]:
    return [send(client, number) for number in range(TASKS)]


def one_by_one(client: Client) -> list[Any]:
    results = []
    for number in range(TASKS):
        results.append(send(client, number))
        time.sleep(APART)  # this is how they come, and nothing waits for it
    return results


@pytest.mark.parametrize("come", [burst, one_by_one])
def test_two_idle_workers_share_what_comes(sides: Sides, broker: Broker, come: Callable[[Client], list[Any]]) -> None:
    workers = [sides.worker("modelpool", broker=broker, **FIFTH) for _ in range(2)]
    for worker in workers:  # warm: each knows its model, and what it takes
        warm = [worker.client.send_task("one", ["warm"], {"alias": "fifth"}) for _ in range(10)]
        worker.settle(warm)
    poll(lambda: sum(map(done, workers)) == 20, "the lines of the first tasks")
    before = [done(worker) for worker in workers]
    assert min(before) > 0, "both are warm"
    workers[0].settle(come(broker.client()))
    poll(lambda: sum(map(done, workers)) == 20 + TASKS, "the last lines of the logs")
    shares = [done(worker) - had for worker, had in zip(workers, before, strict=True)]
    assert min(shares) >= PART * TASKS, shares


def test_a_task_that_can_not_be_sent_again_stays_in_its_queue(
    start_worker: StartWorker, server: Server, broker: Broker, tmp_path: Path
) -> None:
    """Celery rejects it, and it is gone."""
    gate = tmp_path / "gate"
    environment = SIMULATED | {"LEGIT_WORKER_ENABLED": "1"}
    worker = start_worker("counted", broker=replace(broker, url=server.url), environment=environment)
    result = worker.send("again", "task", str(gate))
    poll(lambda: worker.log.count("ran task") > 2, "it to be sent again")
    with redis.Redis.from_url(server.url) as client:
        client.config_set("maxmemory", 1)
        worker.wait_for_log("a task could not be sent again, and goes back to its queue")
        gate.touch()
        client.config_set("maxmemory", 0)
    assert worker.answers([result]) == ["task"]
