"""What was found by hurting workers, or by looking at them in company, and stands in no other file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import celery.backends.redis
import pytest
import redis
from celery import chord
from harness import SIMULATED, Broker, Client, Sides, StartWorker, Worker, poll
from ownserver import Server

#: A model that takes a tenth of a second for each item, however many there are.
TENTH = {"LEGIT_WORKER_MODELS__TENTH__KIND": "simulated", "LEGIT_WORKER_MODELS__TENTH__PATH": "0,0.1"}

#: Tasks of a tenth of a second each.
TASKS = 200

#: Seconds between two tasks that come one by one.
APART = 0.02

#: The part of all tasks that each of two workers must get. A half is ideal.
PART = 0.4


def done(worker: Worker) -> int:
    """Tasks that this worker has finished."""
    return worker.log.count(" succeeded in ")


def send(client: Client, number: int) -> Any:
    return client.send_task("one", [f"text{number}"], {"alias": "tenth"})


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
    workers = [sides.worker("modelpool", broker=broker, **TENTH) for _ in range(2)]
    for worker in workers:  # warm: each knows its model, and what it takes
        warm = [worker.client.send_task("one", ["warm"], {"alias": "tenth"}) for _ in range(10)]
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


@pytest.mark.skipif(
    not hasattr(celery.backends.redis, "CHORD_CLEANUP_LUA"), reason="before Celery 5.7, nobody claims a chord's body"
)
def test_a_chord_whose_body_a_dead_worker_was_about_to_send_goes_on(sides: Sides, broker: Broker) -> None:
    """The worker has claimed the body, and was killed. The part that it had comes again, before the claim ends."""
    if not broker.url.startswith("redis"):
        pytest.skip("looks at the messages in Redis")
    client = broker.client()
    parts = [client.signature("no_model", (number,)) for number in range(2)]
    result = chord(parts, app=client)(client.signature("collect", ("text",)))
    with redis.Redis.from_url(broker.url) as on_broker, redis.Redis.from_url(broker.backend) as on_backend:
        messages = [json.loads(on_broker.rpop(broker.queue)) for _ in parts]
        for message in messages:
            message["properties"]["delivery_info"]["redelivered"] = True
            on_broker.lpush(broker.queue, json.dumps(message))
        group = messages[0]["headers"]["group"]
        on_backend.set(f"celery-taskset-meta-{group}.c", "a dead worker's", ex=5)
    worker = sides.worker("modelpool", broker=broker)
    assert worker.answer(result)[:2] == [1, 2]
    poll(lambda: done(worker) == len(parts) + 1, "the last line of the log")
    assert worker.log.count("Task collect") == 2, "it came once, and succeeded once"
