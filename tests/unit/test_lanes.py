"""Every delivery reaches its server or the dead letters, whatever the server does meanwhile."""

from __future__ import annotations

import threading
from time import monotonic

import pytest

from legit_worker.routing import lanes
from legit_worker.routing.lanes import Lane
from legit_worker.routing.wires import Delivery
from legit_worker.settings import AppSettings

#: Seconds for what takes milliseconds.
SOON = 20


class Server:
    """A wire, and the server behind it."""

    name = "server"
    away = (OSError,)
    group_size = 3

    def __init__(self) -> None:
        self.is_there = True
        self.got: list[str] = []
        self.refuses: set[str] = set()
        self.groups: list[int] = []
        self.tried = threading.Event()

    def send(self, deliveries: list[Delivery]) -> None:
        self.tried.set()
        if not self.is_there:
            raise ConnectionRefusedError("nobody there")
        if self.refuses.intersection(delivery.task_id for delivery in deliveries):
            raise ValueError("not this one")
        self.groups.append(len(deliveries))
        self.got += [delivery.task_id for delivery in deliveries]

    def close(self) -> None:
        """Nothing to forget."""


class Dead:
    """The dead letters."""

    def __init__(self) -> None:
        self.letters: dict[str, str] = {}

    def __call__(self, delivery: Delivery, reason: str) -> None:
        self.letters[delivery.task_id] = reason
        delivery.done.set_result(None)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "FIRST_RETRY", 0.001)
    monkeypatch.setattr(lanes, "LAST_RETRY", 0.01)


def delivery(name: str, size: int = 10, deadline: float | None = None) -> Delivery:
    return Delivery(app="vod", chosen=AppSettings(), queue="q", task_id=name, envelope=b"x" * size, deadline=deadline)


def test_deliveries_arrive_in_order() -> None:
    server = Server()
    lane = Lane(server, Dead())
    sent = [delivery(str(number)) for number in range(20)]
    for one in sent:
        lane.add(one)
    for one in sent:
        one.done.result(SOON)
    assert server.got == [one.task_id for one in sent]
    assert max(server.groups) <= Server.group_size
    assert not lane.waiting()


def test_they_wait_for_a_server_that_comes_back() -> None:
    server, dead = Server(), Dead()
    server.is_there = False
    lane = Lane(server, dead)
    sent = [delivery(str(number)) for number in range(7)]
    for one in sent:
        lane.add(one)
    while not lane.is_down:
        server.tried.wait(SOON)
    assert lane.waiting() == {"vod": 7}
    assert not any(one.done.done() for one in sent)
    server.is_there = True
    for one in sent:
        one.done.result(SOON)
    assert server.got == [one.task_id for one in sent]
    assert dead.letters == {}


def test_one_that_is_overdue_goes_to_the_dead_letters_and_the_others_go_on_waiting() -> None:
    server, dead = Server(), Dead()
    server.is_there = False
    lane = Lane(server, dead)
    patient, overdue = delivery("patient"), delivery("overdue", deadline=monotonic())
    lane.add(patient)
    lane.add(overdue)
    overdue.done.result(SOON)
    assert list(dead.letters) == ["overdue"]
    server.is_there = True
    patient.done.result(SOON)
    assert server.got == ["patient"]


def test_one_that_the_server_refuses_does_not_hold_up_its_group() -> None:
    server, dead = Server(), Dead()
    server.refuses = {"2"}
    lane = Lane(server, dead)
    sent = [delivery(str(number)) for number in range(6)]
    for one in sent:
        lane.add(one)
    for one in sent:
        one.done.result(SOON)
    assert sorted(server.got) == ["0", "1", "3", "4", "5"]
    assert "ValueError: not this one" in dead.letters["2"]


def test_what_waits_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "MAX_WAITING_BYTES", 100)
    server, dead = Server(), Dead()
    server.is_there = False
    lane = Lane(server, dead)
    fits, too_much, fits_too = delivery("fits", 60), delivery("too much", 60), delivery("fits too", 40)
    for one in (fits, too_much, fits_too):
        lane.add(one)
    assert list(dead.letters) == ["too much"]
    server.is_there = True
    fits.done.result(SOON)
    fits_too.done.result(SOON)
    later = delivery("later", 100)
    lane.add(later)
    later.done.result(SOON)
    assert server.got == ["fits", "fits too", "later"]


def test_one_that_is_given_up_is_dead_and_not_sent_again() -> None:
    server, dead = Server(), Dead()
    server.is_there = False
    lane = Lane(server, dead)
    one = delivery("one")
    lane.add(one)
    while not lane.is_down:
        server.tried.wait(SOON)
    lane.give_up(one)
    lane.give_up(one)
    assert list(dead.letters) == ["one"]
    server.is_there = True
    other = delivery("other")
    lane.add(other)
    other.done.result(SOON)
    assert server.got == ["other"]


def test_the_dead_letters_own_lane_never_gives_up() -> None:
    server = Server()
    server.is_there = False
    lane = Lane(server, None)
    one = delivery("one", deadline=monotonic())
    lane.add(one)
    lane.give_up(one)
    while not lane.is_down:
        server.tried.wait(SOON)
    assert not one.done.done()
    server.is_there = True
    one.done.result(SOON)
    assert server.got == ["one"]
