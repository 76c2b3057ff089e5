"""Messages taken from a real server: none is lost on the way, and stock workers find what they know."""

from __future__ import annotations

import contextlib
import json
import select
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import Empty
from typing import Any

import kombu
import pytest
import redis
from kombu.asynchronous import Hub
from kombu.utils.json import loads

from legit_worker.broker.acks import flush_acks
from legit_worker.broker.failover import FailedOverError
from legit_worker.broker.hearing import refusals
from legit_worker.broker.outbox import MOST_ACKS
from legit_worker.broker.redis import UNREADABLE_KEY, ReservingConnection, gave_up
from legit_worker.broker.reserve import MOST_BYTES

#: Seconds until a message that is there has been delivered, and for which one waits that must not come.
SOON = 10
NEVER = 0.3

SIDES = {"stock": kombu.Connection, "reserving": ReservingConnection}


@pytest.fixture
def url(servers: Any) -> Iterator[str]:
    """A server's address, with nothing in it."""
    address = servers.embedded
    with redis.Redis.from_url(address) as server:
        server.flushall()
        server.script_flush()
    return address


@pytest.fixture
def server(url: str) -> Iterator[redis.Redis]:
    """A client that sees what is there."""
    with redis.Redis.from_url(url) as client:
        yield client


@dataclass
class Taker:
    """A consumer as a worker is one, without the worker."""

    connection: kombu.Connection
    queues: tuple[str, ...] = ("work",)
    prefetch_count: int = 0
    got: list[kombu.Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.channel = self.connection.default_channel
        self.consumer = kombu.Consumer(
            self.channel, [queue(name) for name in self.queues], on_message=self.got.append, accept=["json"]
        )
        self.consumer.qos(prefetch_count=self.prefetch_count)
        self.consumer.consume()

    def take(self, count: int, seconds: float = SOON) -> list[Any]:
        """The next bodies."""
        before, deadline = len(self.got), time.monotonic() + seconds
        while len(self.got) < before + count and time.monotonic() < deadline:
            self.drain()
        return [message.payload for message in self.got[before:]]

    def takes_no_more(self) -> bool:
        """Whether nothing else comes."""
        return self.take(1, NEVER) == []

    def drain(self) -> None:
        with contextlib.suppress(TimeoutError):
            self.connection.drain_events(timeout=0.05)

    def vanish(self) -> None:
        """As a process that is killed: nothing is given back."""
        self.channel.do_restore = False
        self.connection.close()


def queue(name: str) -> kombu.Queue:
    return kombu.Queue(name, kombu.Exchange(name), name)


@pytest.fixture
def taker(url: str) -> Iterator[Any]:
    """Makes takers, and closes them."""
    made = []

    def make(*queues: str, side: str = "reserving", prefetch_count: int = 0, url: str = url, **options: Any) -> Taker:
        connection = SIDES[side](url, transport_options=options)
        made.append(Taker(connection, queues or ("work",), prefetch_count))
        return made[-1]

    yield make
    for one in made:
        one.vanish()


def put(url: str, *bodies: Any, to: str = "work", options: dict[str, Any] | None = None, **properties: Any) -> None:
    """As a producer would."""
    with kombu.Connection(url, transport_options=options or {}) as connection:
        producer = connection.Producer(serializer="json")
        for body in bodies:
            producer.publish(body, exchange=queue(to).exchange, routing_key=to, declare=[queue(to)], **properties)


def restore(one: Taker) -> None:
    """Put back what was taken longer ago than this taker's visibility timeout."""
    time.sleep(0.05)
    one.channel.qos.restore_visible(num=100, interval=1)
    one.vanish()


def unacked(server: redis.Redis, prefix: str = "") -> dict[str, Any]:
    """What kombu notes of messages that are being worked on."""
    noted = {tag.decode(): loads(value.decode()) for tag, value in server.hgetall(f"{prefix}unacked").items()}
    assert noted.keys() == {tag.decode() for tag in server.zrange(f"{prefix}unacked_index", 0, -1)}
    return noted


def test_a_message_that_others_have_is_given_up(url: str, server: redis.Redis, taker: Any) -> None:
    put(url, "a")
    one = taker(prefetch_count=1)
    assert one.take(1) == ["a"]
    assert not gave_up(one.got[0])
    one.channel.ledger.forget(one.got[0].delivery_tag)
    assert gave_up(one.got[0])
    put(url, "b")
    assert one.take(1) == ["b"], "there is room again"
    assert not gave_up(one.got[1])
    one.channel.close()
    assert gave_up(one.got[1]), "it comes again"


def test_a_message_that_came_again_takes_the_place_of_its_first_delivery(
    url: str, server: redis.Redis, taker: Any
) -> None:
    put(url, "a")
    one = taker()
    assert one.take(1) == ["a"]
    ((payload, *_),) = unacked(server).values()
    server.delete("unacked", "unacked_index")
    server.rpush("work", json.dumps(payload))
    assert one.take(1) == ["a"]
    first, second = one.got
    assert first.delivery_tag == second.delivery_tag
    assert gave_up(first)
    assert not gave_up(second)
    second.ack()
    assert not unacked(server)


# What stands on the server is kombu's.


def test_a_message_is_noted_as_kombu_notes_it(url: str, server: redis.Redis, taker: Any) -> None:
    noted = {}
    for side in SIDES:
        put(url, {"text": "é ☃ 😀", "floats": [0.1, 1e300], "empty": []}, headers={"app": "a", "empty": []})
        one = taker(side=side)
        assert len(one.take(1)) == 1
        (noted[side],) = unacked(server).values()
        tag = one.got[0].delivery_tag
        assert noted[side][0]["properties"].pop("delivery_tag") == tag
        assert unacked(server).keys() == {tag}
        one.got[0].ack()
        assert unacked(server) == {}
        one.vanish()
    assert noted["reserving"] == noted["stock"]


@pytest.mark.parametrize("first", SIDES)
@pytest.mark.parametrize("second", SIDES)
def test_each_restores_what_the_other_left_behind(
    url: str, server: redis.Redis, taker: Any, first: str, second: str
) -> None:
    put(url, *range(20))
    dead = taker(side=first)
    assert dead.take(20) == list(range(20))
    dead.vanish()
    restore(taker(side=second, visibility_timeout=0.01))
    heir = taker(side=second)
    assert sorted(heir.take(20)) == list(range(20))
    assert heir.got[0].delivery_info["redelivered"]
    for message in heir.got:
        message.ack()
    assert unacked(server) == {}


def test_what_was_taken_and_not_delivered_is_given_back_at_the_end(url: str, server: redis.Redis, taker: Any) -> None:
    """The server's answer is on its way when the worker stops."""
    one = taker()
    put(url, 0)
    assert one.take(1) == [0]
    one.got[0].ack()
    put(url, 1)
    one.channel._looking = True
    one.connection.transport.cycle.on_poll_start()
    deadline = time.monotonic() + SOON
    while server.llen("work") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(unacked(server)) == 1
    one.connection.close()
    assert unacked(server) == {}
    assert taker().take(1) == [1]


def test_a_consumer_that_raises_loses_none_of_the_rest(url: str, taker: Any) -> None:
    put(url, *range(10))
    one = taker()

    def refuse(message: kombu.Message) -> None:
        one.got.append(message)
        if message.payload == 5:
            raise RuntimeError("not today")

    one.consumer.on_message = refuse
    with pytest.raises(RuntimeError, match="not today"):
        one.take(10)
    one.connection.close()
    assert sorted(taker().take(10)) == list(range(10))


def test_with_a_key_prefix_all_keys_have_it(url: str, server: redis.Redis, taker: Any) -> None:
    put(url, *range(5), options={"global_keyprefix": "mine:"})
    one = taker(global_keyprefix="mine:")
    assert one.take(5) == list(range(5))
    assert len(unacked(server, "mine:")) == 5
    assert all(key.startswith(b"mine:") for key in server.scan_iter())
    put(url, 6, options={"global_keyprefix": "mine:"})
    assert one.take(1) == [6]


# Acks.


@dataclass
class Turning:
    """A taker in an event loop, as a worker is."""

    taker: Taker

    def __post_init__(self) -> None:
        hub = Hub()
        connection = self.taker.connection
        connection.transport.register_with_event_loop(connection.connection, hub)
        self.loop = hub.create_loop()

    def take(self, count: int) -> None:
        deadline = time.monotonic() + SOON
        while len(self.taker.got) < count and time.monotonic() < deadline:
            next(self.loop)
        assert len(self.taker.got) == count


def test_in_an_event_loop_acks_go_out_together_before_it_waits(url: str, server: redis.Redis, taker: Any) -> None:
    put(url, *range(10))
    one = taker(prefetch_count=10)
    loop = Turning(one)
    loop.take(10)
    for message in one.got[:4]:
        message.ack()
    assert len(unacked(server)) == 10
    assert one.channel.qos.can_consume(), "there is room for others at once"
    before = (
        server.info("commandstats")["cmdstat_zrem"]["calls"] if "cmdstat_zrem" in server.info("commandstats") else 0
    )
    next(loop.loop)
    assert unacked(server).keys() == {message.delivery_tag for message in one.got[4:]}
    assert server.info("commandstats")["cmdstat_zrem"]["calls"] == before + 1


def test_a_connection_that_is_closed_unused_stops_nobody(url: str, taker: Any) -> None:
    """One of an attempt to connect that failed is closed as garbage, later."""
    one = taker()
    loop = Turning(one)
    put(url, 1)
    loop.take(1)
    one.channel.async_pool.make_connection().disconnect()
    put(url, 2)
    loop.take(2)


def test_a_channel_closes_on_a_server_where_its_queue_stays(
    url: str, taker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = taker()
    exchange = kombu.Exchange("news", type="fanout", auto_delete=True)
    kombu.Consumer(one.channel, [kombu.Queue("news", exchange, auto_delete=True)]).consume()

    def delete(*_: Any, **__: Any) -> None:
        raise FailedOverError("READONLY You can't write against a read only replica.")

    monkeypatch.setattr(one.channel, "queue_delete", delete)
    one.channel.close()
    assert one.channel.closed
    assert one.channel not in one.channel.ledger.channels


def test_many_acks_do_not_wait_for_the_loop(url: str, server: redis.Redis, taker: Any) -> None:
    put(url, *range(MOST_ACKS))
    one = taker()
    Turning(one).take(MOST_ACKS)
    for message in one.got:
        message.ack()
    assert unacked(server) == {}


def test_acks_that_wait_go_out_when_the_channel_closes(url: str, server: redis.Redis, taker: Any) -> None:
    put(url, 1, 2)
    one = taker()
    Turning(one).take(2)
    one.got[0].ack()
    one.connection.close()
    assert unacked(server) == {}
    assert taker().take(2, NEVER) == [2], "one is given back, the other was done"


def test_an_ack_after_the_channel_closed_asks_nobody(url: str, taker: Any) -> None:
    """A task that was parked while the connection was lost: its message was given back."""
    put(url, 1)
    one = taker()
    Turning(one).take(1)
    one.connection.close()
    one.got[0].ack()
    assert taker().take(1) == [1]


def test_acks_without_a_connection_wait_for_the_next_one(
    url: str, server: redis.Redis, taker: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(url, 1)
    one = taker()
    Turning(one).take(1)
    one.got[0].ack()

    def gone(*_: Any, **__: Any) -> None:
        raise redis.ConnectionError("gone")

    monkeypatch.setattr(redis.client.Pipeline, "execute", gone)
    flush_acks()
    monkeypatch.undo()
    assert "1 acks wait for a connection to the broker" in caplog.text
    assert len(unacked(server)) == 1
    flush_acks()
    assert unacked(server) == {}


# Draining by hand, as a task does that consumes by itself.


@pytest.mark.parametrize("side", SIDES)
def test_a_drain_returns_when_a_message_has_come_and_not_before(url: str, taker: Any, side: str) -> None:
    one = taker(side=side)
    assert one.takes_no_more()
    later = threading.Timer(1.5, put, args=(url, "late"))
    later.start()
    one.connection.drain_events(timeout=SOON)
    later.join()
    assert [message.payload for message in one.got] == ["late"]


@pytest.mark.parametrize("side", SIDES)
def test_a_drain_delivers_one_message(url: str, taker: Any, side: str) -> None:
    put(url, *range(5))
    one = taker(side=side)
    for number in range(5):
        one.connection.drain_events(timeout=SOON)
        assert [message.payload for message in one.got] == list(range(number + 1))


@pytest.mark.parametrize("side", SIDES)
def test_between_two_drains_an_urgent_message_overtakes(url: str, taker: Any, side: str) -> None:
    put(url, *range(5), priority=6)
    one = taker(side=side)
    one.connection.drain_events(timeout=SOON)
    put(url, "urgent", priority=0)
    one.connection.drain_events(timeout=SOON)
    assert [message.payload for message in one.got] == [0, "urgent"]


def test_by_hand_no_more_is_reserved_than_delivered(url: str, server: redis.Redis, taker: Any) -> None:
    put(url, *range(20))
    one = taker()
    for _ in range(5):
        one.connection.drain_events(timeout=SOON)
    assert len(unacked(server)) == 5
    assert server.llen("work") == 15


# What is taken, and in which order.


def test_no_more_is_taken_than_the_prefetch_count(url: str, server: redis.Redis, taker: Any) -> None:
    put(url, *range(200))
    one = taker(prefetch_count=70)
    assert one.take(70) == list(range(70))
    assert one.takes_no_more()
    assert (server.llen("work"), len(unacked(server))) == (130, 70)
    for message in one.got[:3]:
        message.ack()
    assert one.take(3) == [70, 71, 72]
    assert one.takes_no_more()


@pytest.mark.parametrize("side", SIDES)
def test_queues_take_turns_and_urgent_messages_come_first(url: str, taker: Any, side: str) -> None:
    for priority in (6, 0):
        for name in "abc":
            put(url, *[f"{name}{priority}{number}" for number in range(4)], to=name, priority=priority)
    got = taker("a", "b", "c", side=side).take(24)
    rounds = [{body[:2] for body in got[start : start + 3]} for start in range(0, 24, 3)]
    assert rounds == [{"a0", "b0", "c0"}] * 4 + [{"a6", "b6", "c6"}] * 4


def test_where_queues_have_an_order_one_is_emptied_first(url: str, taker: Any) -> None:
    """The same as under kombu, whose older releases read the order from the other end."""
    orders = []
    for side in SIDES:
        for name in "ab":
            put(url, *[f"{name}{number}" for number in range(4)], to=name)
        one = taker("b", "a", side=side, queue_order_strategy="priority")
        orders.append("".join(body[0] for body in one.take(8)))
        one.vanish()
    assert orders[0] == orders[1]
    assert orders[0] in ("bbbbaaaa", "aaaabbbb")


def test_of_a_few_messages_an_idle_worker_gets_its_share(url: str, taker: Any) -> None:
    takers = [taker(), taker()]
    for one in takers:
        assert one.takes_no_more()
    put(url, *range(12))
    deadline = time.monotonic() + SOON
    while sum(len(one.got) for one in takers) < 12 and time.monotonic() < deadline:
        for one in takers:
            one.drain()
    assert min(len(one.got) for one in takers) >= 3


def test_large_messages_are_not_taken_by_the_dozen(url: str, server: redis.Redis, taker: Any) -> None:
    put(url, *["x" * MOST_BYTES] * 8)
    one = taker()
    one.take(1)
    assert server.llen("work") >= 6
    assert len(one.take(7)) == 7


@pytest.mark.parametrize("count", [1, 3])
def test_an_idle_worker_hears_of_every_queue_at_once(url: str, taker: Any, count: int) -> None:
    queues = tuple("abc"[:count])
    one = taker(*queues)
    assert one.takes_no_more()
    waits = []
    for turn in range(5 * count):
        put(url, turn, to=queues[turn % count])
        sent = time.monotonic()
        assert one.take(1) == [turn]
        waits.append(time.monotonic() - sent)
    # A second is what a worker that only looks now and then would need.
    assert sorted(waits)[len(waits) // 2] < 0.2


def test_a_priority_that_no_message_had_before_is_found(url: str, taker: Any) -> None:
    one = taker()
    assert one.takes_no_more()
    put(url, "late", priority=9)
    assert one.take(1) == ["late"]
    assert one.takes_no_more()
    put(url, "later", priority=9)
    sent = time.monotonic()
    assert one.take(1) == ["later"]
    assert time.monotonic() - sent < 0.5


def test_a_cancelled_queue_is_left_alone(url: str, server: redis.Redis, taker: Any) -> None:
    one = taker("a", "b")
    assert one.takes_no_more()
    one.consumer.cancel_by_queue("a")
    put(url, 1, to="a")
    put(url, 2, to="b")
    assert one.take(1) == [2]
    assert one.takes_no_more()
    assert server.llen("a") == 1


def test_queues_that_come_and_go_leave_nothing_behind(url: str, taker: Any) -> None:
    one = taker("stays")
    for number in range(3):
        name = f"visits-{number}"
        put(url, number, to=name, priority=9)
        one.consumer.add_queue(queue(name))
        one.consumer.consume()
        assert one.take(1) == [number]
        one.consumer.cancel_by_queue(name)
    assert one.takes_no_more()
    assert not one.channel._seen
    assert one.channel._bells.keys() == {"stays"}


def test_consumers_that_do_not_ack_have_nothing_noted(url: str, server: redis.Redis) -> None:
    put(url, *range(3))
    with ReservingConnection(url) as connection:
        got: list[Any] = []
        with connection.Consumer([queue("work")], callbacks=[lambda body, _: got.append(body)], no_ack=True):
            while len(got) < 3:
                connection.drain_events(timeout=SOON)
    assert got == [0, 1, 2]
    assert unacked(server) == {}


def no_ack_consumer(channel: Any, name: str, got: list[Any]) -> kombu.Consumer:
    """As Celery's mingle makes one for its replies."""
    return kombu.Consumer(channel, [queue(name)], callbacks=[lambda body, _: got.append(body)], no_ack=True)


@pytest.mark.parametrize("when", ["before", "beside", "cancelled"])
def test_a_consumer_that_does_not_ack_leaves_the_others_reserving(
    url: str, server: redis.Redis, taker: Any, when: str
) -> None:
    """Celery's mingle is such a consumer, on the channel that tasks come by, at the start of every worker."""
    replies: list[Any] = []
    connection = ReservingConnection(url)
    first = no_ack_consumer(connection.default_channel, "replies", replies)
    first.consume()
    put(url, "early", to="replies")
    if when == "before":  # its question is still under way
        connection.transport.cycle.on_poll_start()
    else:
        connection.drain_events(timeout=SOON)
    if when == "cancelled":
        first.cancel()
    one = Taker(connection)
    put(url, *range(5))
    if when == "beside":
        put(url, "late", to="replies")
    assert one.take(5) == list(range(5))
    assert one.takes_no_more()
    assert len(unacked(server)) == 5
    assert replies == (["early", "late"] if when == "beside" else ["early"])
    assert one.channel.refusal is None
    waiting = [client["cmd"] for client in server.client_list() if "b" in client["flags"]]
    assert "brpop" not in waiting
    one.vanish()


def test_without_acks_a_message_that_was_not_delivered_goes_back_at_the_end(
    url: str, server: redis.Redis, taker: Any
) -> None:
    put(url, 1, 2, to="replies")
    one = taker()
    got: list[Any] = []

    def refuse(body: Any, _: Any) -> None:
        got.append(body)
        raise RuntimeError("not today")

    consumer = no_ack_consumer(one.channel, "replies", got)
    consumer.callbacks = [refuse]
    consumer.consume()
    loop = Turning(one)
    with pytest.raises(RuntimeError, match="not today"):
        loop.take(1)
    one.connection.close()
    assert got == [1]
    assert [json.loads(raw)["headers"] for raw in server.lrange("replies", 0, -1)] == [{}]
    assert unacked(server) == {}


def test_a_full_worker_sleeps_while_messages_wait(url: str, taker: Any) -> None:
    one = taker(prefetch_count=1)
    hub = Hub()
    one.connection.transport.register_with_event_loop(one.connection.connection, hub)
    loop = hub.create_loop()
    deadline = time.monotonic() + SOON
    while not one.got and time.monotonic() < deadline:
        next(loop)
        if not one.connection.transport.cycle._bells:
            continue
        put(url, 1, 2, 3)
    assert len(one.got) == 1
    turns, until = 0, time.monotonic() + 2
    while time.monotonic() < until:
        next(loop)
        turns += 1
    assert turns < 20
    assert len(one.got) == 1


@pytest.mark.parametrize("bodies", [[1], [1, 2]])
def test_with_a_message_comes_the_news_whether_others_are_left(url: str, taker: Any, bodies: list[int]) -> None:
    """A batch does not wait for an answer that is likely to bring nothing."""
    put(url, *bodies)
    one = taker()
    Turning(one).take(1)
    one.connection.transport.cycle.on_poll_start()
    assert one.channel.awaits_answer
    assert one.channel.awaits_messages == (len(bodies) > 1)


def test_a_list_whose_bell_rings_is_asked_before_the_hub_comes_round(url: str, taker: Any) -> None:
    """A batch might come first, and its tasks would not be in it."""
    one = taker()
    loop = Turning(one)
    cycle = one.connection.transport.cycle
    deadline = time.monotonic() + SOON
    cycle.on_poll_start()
    while one.channel.awaits_answer and time.monotonic() < deadline:
        hear(cycle)
        cycle.on_poll_start()
    assert cycle._bells
    assert not one.channel.awaits_answer
    put(url, 1)
    hear(cycle)
    assert one.channel.awaits_answer
    loop.take(1)
    assert [message.payload for message in one.got] == [1]


def hear(cycle: Any) -> None:
    """Do what the hub does between two rounds."""
    ready, _, _ = select.select(list(cycle.fds), [], [], SOON)
    for fileno in ready:
        with contextlib.suppress(Empty):
            cycle.on_readable(fileno)


def test_a_bell_that_does_not_answer_is_replaced(url: str, taker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = taker()
    assert one.takes_no_more()
    poller, channel = one.connection.transport.cycle, one.channel
    ((_, bell),) = poller._bells.values()
    monkeypatch.setattr(channel, "patience", lambda: -1000.0)
    poller.maybe_check_brpop_health()
    assert (poller._bells, channel._bells) == ({}, {})
    monkeypatch.undo()
    put(url, "heard")
    assert one.take(1) == ["heard"]
    assert bell not in channel._bells.values()


def test_a_connection_that_the_server_closed_while_the_worker_was_full_is_made_anew(
    url: str, server: redis.Redis, taker: Any
) -> None:
    """Servers close connections that have nothing to say for long."""
    one = taker(prefetch_count=1)
    loop = Turning(one)
    cycle = one.connection.transport.cycle
    deadline = time.monotonic() + SOON
    while not cycle._bells and time.monotonic() < deadline:
        next(loop.loop)
    put(url, 1, 2)
    loop.take(1)
    while any(bell.asked_at for _, bell in cycle._bells.values()) and time.monotonic() < deadline:
        next(loop.loop)
    for client in server.client_list():
        if client["cmd"] == "blmove":
            server.client_kill_filter(_id=client["id"])
    for _ in range(5):
        next(loop.loop)
    one.got[0].ack()
    loop.take(2)
    assert [message.payload for message in one.got] == [1, 2]


# What other clients write.


def message(**changes: Any) -> dict[str, Any]:
    """As kombu writes one, with a plain body."""
    to = {"exchange": "work", "routing_key": "work"}
    properties = {"delivery_tag": "a tag", "delivery_info": to, "delivery_mode": 2, "priority": 0}
    return {
        "body": '"hello"',
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {},
        "properties": properties,
    } | changes


FOREIGN = {
    "complete": message(),
    "no tag": message(properties={"delivery_info": {"exchange": "work", "routing_key": "work"}}),
    "no delivery_info": message(properties={"delivery_tag": "a tag"}),
    "an address of nulls": message(properties={"delivery_info": {"exchange": None, "routing_key": None}}),
    "a number for a tag": message(properties={"delivery_tag": 7}),
    "no properties": {key: value for key, value in message().items() if key != "properties"},
    "properties are null": message(properties=None),
    "an empty PHP array for properties": message(properties=[]),
    "headers are null": message(headers=None),
    "an empty PHP array for headers": message(headers=[]),
    "no headers": {key: value for key, value in message().items() if key != "headers"},
    "half an emoji": message(headers={"title": "\ud83d"}),
    "base64": message(body="ImhlbGxvIg==", properties=message()["properties"] | {"body_encoding": "base64"}),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_message_is_delivered_and_survives_a_kill(
    url: str, server: redis.Redis, taker: Any, kind: str
) -> None:
    server.lpush("work", json.dumps(FOREIGN[kind]))
    dead = taker()
    assert dead.take(1) == ["hello"]
    dead.vanish()
    assert len(unacked(server)) == 1
    restore(taker(visibility_timeout=0.01))
    heir = taker()
    assert heir.take(1) == ["hello"]
    heir.got[0].ack()
    assert unacked(server) == {}


def test_messages_that_all_have_the_same_tag_are_told_apart(url: str, server: redis.Redis, taker: Any) -> None:
    for number in range(5):
        server.lpush("work", json.dumps(message(body=str(number))))
    one = taker()
    assert one.take(5) == list(range(5))
    assert len(unacked(server)) == 5
    one.got[2].ack()
    assert len(unacked(server)) == 4


@pytest.mark.parametrize("raw", [b"not JSON", b"[1, 2]", b'"text"', b"7", b"null", b"\xff\xfe\x00", b"", b"{" * 5000])
def test_what_is_no_message_is_put_aside_and_the_rest_goes_on(
    url: str, server: redis.Redis, taker: Any, raw: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    put(url, 1)
    server.lpush("work", raw)
    put(url, 2)
    one = taker()
    assert one.take(2) == [1, 2]
    assert server.lrange(UNREADABLE_KEY, 0, -1) == [raw]
    assert len(unacked(server)) == 2
    assert f"{len(raw)} bytes in queue work are no message" in caplog.text


# Servers that forget, or refuse.


def test_a_server_that_forgot_the_script_is_told_again(url: str, server: redis.Redis, taker: Any) -> None:
    one = taker()
    for number in range(3):
        put(url, number)
        assert one.take(1) == [number]
        server.script_flush()


def test_a_user_who_may_not_run_eval_reserves(url: str, server: redis.Redis, taker: Any) -> None:
    """kombu loads its own scripts, and needs no `EVAL`."""
    server.acl_setuser(
        "limited", enabled=True, passwords=["+secret"], keys=["*"], channels=["*"], commands=["+@all", "-eval"]
    )
    try:
        one = taker(url=url.replace("redis://", "redis://limited:secret@"))
        put(url, *range(20))
        assert one.take(20) == list(range(20))
        assert one.channel.refusal is None
    finally:
        server.acl_deluser("limited")


@pytest.mark.parametrize("forbidden", ["blmove", "lindex"])
def test_a_server_that_refuses_to_reserve_is_asked_as_kombu_asks(
    url: str, server: redis.Redis, taker: Any, caplog: pytest.LogCaptureFixture, forbidden: str
) -> None:
    """`LINDEX` is for the script; kombu needs neither."""
    refusals.clear()
    server.acl_setuser(
        "limited", enabled=True, passwords=["+secret"], keys=["*"], channels=["*"], commands=["+@all", f"-{forbidden}"]
    )
    try:
        one = taker(url=url.replace("redis://", "redis://limited:secret@"))
        put(url, *range(20))
        assert one.take(20) == list(range(20))
        assert one.takes_no_more()
        put(url, 20)
        assert one.take(1) == [20]
        assert len(unacked(server)) == 21
        assert caplog.text.count("does not let this worker reserve messages") == 1
        assert one.channel.refusal in caplog.text
    finally:
        server.acl_deluser("limited")
