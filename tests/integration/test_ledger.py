"""A worker's ledger behind its channels: what becomes of messages and acks if a connection is lost."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import kombu
import pytest
import redis
from harness import poll
from kombu.asynchronous import Hub

from legit_worker.broker import owners
from legit_worker.broker.acks import flush_acks
from legit_worker.broker.ledger import Worker, uptime
from legit_worker.broker.poison import bury, deliveries_of
from legit_worker.broker.redis import ReservingConnection
from legit_worker.broker.returning import DELIVERIES

#: Seconds until a message that is there has been delivered.
SOON = 10


@pytest.fixture
def url(servers: Any) -> str:
    """A server's address, with nothing in it."""
    address: str = servers.embedded
    with redis.Redis.from_url(address) as server:
        server.flushall()
    return address


@pytest.fixture
def server(url: str) -> Iterator[redis.Redis]:
    """A client that sees what is there."""
    with redis.Redis.from_url(url, decode_responses=True) as client:
        yield client


@pytest.fixture
def kept() -> set[str]:
    """The tags of the tasks that go on without their connection."""
    return set()


@pytest.fixture
def connect(url: str, kept: set[str]) -> Iterator[Any]:
    """Makes connections of one worker, in an event loop."""
    leave = owners.join(Worker(node="me", lease_seconds=60, max_deliveries=5, keeps=lambda: kept))
    made: list[Taking] = []

    def make(prefetch_count: int = 0) -> Taking:
        made.append(Taking(url, prefetch_count))
        return made[-1]

    yield make
    leave()
    for one in made:
        one.connection.close()


class Taking:
    """A consumer in an event loop."""

    def __init__(self, url: str, prefetch_count: int) -> None:
        self.connection = ReservingConnection(url)
        self.got: list[kombu.Message] = []
        self.channel = self.connection.default_channel
        queue = kombu.Queue("work", kombu.Exchange("work"), "work")
        self.consumer = kombu.Consumer(self.channel, [queue], on_message=self.got.append, accept=["json"])
        self.consumer.qos(prefetch_count=prefetch_count)
        self.consumer.consume()
        self.hub = Hub()
        self.connection.transport.register_with_event_loop(self.connection.connection, self.hub)
        self.loop = self.hub.create_loop()

    def take(self, count: int) -> list[Any]:
        """Turn until so many have come in all."""
        self.turn_until(lambda: len(self.got) >= count)
        return [message.payload for message in self.got]

    def turn_until(self, condition: Any) -> None:
        deadline = time.monotonic() + SOON
        while not condition():
            assert time.monotonic() < deadline
            next(self.loop)

    def is_lost(self) -> None:
        """As Celery's consumer ends a connection that broke."""
        self.connection.collect()


def put(url: str, *bodies: Any, headers: dict[str, Any] | None = None) -> None:
    with kombu.Connection(url) as connection:
        exchange = kombu.Exchange("work")
        producer = connection.Producer(serializer="json")
        for body in bodies:
            queue = kombu.Queue("work", exchange, "work")
            producer.publish(body, exchange=exchange, routing_key="work", declare=[queue], headers=headers)


