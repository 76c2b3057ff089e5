"""What the wires to real servers send, and how often, when something is refused."""

from __future__ import annotations

import kombu
import pytest
import redis
from celery import Celery
from harness import Broker, poll
from ownserver import RabbitServer

from legit_worker.routing.delivery import AwayError, Delivery, NotNowError
from legit_worker.routing.wires import open_wire
from legit_worker.settings import AppSettings


def delivery(queue: str, number: int, **chosen: object) -> Delivery:
    own = AppSettings.model_validate(chosen)
    return Delivery(app="alpha", chosen=own, queue=queue, task_id=str(number), envelope=b'{"n": %d}' % number)


def test_of_a_group_that_redis_takes_in_part_nothing_is_sent_twice(broker: Broker) -> None:
    if not broker.url.startswith("redis"):
        pytest.skip("needs Redis as the broker")
    wire = open_wire(Celery(broker=broker.url), None)
    with redis.Redis.from_url(broker.url) as server:
        server.set("no list", "x")
        group = [delivery("a list", 1), delivery("no list", 2), delivery("a list", 3)]
        outcomes = dict(wire.send(group))
        assert [type(outcomes[one]).__name__ for one in group] == ["NoneType", "ResponseError", "NoneType"]
        assert server.lrange("a list", 0, -1) == [b'{"n": 1}', b'{"n": 3}']


def test_of_a_group_a_full_list_takes_what_fits(broker: Broker) -> None:
    if not broker.url.startswith("redis"):
        pytest.skip("needs Redis as the broker")
    wire = open_wire(Celery(broker=broker.url), None)
    with redis.Redis.from_url(broker.url) as server:
        server.rpush("a list", "x")
        server.set("no list", "x")
        group = [delivery("a list", number, queue_max_length=3) for number in range(4)]
        wrong = delivery("no list", 4, queue_max_length=3)
        outcomes = dict(wire.send([*group, wrong]))
        assert [type(outcomes[one]) for one in group] == [type(None), type(None), NotNowError, NotNowError]
        assert isinstance(outcomes[wrong], redis.ResponseError)
        assert server.llen("a list") == 3


def test_tries_on_a_full_rabbitmq_leave_no_copies(rabbit: RabbitServer) -> None:
    wire = open_wire(Celery(broker=rabbit.url), None)
    assert [error for _, error in wire.send([delivery("q", 0)])] == [None]
    rabbit.control("set_vm_memory_high_watermark", "0.0000001")
    for _ in range(3):
        with pytest.raises(AwayError, match="memory or disk is full"):
            list(wire.send([delivery("q", 1)]))
        wire.close()
    rabbit.control("set_vm_memory_high_watermark", "0.6")

    def is_taken() -> bool:
        try:
            return [error for _, error in wire.send([delivery("q", 2)])] == [None]
        except AwayError:
            wire.close()
            return False

    poll(is_taken, "RabbitMQ to take messages again")
    with kombu.Connection(rabbit.url) as connection:
        channel = connection.default_channel
        bodies = []
        while (message := channel.basic_get("q", no_ack=True)) is not None:
            bodies.append(str(message.body))
    # The first try was on a connection that was open before.
    assert bodies.count('{"n": 1}') <= 1
    assert {'{"n": 0}', '{"n": 2}'} <= set(bodies)
