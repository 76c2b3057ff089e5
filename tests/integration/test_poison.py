"""Records of messages on RabbitMQ that are not run any more."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import kombu
import pytest
from harness import Broker

from legit_worker.broker import poison


@pytest.fixture
def connection(rabbitmq: Broker, monkeypatch: pytest.MonkeyPatch) -> Iterator[kombu.Connection]:
    """One to RabbitMQ, where the queue of records is this test's own."""
    monkeypatch.setattr(poison, "DEAD", f"tests-dead-{uuid4().hex[:12]}")
    with kombu.Connection(rabbitmq.url) as one:
        yield one
        one.channel().queue_delete(poison.DEAD)


def buried(connection: kombu.Connection) -> Any:
    """What the queue of records has of a message after `bury`."""
    channel = connection.channel()
    message = kombu.Message(b"[]", channel=channel, delivery_tag=1, headers={"id": "a", "task": "one"})
    poison.bury(message, "it killed 5 workers")
    record = connection.channel().basic_get(poison.DEAD, no_ack=True)
    return None if record is None else connection.channel().message_to_python(record).payload["id"]


def test_a_record_goes_into_a_queue_that_is_made_if_it_is_missing(connection: kombu.Connection) -> None:
    assert [buried(connection) for _ in range(2)] == ["a", "a"]


def test_a_queue_that_its_owner_made_with_other_arguments_takes_records(connection: kombu.Connection) -> None:
    kombu.Queue(poison.DEAD, channel=connection.channel(), queue_arguments={"x-max-length": 10}).declare()
    assert buried(connection) == "a"


def test_a_record_that_rabbitmq_refuses_goes_into_the_log(
    connection: kombu.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    full = {"x-max-length": 0, "x-overflow": "reject-publish"}
    kombu.Queue(poison.DEAD, channel=connection.channel(), queue_arguments=full).declare()
    with caplog.at_level(logging.ERROR):
        assert buried(connection) is None
    assert "it killed 5 workers" in caplog.text
