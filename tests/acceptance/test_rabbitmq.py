"""RabbitMQ gives messages again: after a lost connection, a timeout of its own, and a crash.

Tasks that have begun go on when their connection breaks, and their messages come again. They must not run twice.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import kombu.pools
import pytest
from celery.result import AsyncResult
from harness import GREEDY, Broker, Sides, StartWorker, Worker, poll
from ownserver import RabbitServer, Server

from legit_worker.errors import PoisonedMessageError

TASKS = 300


def fresh_client(worker: Worker) -> None:
    """The client's connections may be gone with the worker's."""
    kombu.pools.reset()
    worker.renew_client()


def runs(worker: Worker) -> Counter[str]:
    """How often each item was computed."""
    return Counter(re.findall(r"(text \d+) was computed$", worker.log, re.MULTILINE))


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_parked_tasks_run_once_through_three_lost_connections(
    start_worker: StartWorker,
    rabbit: RabbitServer,
    server: Server,
    tmp_path: Path,
    queue_type: str,
) -> None:
    broker = Broker(url=rabbit.url, backend=server.url, queue=f"parked-{queue_type}", queue_type=queue_type)
    gate = tmp_path / "gate"
    settings = GREEDY | {"LEGIT_WORKER_WINDOW": str(TASKS), "PROJECT_GATE": str(gate)}
    worker = Sides(start_worker, "controlled").worker("modelpool", broker=broker, **settings)
    results = [worker.send("tidies", f"text {number}", "gated") for number in range(TASKS)]
    poll(lambda: worker.pool()["parked"] == TASKS, "all of them to park")
    for number in range(3):
        rabbit.close_connections()
        worker.wait_for_log("Connection to broker lost")
        fresh_client(worker)
        poll(lambda: worker.pool()["adopted"] == TASKS * (number + 1), "all messages to come again")  # noqa: B023
    assert len(worker.inspect().active()[worker.name]) == TASKS
    gate.touch()
    results = [worker.client.AsyncResult(result.id) for result in results]
    assert worker.answers(results) == [f"TEXT {number}" for number in range(TASKS)]
    assert runs(worker) == Counter(f"text {number}" for number in range(TASKS))
    poll(lambda: worker.inspect().active() == {worker.name: []}, "the last one to be acked")
    assert worker.stop() == 0
    with kombu.Connection(rabbit.url) as connection:
        assert connection.default_channel.queue_declare(broker.queue, passive=True).message_count == 0


def test_a_worker_outlives_rabbitmqs_own_timeout(
    start_worker: StartWorker, rabbit: RabbitServer, server: Server, tmp_path: Path
) -> None:
    """RabbitMQ closes the channel of a consumer that acks too late (`consumer_timeout`): no end of a worker."""
    broker = Broker(url=rabbit.url, backend=server.url, queue="late")
    gate = tmp_path / "gate"
    with rabbit.timing_out_after(2):
        worker = Sides(start_worker, "controlled").worker("modelpool", broker=broker, PROJECT_GATE=str(gate))
        results = [worker.send("tidies", f"text {number}", "gated") for number in range(20)]
        worker.wait_for_log("delivery acknowledgement on channel")
        poll(lambda: worker.pool()["adopted"] >= 20, "their messages to come again")
        gate.touch()
        assert worker.answers(results) == [f"TEXT {number}" for number in range(20)]
    assert runs(worker) == Counter(f"text {number}" for number in range(20))
    assert worker.log.count(f"{worker.name} ready.") == 1
    assert worker.stop() == 0


# Messages of which workers die, and of which they do not.

GOOD = 40


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_what_a_worker_gives_back_at_its_end_does_not_run_alone_elsewhere(
    start_worker: StartWorker, rabbitmq: Broker, queue_type: str, tmp_path: Path
) -> None:
    broker, gate = dataclasses.replace(rabbitmq, queue_type=queue_type), tmp_path / "gate"
    sides, settings = Sides(start_worker, "controlled"), {"PROJECT_GATE": str(gate)}
    ends = sides.worker("modelpool", broker=broker, **settings)
    results = [ends.send("tidies", f"text {number}", "gated") for number in range(GOOD // 2)]
    poll(lambda: ends.pool()["parked"] == len(results), "all of them to park")
    stays = sides.worker("modelpool", broker=broker, **settings)
    ends.signal(signal.SIGQUIT)
    ends.wait()
    poll(lambda: stays.pool()["parked"] == len(results), "the other worker to have them all at once")
    gate.touch()
    assert stays.answers(results) == [f"TEXT {number}" for number in range(len(results))]


def outlive(
    start_worker: StartWorker, broker: Broker, results: list[AsyncResult[Any]], **settings: str
) -> tuple[Worker, list[str]]:
    """Start a worker, and another one whenever it dies, until all is done. Returns the last one, and all logs."""
    logs: list[str] = []
    while True:
        worker = Sides(start_worker, "held").worker("modelpool", broker=broker, **settings)
        poll(lambda: has_died(worker) or all_ready(results), "the worker to die, or to have done all")  # noqa: B023
        logs.append(worker.log)
        if not has_died(worker):
            return worker, logs


def all_ready(results: list[AsyncResult[Any]]) -> bool:
    """Whether all are answered."""
    return all(result.ready() for result in results)


def has_died(worker: Worker) -> bool:
    """Whether its task has ended it."""
    try:
        os.kill(worker.pid, 0)
        return Path(f"/proc/{worker.pid}/stat").read_text().split()[2] == "Z"
    except ProcessLookupError:
        return True


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_a_task_that_kills_its_workers_is_dead_in_the_end_and_no_other_is(
    start_worker: StartWorker, rabbit: RabbitServer, server: Server, queue_type: str
) -> None:
    broker = Broker(url=rabbit.url, backend=server.url, queue=f"deadly-{queue_type}", queue_type=queue_type)
    client = broker.client()
    good = [client.send_task("parks", [f"good {number}"]) for number in range(GOOD // 2)]
    deadly = client.send_task("dies", ["deadly"])
    good += [client.send_task("parks", [f"good {number}"]) for number in range(GOOD // 2, GOOD)]
    worker, logs = outlive(start_worker, broker, [*good, deadly], LEGIT_WORKER_MAX_DELIVERIES="3")
    assert worker.answers(good) == [f"good {number}" for number in range(GOOD)]
    assert [log.count("deadly begins") for log in logs] == [1] * (len(logs) - 1) + [0]
    assert len(logs) == 4
    with pytest.raises(PoisonedMessageError, match="3 times"):
        worker.answer(deadly)
    with kombu.Connection(rabbit.url) as connection:
        record = connection.SimpleQueue("legit.dead").get(timeout=5)
        record.ack()
        assert (record.payload["id"], record.payload["deliveries"]) == (deadly.id, 3)
        assert connection.default_channel.queue_declare(broker.queue, passive=True).message_count == 0


def test_a_queues_own_delivery_limit_drops_the_deadly_message_and_no_other(
    start_worker: StartWorker, rabbit: RabbitServer, server: Server
) -> None:
    """A quorum queue with a limit of 3 counts all that a dead worker had; 14 of 60 were dropped with it."""
    arguments = {"x-delivery-limit": 3}
    broker = Broker(url=rabbit.url, backend=server.url, queue="limited", queue_type="quorum", queue_arguments=arguments)
    client = broker.client()
    good = [client.send_task("parks", [f"good {number}"]) for number in range(GOOD // 2)]
    client.send_task("dies", ["deadly"])
    good += [client.send_task("parks", [f"good {number}"]) for number in range(GOOD // 2, GOOD)]
    worker, _ = outlive(start_worker, broker, good)
    assert worker.answers(good) == [f"good {number}" for number in range(GOOD)]