def test_a_worker_renews_its_own_message_that_looks_old(
    url: str, server: redis.Redis, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's clock went forward, or the machine slept."""
    put(url, "a")
    one = connect(prefetch_count=1)
    assert one.take(1) == ["a"]
    now = time.time
    monkeypatch.setattr("kombu.transport.redis.time", lambda: now() + 7200)
    server.zadd("unacked_index", {one.got[0].delivery_tag: now() - 60}, xx=True)
    one.channel.qos.restore_visible(interval=1)
    assert (server.llen("work"), server.hlen("unacked")) == (0, 1)
    assert server.zscore("unacked_index", one.got[0].delivery_tag) > now() - 30


def test_acks_ride_with_the_next_reservation(url: str, server: redis.Redis, connect: Any) -> None:
    put(url, *range(5))
    one = connect(prefetch_count=2)
    one.take(2)
    for message in one.got:
        message.ack()
    calls = server.info("commandstats")
    one.take(4)
    after = server.info("commandstats")
    for command in ("hdel", "zrem"):
        assert after[f"cmdstat_{command}"]["calls"] > calls.get(f"cmdstat_{command}", {"calls": 0})["calls"]
    assert after.get("cmdstat_exec") == calls.get("cmdstat_exec"), "no round trip of their own"
    assert server.hlen("unacked") == 2


def test_tasks_that_go_on_keep_their_messages_and_are_acked_by_the_next_connection(
    url: str, server: redis.Redis, connect: Any, kept: set[str]
) -> None:
    put(url, *range(4))
    one = connect()
    one.take(4)
    kept.update(message.delivery_tag for message in one.got[:2])
    one.is_lost()
    other = connect()
    assert sorted(other.take(2)) == [2, 3], "what had not begun came again"
    assert server.hlen("unacked") == 4
    for message in [*one.got[:2], *other.got]:
        message.ack()
    other.turn_until(lambda: not server.hlen("unacked"))
    assert not list(server.scan_iter("legit.held.*"))


def test_tasks_that_go_on_count_in_the_prefetch_count(url: str, connect: Any, kept: set[str]) -> None:
    put(url, *range(4))
    one = connect(prefetch_count=2)
    one.take(2)
    kept.update(message.delivery_tag for message in one.got)
    one.is_lost()
    other = connect(prefetch_count=3)
    assert other.take(1) == [2]
    assert not other.channel.qos.can_consume()
    one.got[0].ack()
    assert other.take(2) == [2, 3]


def test_a_task_that_went_on_and_ended_without_an_ack_gives_its_message_back(
    url: str, connect: Any, kept: set[str]
) -> None:
    put(url, "cancelled")
    one = connect()
    one.take(1)
    kept.update(message.delivery_tag for message in one.got)
    one.is_lost()
    other = connect()
    kept.clear()
    assert other.take(1) == ["cancelled"]
    assert other.got[0].delivery_info["redelivered"]


def test_messages_whose_answer_was_lost_are_given_back(url: str, server: redis.Redis, connect: Any) -> None:
    one = connect()
    put(url, 0)
    one.take(1)
    put(url, 1, 2)
    one.channel._looking = True
    one.connection.transport.cycle.on_poll_start()
    deadline = time.monotonic() + SOON
    while server.hlen("unacked") == 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    connection = one.channel.client.connection
    connection._sock.close()  # the server has answered, and nobody hears it
    one.is_lost()
    other = connect()
    assert sorted(other.take(3)) == [0, 1, 2]


def test_acks_go_out_again_if_their_question_could_not_be_sent(url: str, server: redis.Redis, connect: Any) -> None:
    put(url, 0)
    one = connect()
    one.take(1)
    one.got[0].ack()
    one.channel._looking = True
    one.channel.client.connection._sock.shutdown(socket.SHUT_RDWR)
    with pytest.raises(one.connection.connection_errors):
        one.connection.transport.cycle.on_poll_start()
    one.is_lost()
    connect().turn_until(lambda: not server.hlen("unacked"))
    assert not server.llen("work")


def test_acks_that_wait_for_a_connection_are_told_once_for_each_loss(
    url: str, server: redis.Redis, connect: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that ends tries again in each turn, four times a second while a model loads."""

    def fail(client: redis.Redis) -> None:
        raise redis.ConnectionError

    put(url, *range(2))
    one = connect()
    one.take(2)
    for told, message in enumerate(one.got, 1):
        message.ack()
        with monkeypatch.context() as patch:
            patch.setattr(one.channel.ledger, "flush", fail)
            for _ in range(3):
                flush_acks()
        assert [line.partition(":")[0] for line in caplog.messages] == [
            "1 acks wait for a connection to the broker"
        ] * told
        flush_acks()
    assert not server.hlen("unacked")


@pytest.mark.skipif(kombu.VERSION < (5, 7), reason="it looks for overdue answers from 5.7 on")
def test_nothing_is_lost_if_kombu_disconnects_while_an_answer_is_overdue(
    url: str, server: redis.Redis, connect: Any
) -> None:
    put(url, 0)
    one = connect()
    one.take(1)
    one.got[0].ack()
    put(url, 1, 2)
    one.channel._looking = True
    one.connection.transport.cycle.on_poll_start()
    poll(lambda: server.llen("work") < 2, "the server to reserve a message that nobody hears of")
    one.channel.client.connection.disconnect()
    assert one.channel.ledger.outbox.unsent == 1, "nobody knows whether the acks have arrived"
    assert sorted(one.take(3)) == [0, 1, 2]


def test_a_question_that_the_server_hears_late_loses_no_message(url: str, server: redis.Redis, connect: Any) -> None:
    """It was on its way as its connection broke, and came after the worker had looked for what it never got."""
    one = connect()
    put(url, 0)
    one.take(1)
    ledger = one.channel.ledger
    server.hset("unacked", "late", json.dumps([{"body": "MQ==", "headers": {}, "properties": {}}, "work", "work"]))
    server.zadd("unacked_index", {"late": time.time()})
    server.hset(f"legit.held.{ledger.owner}", "late", f"{time.time()} work")
    lease = owners._leases[ledger]
    for _ in range(2):
        assert not ledger.is_unsure, "an answer may be on its way at one look"
        lease._renewed_at = float("-inf")
        lease.work()
    assert ledger.is_unsure
    one.turn_until(lambda: not server.hexists("unacked", "late"))


def test_an_answer_that_is_read_too_late_holds_only_what_nobody_took_over(
    url: str, server: redis.Redis, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process was stopped for longer than its lease, and another one took over what it had been given."""
    one = connect()
    put(url, 0)
    one.take(1)
    put(url, 1, 2)
    one.channel._looking, one.channel._group = True, 2
    one.connection.transport.cycle.on_poll_start()
    held = f"legit.held.{one.channel.ledger.owner}"
    deadline = time.monotonic() + SOON
    while server.hlen(held) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    taken = next(tag for tag, noted in server.hgetall("unacked").items() if json.loads(noted)[0]["body"] == "MQ==")
    server.hdel(held, taken)
    monkeypatch.setattr(one.channel, "_asked_at", uptime() - 60)
    assert one.take(2) == [0, 2]
    assert taken not in one.channel.ledger.held


def test_a_count_of_deaths_is_not_seen_by_tasks_and_a_burial_keeps_the_message(
    url: str, server: redis.Redis, connect: Any
) -> None:
    put(url, "deadly", headers={"id": "an id", "task": "a task", DELIVERIES: 5})
    one = connect()
    one.take(1)
    (message,) = one.got
    assert DELIVERIES not in message.headers
    assert deliveries_of(message) == 5
    bury(message, "it was deadly")
    assert server.llen("legit.dead") == 0, "it is not acked yet"
    message.ack()
    one.turn_until(lambda: server.llen("legit.dead"))
    record = json.loads(server.lindex("legit.dead", 0))
    assert (record["id"], record["task"], record["queue"]) == ("an id", "a task", "work")
    assert (record["reason"], record["deliveries"]) == ("it was deadly", 5)
    assert DELIVERIES not in json.dumps(record["message"])
    assert server.hlen("unacked") == 0


def test_a_message_that_kills_even_those_that_refuse_it_is_not_delivered(
    url: str, server: redis.Redis, connect: Any
) -> None:
    put(url, "deadly", headers={"id": "an id", DELIVERIES: 7})
    put(url, "good")
    one = connect()
    assert one.take(1) == ["good"]
    one.turn_until(lambda: server.llen("legit.dead") == 1)


def test_the_last_channel_of_a_worker_forgets_it(url: str, server: redis.Redis) -> None:
    leave = owners.join(Worker(node="me", lease_seconds=60, max_deliveries=5))
    put(url, 1)
    one = Taking(url, 0)
    one.take(1)
    assert server.zcard("legit.owners") == 1
    leave()
    one.connection.close()
    assert server.zcard("legit.owners") == server.hlen("legit.processes") == server.hlen("unacked") == 0
    assert server.llen("work") == 1
