"""Messages that are no task of Celery's, or nearly one: none of them ends a worker, or keeps others from being done."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
import redis
from harness import SIDES, Broker, Sides, StartWorker, Worker, poll
from strangers import body, headers, message, protocol_1, publish, push, strangers

from legit_worker.broker.redis import UNREADABLE_KEY
from legit_worker.errors import InvalidInputError

#: Tasks before and after the strangers.
GOOD = 20


def check(worker: Worker, before: list[object]) -> None:
    """All good tasks are answered, those sent later too, and the worker stops as it should."""
    after = [worker.send("no_model", number) for number in range(GOOD)]
    assert worker.answers([*before, *after]) == [number + 1 for number in range(GOOD)] * 2
    assert worker.stop() == 0


def test_no_message_in_redis_ends_a_worker(sides: Sides, broker: Broker) -> None:
    client = broker.client()
    before = [client.send_task("no_model", [number]) for number in range(GOOD)]
    if not broker.url.startswith("redis"):
        pytest.skip("raw messages are pushed to Redis")
    assert push(broker.url, broker.queue, strangers()) > 200
    worker = sides.worker("modelpool", broker=broker)
    with redis.Redis.from_url(broker.url) as server:
        poll(lambda: not server.llen(broker.queue), "an empty queue")
        check(worker, before)
        poll(lambda: not server.hlen("unacked"), "acks, which go out at the end of a turn")
        assert server.llen(broker.queue) == 0
        assert server.llen(UNREADABLE_KEY) > 20
    assert "a message can't become a task" in worker.log


def test_no_message_in_rabbitmq_ends_a_worker(start_worker: StartWorker, rabbitmq: Broker) -> None:
    client = rabbitmq.client()
    before = [client.send_task("no_model", [number]) for number in range(GOOD)]
    assert publish(rabbitmq.url, rabbitmq.queue, strangers()) > 100
    worker = Sides(start_worker).worker("modelpool", broker=rabbitmq)
    check(worker, before)
    with client.connection_for_read() as connection:
        assert connection.default_channel.queue_declare(rabbitmq.queue, passive=True).message_count == 0


def test_what_celery_discards_is_kept(sides: Sides, broker: Broker) -> None:
    """Each is what a short program in PHP may send. Nobody is told of them, so the list must have them."""
    if not broker.url.startswith("redis"):
        pytest.skip("raw messages are pushed to Redis")
    discarded = [
        message(headers=headers(eta="Sat, 28 Nov 2026 02:00:00 +0000")),
        message(headers=headers(expires=60)),
        message(**{"content-type": "application/json; charset=utf-8"}),
        message(body="cmVkIGFwcGxl"),
        message(headers=[]),
        protocol_1(kwargs=[]),
    ]
    worker = sides.worker("modelpool", broker=broker)
    push(broker.url, broker.queue, (("", one) for one in discarded))
    with redis.Redis.from_url(broker.url) as server:
        poll(lambda: server.llen(UNREADABLE_KEY) == len(discarded), "all of them")
        poll(lambda: not server.hlen("unacked"), "acks, which go out at the end of a turn")
        kept = [json.loads(raw) for raw in server.lrange(UNREADABLE_KEY, 0, -1)]
    assert [one["body"] for one in kept] == [one["body"] for one in discarded]
    check(worker, [worker.send("no_model", number) for number in range(GOOD)])


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (([1], [], {}), "the message's kwargs must be an object, got list: send {} if there are none"),
        (({"number": 1}, {}, {}), "the message's args must be a list, got dict"),
    ],
)
def test_arguments_that_php_writes_in_another_form_fail_their_task(
    sides: Sides, broker: Broker, parts: tuple[Any, ...], said: str
) -> None:
    """Celery stores nothing of the first, and calls the second with the names of its arguments."""
    if not broker.url.startswith("redis"):
        pytest.skip("raw messages are pushed to Redis")
    worker = sides.worker("modelpool", broker=broker)
    push(broker.url, broker.queue, iter([("", message(body=body(*parts)))]))
    result = worker.client.AsyncResult("an-id")
    with pytest.raises(InvalidInputError, match=re.escape(said)):
        worker.answer(result)


@pytest.mark.parametrize("side", SIDES)
def test_a_message_with_the_fewest_parts_is_answered(sides: Sides, broker: Broker, side: str) -> None:
    """What a short program in another language would write. kombu itself needs the delivery_info and the tag."""
    if not broker.url.startswith("redis"):
        pytest.skip("raw messages are pushed to Redis")
    worker = sides.worker(side, broker=dataclasses.replace(broker))
    fewest = {name: message()[name] for name in ("body", "content-type", "headers", "properties")}
    fewest["headers"] = {"task": "no_model", "id": "the-fewest"}
    if side == "modelpool":
        fewest["properties"] = {"body_encoding": "base64"}
    push(broker.url, broker.queue, iter([("", fewest)]))
    result = worker.client.AsyncResult("the-fewest")
    assert worker.answer(result) == 2
