"""How a channel hands over what a reservation brought: all at once, or bit by bit while a task is in a hurry."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
from redis.exceptions import ResponseError

from legit_worker.broker import owners
from legit_worker.broker.redis import MOST_COPIES, ReservingChannel
from legit_worker.broker.reserve import Reserved, Source


class Channel(ReservingChannel):
    """One without a connection, which keeps what it delivers."""

    def __init__(self, count: int, hurried: list[bool]) -> None:
        source = Source(queue="work", key="work", acks=True)
        self._reserved = deque(Reserved(source, str(number), b"{}") for number in range(count))
        self._closing = False
        #: One answer for each question; then nobody is in a hurry.
        self.hurried = hurried
        self.delivered: list[str] = []
        worker = SimpleNamespace(is_hurried=lambda: bool(self.hurried) and self.hurried.pop(0))
        self.ledger: Any = SimpleNamespace(worker=worker)
        self.connection = SimpleNamespace(cycle=SimpleNamespace(hub=object()))

    def _deliver_payload(self, payload: dict[str, Any], reserved: Reserved) -> None:
        self.delivered.append(reserved.tag)


@pytest.mark.parametrize(
    ("raw", "body"), [(b'{"body": "caf\xe9"}', "caf\ufffd"), ('{"body": "café"}'.encode(), "café")]
)
def test_bytes_that_are_no_utf_8_are_read_as_kombu_reads_them(raw: bytes, body: str) -> None:
    assert Reserved(Source(queue="work", key="work", acks=True), "tag", raw).payload() == {"body": body}


def test_all_messages_are_delivered_at_once_if_no_task_is_in_a_hurry() -> None:
    channel = Channel(4, [])
    channel._deliver_reserved()
    assert channel.delivered == ["0", "1", "2", "3"]


def test_the_rest_waits_for_the_hub_while_a_task_is_in_a_hurry() -> None:
    channel = Channel(4, [False, True, True])
    channel._deliver_reserved()
    assert channel.delivered == ["0", "1"]
    channel._brpop_start()
    assert channel.delivered == ["0", "1"], "nothing is asked for before the rest is delivered"
    channel.deliver_rest()
    assert channel.delivered == ["0", "1", "2"], "each time the hub comes round, at least one goes on"
    channel.deliver_rest()
    assert channel.delivered == ["0", "1", "2", "3"]


def test_a_channel_that_closes_delivers_nothing_more() -> None:
    channel = Channel(2, [True])
    channel._deliver_reserved()
    channel._closing = True
    channel.deliver_rest()
    assert (channel.delivered, len(channel._reserved)) == (["0"], 1)


@pytest.mark.parametrize(
    ("channels", "coming"),
    [
        ([], None),
        ([(False, True)], None),
        ([(True, False)], False),
        ([(True, False), (True, True)], True),
        ([(True, False), (False, True)], False),
    ],
    ids=["no Redis", "no room for more", "the lists were empty", "one of two is asked", "the other has no room"],
)
def test_more_messages_may_come_while_a_channel_that_has_room_awaits_an_answer(
    channels: list[tuple[bool, bool]], coming: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_ones = [SimpleNamespace(is_asking=is_asking, awaits_messages=awaits) for is_asking, awaits in channels]
    monkeypatch.setattr(owners, "_of_worker", {"a broker": SimpleNamespace(channels=open_ones)})
    assert owners.is_more_coming() is coming


class Server:
    """A list of this many messages, which may be full."""

    def __init__(self, entries: int, error: Exception | None = None) -> None:
        self.entries, self._error = entries, error

    def llen(self, key: str) -> int:
        return self.entries

    def rpush(self, key: str, raw: str) -> None:
        if self._error is not None:
            raise self._error
        self.entries += 1


@pytest.mark.parametrize(
    ("server", "entries", "told"),
    [
        (Server(5), 6, "was put into"),
        (Server(MOST_COPIES), MOST_COPIES, "is not kept"),
        (Server(5, ResponseError("OOM command not allowed")), 5, "OOM command not allowed"),
    ],
)
def test_what_celery_discards_is_kept_as_far_as_there_is_room(
    caplog: pytest.LogCaptureFixture, server: Server, entries: int, told: str
) -> None:
    """Whatever the server says, Celery then discards the message, as it would."""
    channel = SimpleNamespace(plain_client=server, ledger=SimpleNamespace(keys=SimpleNamespace(unreadable="the list")))
    ReservingChannel.keep_copy(channel, SimpleNamespace(_raw={}))  # type: ignore[arg-type]
    assert server.entries == entries
    assert told in caplog.text
