"""Copies for the end of a queue of RabbitMQ, and writes that a signal interrupts: nothing holds up the main thread."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import amqp.method_framing
import kombu
import pytest
from kombu.transport import pyamqp
from ownserver import free_port

from legit_worker.broker import behind
from legit_worker.broker.behind import ACQUIRED, ADDRESS, COUNT, FIRST_PAUSE, LAST_PAUSE, VOUCHED, Behind
from legit_worker.broker.failover import InterruptedWriteError, enduring
from legit_worker.broker.returning import DELIVERIES


class Clock:
    """Stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    one = Clock()
    monkeypatch.setattr(behind, "monotonic", one)
    return one


def message(connection: Any) -> Any:
    """One that came by a connection."""
    channel = SimpleNamespace(connection=SimpleNamespace(client=connection))
    return kombu.Message(b"", channel=channel, delivery_tag=1, headers={"id": "a"}, delivery_info={})


class Refused:
    """A connection whose copies can't connect."""

    def __init__(self) -> None:
        self.tries = 0

    def clone(self, **_: Any) -> Any:
        self.tries += 1
        raise ConnectionRefusedError("nobody there")


def test_after_a_copy_that_failed_none_is_tried_for_a_while_and_then_for_longer(clock: Clock) -> None:
    refused, copies = Refused(), Behind()
    pauses = []
    for _ in range(8):
        assert not copies.put(message(refused), "work", 1, 0)
        tries, began = refused.tries, clock.now
        while refused.tries == tries:
            clock.now += 1
            copies.put(message(refused), "work", 1, 0)
            if refused.tries == tries:
                continue
        pauses.append(clock.now - began)
        clock.now += LAST_PAUSE
    assert pauses[0] == FIRST_PAUSE
    assert pauses == sorted(pauses)
    assert max(pauses) <= LAST_PAUSE


def test_a_server_that_is_away_is_not_waited_for() -> None:
    """kombu tries for ever to connect a channel by itself."""
    connection = kombu.Connection(f"amqp://127.0.0.1:{free_port()}//")
    assert not Behind().put(message(connection), "work", 1, 0)
    assert connection.transport_options == {}, "the worker's own"


def test_a_copy_has_none_of_the_counts_of_its_message() -> None:
    first = message(None)
    first.headers |= {COUNT: 1, ACQUIRED: 2}
    assert behind._copy(first, 3, 1).properties["application_headers"] == {
        "id": "a",
        DELIVERIES: 3,
        VOUCHED: 1,
        ADDRESS: ["", ""],
    }


def test_a_message_that_comes_while_a_copy_is_on_its_way_does_not_wait_for_it() -> None:
    """A signal's handler reads messages."""
    copies, inner = Behind(), []

    class Interrupted(Refused):
        def clone(self, **_: Any) -> Any:
            inner.append(copies.put(message(self), "work", 1, 0))
            return super().clone()

    interrupted = Interrupted()
    assert not copies.put(message(interrupted), "work", 1, 0)
    assert (inner, interrupted.tries) == ([False], 1)


@pytest.fixture
def on_signal() -> Iterator[list[Any]]:
    """Calls what is in the list when the signal comes."""
    calls: list[Any] = []
    former = signal.signal(signal.SIGUSR1, lambda *_: calls[0]())
    yield calls
    signal.signal(signal.SIGUSR1, former)


def test_a_signal_in_the_middle_of_a_write_can_not_write_and_does_not_wait_for_ever(on_signal: list[Any]) -> None:
    """As Celery's handler of SIGQUIT does, which cancels the consumers."""
    written, errors = [], []

    def write(_: Any) -> None:
        written.append(1)
        if len(written) == 1:
            signal.raise_signal(signal.SIGUSR1)

    connection = enduring(pyamqp.Transport).Connection(host="nowhere", frame_writer=amqp.method_framing.frame_writer)
    send = connection.frame_writer_cls(connection, SimpleNamespace(write=write))

    def handler() -> None:
        try:
            send(8, 0, None, None, None)
        except InterruptedWriteError as error:
            errors.append(error)

    on_signal.append(handler)
    send(8, 0, (1, 1), b"", None)
    assert (len(written), len(errors)) == (1, 1)
    send(8, 0, (1, 1), b"", None)
    assert len(written) == 2, "and the next write goes out"
