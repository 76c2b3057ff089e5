"""The command that people type, with nothing added: mingle, gossip and heartbeats are on, as Celery has them."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import kombu
import pytest
import redis
from flowers import running_flower
from harness import SIDES, Broker, Sides, Worker, poll

#: How many times a worker is killed, and during how many tasks.
KILLS, TASKS = 10, 3000

#: What `inspect stats` says of a worker on Redis that reserves.
RESERVED = "reserved in groups"


def check_redis(broker: Broker) -> None:
    if not broker.url.startswith("redis"):
        pytest.skip("messages are reserved on Redis")


def pops(broker: Broker) -> list[str]:
    """The clients of this test's database that the server keeps waiting as kombu does."""
    with redis.Redis.from_url(broker.url) as server:
        number = broker.url.rpartition("/")[2]
        waiting = [one for one in server.client_list() if one["db"] == number and "b" in one["flags"]]
        return [one["id"] for one in waiting if one["cmd"] == "brpop"]


@pytest.mark.parametrize("flags", [(), ("-E",), ("-E", "--without-mingle", "--without-gossip")], ids=" ".join)
def test_messages_are_reserved_whatever_the_flags(sides: Sides, broker: Broker, flags: tuple[str, ...]) -> None:
    check_redis(broker)
    worker = sides.worker("modelpool", *flags, broker=broker)
    assert worker.ask("no_model", 1) == 2
    assert worker.pool()["messages"] == RESERVED
    poll(lambda: not pops(broker), "no client that waits by BRPOP")
    assert "one at a time" not in worker.log


def test_messages_are_reserved_while_a_worker_is_watched_and_asked(
    sides: Sides, broker: Broker, tmp_path: Path
) -> None:
    check_redis(broker)
    worker = sides.worker("modelpool", "-E", broker=broker)
    with running_flower(broker, tmp_path):
        results = [worker.send("one", f"text {number}", "slow") for number in range(200)]
        while not all(result.ready() for result in results):
            assert worker.pool()["messages"] == RESERVED
        assert worker.answers(results) == [f"TEXT {number}" for number in range(200)]


def test_two_workers_that_meet_at_their_start_both_reserve(sides: Sides, broker: Broker) -> None:
    """Mingle has an answer to wait for here."""
    check_redis(broker)
    workers = [sides.worker("modelpool", broker=broker) for _ in range(2)]
    assert "sync with 1 nodes" in workers[1].log
    for worker in workers:
        assert worker.pool()["messages"] == RESERVED


@pytest.mark.parametrize("side", SIDES)
def test_a_projects_own_consumer_that_does_not_ack_hears_all(sides: Sides, broker: Broker, side: str) -> None:
    worker = replace(sides, project="consuming").worker(side, broker=broker)
    with worker.client.connection_for_write() as connection:
        queue = kombu.Queue(f"{broker.queue}.notes", durable=False)
        producer = connection.Producer(serializer="json")
        for number in range(50):
            producer.publish(number, routing_key=queue.name, declare=[queue])
    results = [worker.send("no_model", number) for number in range(50)]
    assert worker.answers(results) == list(range(1, 51))
    poll(lambda: worker.ask("notes") == list(range(50)), "all notes")
    if side == "modelpool" and broker.url.startswith("redis"):
        assert worker.pool()["messages"] == RESERVED


@pytest.mark.parametrize("side", SIDES)
def test_a_task_that_consumes_waits_for_its_message(sides: Sides, broker: Broker, side: str) -> None:
    worker = replace(sides, project="consuming").worker(side, broker=broker)
    assert worker.ask("consumes", "letters", 0.3) == ["nothing came"]
    result = worker.send("consumes", "letters", 30)
    worker.wait_for_log(result.id)

    def write() -> None:
        with worker.client.connection_for_write() as connection:
            queue = kombu.Queue(f"{broker.queue}.letters", durable=False)
            connection.Producer(serializer="json").publish("dear", routing_key=queue.name, declare=[queue])

    later = threading.Timer(1.5, write)
    later.start()
    assert worker.answer(result) == ["dear"]
    later.join()


def test_ten_kills_in_three_thousand_tasks_lose_none(sides: Sides, servers: Any) -> None:
    broker: Broker = servers.fresh(redelivery_seconds=1)
    check_redis(broker)
    client = broker.client()
    results = [client.send_task("one", [f"text {number}"], {"alias": "upper"}) for number in range(TASKS)]
    worker: Worker | None = None
    for kill in range(1, KILLS + 1):
        worker = sides.worker("modelpool", broker=broker)
        goal = TASKS * kill // (KILLS + 1)
        poll(lambda: sum(result.ready() for result in results[:goal]) >= goal * 0.9, f"{goal} answers")  # noqa: B023
        worker.kill()
    worker = sides.worker("modelpool", broker=broker)
    assert worker.answers(results) == [f"TEXT {number}" for number in range(TASKS)]
    with redis.Redis.from_url(broker.url) as server:
        poll(lambda: not server.hlen("unacked"), "no message that is still noted")
