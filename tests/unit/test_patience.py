"""How much of RabbitMQ's connection is read at each turn of the hub."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from kombu.transport.base import Transport

from legit_worker.broker import patience


class Hub:
    """Calls soon what it was asked to, and before that what is readable, as kombu's."""

    def __init__(self) -> None:
        self.soon: list[Callable[[], None]] = []

    def call_soon(self, callback: Callable[..., None], *args: object) -> None:
        self.soon.append(lambda: callback(*args))

    def turn(self, on_readable: Callable[[], None]) -> None:
        soon, self.soon = self.soon, []
        for call in soon:
            call()
        on_readable()


class Connection:
    """Has so many messages. Where it is TLS, it may have read them all from its socket by now."""

    connected = True

    def __init__(self, messages: int) -> None:
        self.left, self.read = messages, 0

    def drain_events(self, timeout: float) -> None:
        if not self.left:
            raise TimeoutError
        self.left, self.read = self.left - 1, self.read + 1


class Patient(patience.PatientTransport, Transport):
    """As a worker's."""


Turn = Callable[[], int]


@pytest.fixture
def hub() -> Hub:
    return Hub()


@pytest.fixture
def turns(hub: Hub) -> Callable[..., Turn]:
    def of(connection: Connection, *, is_readable: Callable[[], bool] = lambda: True) -> Turn:
        transport = Patient(client=None)

        def turn() -> int:
            before = connection.read
            hub.turn(lambda: transport.on_readable(connection, hub) if is_readable() else None)
            return connection.read - before

        return turn

    return of


def test_without_hurry_it_is_read_as_by_kombu(hub: Hub, turns: Callable[..., Turn]) -> None:
    turn = turns(Connection(100))
    assert [turn() for _ in range(4)] == [1, 2, 3, 4]


def test_in_a_hurry_one_message_is_read_at_each_turn_and_all_in_the_end(
    hub: Hub, turns: Callable[..., Turn], monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = Connection(100)
    turn = turns(connection)
    for _ in range(4):
        turn()
    monkeypatch.setattr(patience, "is_hurried", lambda: True)
    assert [turn() for _ in range(50)] == [1] * 50
    assert len(hub.soon) == 1
    monkeypatch.setattr(patience, "is_hurried", lambda: False)
    while connection.left:
        assert turn()
    turn()
    assert not hub.soon


def test_in_a_hurry_what_tls_has_read_already_is_read_though_the_socket_has_nothing(
    hub: Hub, turns: Callable[..., Turn], monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = Connection(10)
    turn = turns(connection, is_readable=lambda: connection.left == 10)
    monkeypatch.setattr(patience, "is_hurried", lambda: True)
    assert [turn() for _ in range(11)] == [1] * 10 + [0]


class Channel:
    """Gets an answer behind a message."""

    def __init__(self, message: Callable[[], None]) -> None:
        self._message = message

    def wait(self, method: object, timeout: float | None = None) -> str:
        self._message()
        return f"{method} within {timeout}"


class PatientChannel(patience.PatientChannel, Channel):
    """As a worker's."""


def test_a_message_before_an_answer_learns_that_one_is_awaited() -> None:
    heard: list[bool] = []

    def message() -> None:
        heard.append(patience.is_answer_awaited())

    def command() -> None:
        PatientChannel(message).wait("inner")
        message()

    assert PatientChannel(command).wait("qos", timeout=3) == "qos within 3"
    assert heard == [True, True]
    assert not patience.is_answer_awaited()


def test_no_answer_is_awaited_any_more_once_the_connection_is_lost() -> None:
    def lost() -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        PatientChannel(lost).wait("qos")
    assert not patience.is_answer_awaited()
