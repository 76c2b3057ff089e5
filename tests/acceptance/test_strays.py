"""A project's handlers of signals and hooks that raise around a task: no message stays unacked, no worker ends."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import kombu
import pytest
import redis
from harness import Broker, StartWorker, poll
from journal import Life, begin_life, names

#: Where the signal comes, a task's end, and how often its own code runs.
PLACES = [
    ("accepted", "returns", 1),
    ("ack", "returns", 2),
    ("failure", "raises", 2),
    ("ack", "raises", 2),
]

#: How often a message may come again: the default of `MAX_DELIVERIES`.
MOST = 5


def ring_everywhere(life: Life) -> None:
    """A task at each place: its message goes back, and comes again."""
    sent = {(place, end, runs): life.send("rung", kwargs={"end": end, "place": place}) for place, end, runs in PLACES}
    for (place, end, runs), result in sent.items():
        happened = names(life.end(result))
        assert happened.count("rings") == 1, (place, end)
        assert happened.count("before_start") == runs, (place, end)
        life.worker.settle([result])
        assert result.state == ("SUCCESS" if end == "returns" else "FAILURE")
    assert life.worker.log.count("A signal's handler raised in Celery's code around rung[") == len(PLACES)


def ends_empty(life: Life) -> None:
    """Its queue has nothing when the worker has ended, and gave back what it had."""
    assert life.ask("ends", "returns", 1) == "after 0 retries"
    assert life.worker.stop() == 0
    broker = life.worker.broker
    with kombu.Connection(broker.url) as connection:
        assert broker.declared()(connection).queue_declare().message_count == 0


def test_a_task_whose_end_a_handler_interrupts_comes_again(start_worker: StartWorker, tmp_path: Path) -> None:
    life = begin_life(start_worker, tmp_path, "modelpool", project="rung")
    ring_everywhere(life)
    ends_empty(life)


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_it_does_so_under_rabbitmq(
    start_worker: StartWorker, tmp_path: Path, rabbitmq: Broker, queue_type: str
) -> None:
    broker = replace(rabbitmq, queue_type=queue_type)
    life = begin_life(start_worker, tmp_path, "modelpool", broker=broker, project="rung")
    ring_everywhere(life)
    assert "runs alone" not in life.worker.log, "nobody died of it"
    ends_empty(life)


def rings_again_and_again(life: Life) -> list[str]:
    """Each task is given back five times. Then it fails; if its failure is interrupted, too, its message goes."""
    rung = {"end": "returns", "place": "accepted"}
    sent = [life.send("rung", kwargs=rung | {"times": times}) for times in (MOST, MOST + 10)]
    life.worker.settle(sent[:1])
    assert sent[0].state == "FAILURE"
    assert "was run 5 times, and each time a signal's handler raised" in str(sent[0].result)
    poll(lambda: names(life.journal.of(sent[1].id)).count("rings") == MOST + 1, "the last try")
    ends_empty(life)
    assert [names(life.journal.of(one.id)).count("rings") for one in sent] == [MOST, MOST + 1]
    assert not {one.id for one in sent}.intersection(life.journal.happened("before_start"))
    return [one.id for one in sent]


def test_it_does_not_come_again_for_ever(start_worker: StartWorker, tmp_path: Path, broker: Broker) -> None:
    if not broker.url.startswith("redis"):
        pytest.skip("what becomes of the messages is looked up in Redis")
    life = begin_life(start_worker, tmp_path, "modelpool", broker=broker, project="rung")
    dead, aside = rings_again_and_again(life)
    with redis.Redis.from_url(broker.url) as server:
        records = [json.loads(one) for one in server.lrange("legit.dead", 0, -1)]
        assert ["signal's handler" in one["reason"] for one in records if one["id"] == dead] == [True]
        assert sum(aside.encode() in raw for raw in server.lrange("legit.unreadable", 0, -1)) == 1


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_it_does_not_do_so_under_rabbitmq(
    start_worker: StartWorker, tmp_path: Path, rabbitmq: Broker, queue_type: str
) -> None:
    broker = replace(rabbitmq, queue_type=queue_type)
    rings_again_and_again(begin_life(start_worker, tmp_path, "modelpool", broker=broker, project="rung"))


def test_a_task_that_is_revoked_is_told_so_again(start_worker: StartWorker, tmp_path: Path, broker: Broker) -> None:
    if broker.url.startswith("amqp"):
        pytest.skip("RabbitMQ drops an expired message that goes back")
    life = begin_life(start_worker, tmp_path, "modelpool", broker=broker, project="rung")
    late = datetime.now(timezone.utc) - timedelta(seconds=1)
    result = life.send("rung", kwargs={"end": "returns", "place": "ack"}, expires=late)
    assert names(life.end(result)) == ["rings", "acks"]
    assert result.state == "REVOKED"
    ends_empty(life)


@pytest.mark.parametrize("countdown", [None, 0.1], ids=["at once", "later"])
def test_hooks_that_fail_end_no_worker(
    start_worker: StartWorker, tmp_path: Path, broker: Broker, countdown: float | None
) -> None:
    """Under stock solo they end it, or leave the message unacked if the task was to run later."""
    if broker.url.startswith("amqp"):
        pytest.skip("on RabbitMQ nothing is put into a list")
    life = begin_life(start_worker, tmp_path, "modelpool", broker=broker, project="rung")
    sent = [
        life.send("rung", kwargs={"end": end, "fails": fails}, countdown=countdown)
        for end, fails in (("raises", "hook"), ("raises", "failure"), ("returns", "ack"))
    ]
    late = datetime.now(timezone.utc) - timedelta(seconds=1)
    sent.append(life.send("rung", kwargs={"end": "returns", "fails": "ack"}, countdown=countdown, expires=late))
    life.worker.settle(sent)
    assert [result.state for result in sent] == ["FAILURE", "FAILURE", "SUCCESS", "REVOKED"]
    poll(lambda: life.worker.log.count("the message was put into the list") == 3, "those to go that nobody can ack")
    assert "acks" in names(life.end(sent[0]))
    ends_empty(life)
