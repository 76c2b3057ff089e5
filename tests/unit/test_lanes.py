"""Every delivery reaches its server or the dead letters, whatever the server does meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from time import monotonic

import pytest
from harness import poll

from legit_worker.routing import lane as lanes
from legit_worker.routing import waiting
from legit_worker.routing.delivery import AwayError, Delivery, NotNowError, Outcome
from legit_worker.routing.lane import Lane, tell
from legit_worker.settings import AppSettings

#: Seconds for what takes milliseconds.
SOON = 20


class Server:
    """A wire, and the server behind it."""

    name = "server"
    group_size = 3

    def __init__(self) -> None:
        self.is_there = True
        self.got: list[str] = []
        self.refuses: set[str] = set()
        #: Queues that take nothing now.
        self.full: set[str] = set()
        self.kills: BaseException | None = None
        self.groups: list[int] = []
        self.tried = threading.Event()

    def send(self, deliveries: list[Delivery]) -> Iterator[Outcome]:
        self.tried.set()
        if self.kills:
            error, self.kills = self.kills, None
            raise error
        if not self.is_there:
            raise AwayError("nobody there")
        self.groups.append(len(deliveries))
        for delivery in deliveries:
            if delivery.task_id in self.refuses:
                yield delivery, ValueError("not this one")
            elif delivery.queue in self.full:
                yield delivery, NotNowError("full")
            else:
                self.got.append(delivery.task_id)
                yield delivery, None

    def close(self) -> None:
        """Nothing to forget."""


class Dead:
    """The dead letters."""

    def __init__(self) -> None:
        self.letters: dict[str, str] = {}

    def __call__(self, delivery: Delivery, reason: str) -> None:
        self.letters[delivery.task_id] = reason
        tell(delivery.done)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (lanes, waiting):
        monkeypatch.setattr(module, "FIRST_RETRY", 0.001)
        monkeypatch.setattr(module, "LAST_RETRY", 0.01)


def delivery(name: str, size: int = 10, deadline: float | None = None, queue: str = "q") -> Delivery:
    return Delivery(app="vod", chosen=AppSettings(), queue=queue, task_id=name, envelope=b"x" * size, deadline=deadline)


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


def test_what_waits_is_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "MAX_WAITING", 2)
    server, dead = Server(), Dead()
    server.is_there = False
    lane = Lane(server, dead)
    sent = [delivery(name) for name in ("first", "second", "third")]
    for one in sent:
        lane.add(one)
    assert dead.letters == {"third": "2 results wait for the same server"}
    server.is_there = True
    for one in sent:
        one.done.result(SOON)
    assert server.got == ["first", "second"]


def test_a_full_queue_holds_up_no_other_queue_of_its_server() -> None:
    server, dead = Server(), Dead()
    server.full = {"full"}
    lane = Lane(server, dead)
    waiting = [delivery(f"full {number}", queue="full") for number in range(5)]
    others = [delivery(str(number)) for number in range(5)]
    for pair in zip(waiting, others, strict=True):
        for one in pair:
            lane.add(one)
    for one in others:
        one.done.result(SOON)
    assert lane.waiting() == {"vod": 5}
    server.full.clear()
    for one in waiting:
        one.done.result(SOON)
    assert server.got[5:] == [one.task_id for one in waiting], "in order"
    assert not lane.waiting()
    assert dead.letters == {}


def test_one_that_waits_too_long_for_a_full_queue_goes_to_the_dead_letters() -> None:
    server, dead = Server(), Dead()
    server.full = {"full"}
    lane = Lane(server, dead)
    overdue, patient = delivery("overdue", deadline=monotonic(), queue="full"), delivery("patient", queue="full")
    lane.add(overdue)
    lane.add(patient)
    overdue.done.result(SOON)
    assert "full" in dead.letters["overdue"]
    assert lane.waiting() == {"vod": 1}


def test_a_dead_letter_that_is_refused_waits_and_holds_up_no_other_apps() -> None:
    server = Server()
    server.refuses = {"refused"}
    lane = Lane(server, None)
    refused, other = delivery("refused", queue="legit.dead.a"), delivery("other", queue="legit.dead.b")
    lane.add(refused)
    lane.add(other)
    other.done.result(SOON)
    assert not refused.done.done(), "its task would be acked, and the result lost"
    server.refuses.clear()
    refused.done.result(SOON)
    assert server.got == ["other", "refused"]


@pytest.mark.parametrize("group_size", [1, 3])
def test_a_dead_letter_that_is_refused_holds_up_no_other_of_its_app(group_size: int) -> None:
    server = Server()
    server.refuses, server.group_size = {"refused"}, group_size
    lane = Lane(server, None)
    sent = [delivery(name) for name in ("refused", "second", "third")]
    for one in sent:
        lane.add(one)
    for one in sent[1:]:
        one.done.result(SOON)
    later = delivery("later")
    lane.add(later)
    later.done.result(SOON)
    assert not sent[0].done.done()
    server.refuses.clear()
    sent[0].done.result(SOON)


def test_if_the_dead_letters_are_on_the_same_server_an_overdue_one_waits_for_it() -> None:
    server, dead = Server(), Dead()
    server.is_there = False
    lane = Lane(server, dead, is_brokers=True)
    overdue = delivery("overdue", deadline=monotonic())
    lane.add(overdue)
    poll(lambda: lane.is_down, "the lane to see it")
    lane.give_up(overdue)
    assert lane.waiting() == {"vod": 1}
    server.is_there = True
    overdue.done.result(SOON)
    assert server.got == ["overdue"]
    assert dead.letters == {}


@pytest.mark.parametrize("error", [ValueError("a bug"), SystemExit(), MemoryError(), KeyboardInterrupt()])
def test_whatever_ends_a_turn_what_waits_goes_on(error: BaseException) -> None:
    server, dead = Server(), Dead()
    server.is_there = False
    lane = Lane(server, dead)
    sent = [delivery(str(number)) for number in range(5)]
    for one in sent:
        lane.add(one)
    poll(lambda: lane.is_down, "the lane to see it")
    server.is_there, server.kills = True, error
    for one in sent:
        one.done.result(SOON)
    assert sorted(server.got + list(dead.letters)) == [one.task_id for one in sent]
    assert dead.letters == {}


def test_a_thread_that_is_gone_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    monkeypatch.setattr(Lane, "_run", lambda lane: None)
    lane = Lane(server, Dead())
    first = delivery("first")
    lane.add(first)
    monkeypatch.undo()
    lane._thread.join(SOON)
    second = delivery("second")
    lane.add(second)
    for one in (first, second):
        one.done.result(SOON)
    assert server.got == ["first", "second"]


def test_a_delivery_and_its_dead_letter_may_arrive_both() -> None:
    """They have one future, and two lanes fulfil it."""
    one = delivery("one")
    letter = replace(one, queue="legit.dead.vod")
    lanes_of_both = [Lane(Server(), None), Lane(Server(), None)]
    for lane, part in zip(lanes_of_both, (one, letter), strict=True):
        lane.add(part)
    one.done.result(SOON)
    poll(lambda: not any(lane.waiting() for lane in lanes_of_both), "both to arrive")
    for lane in lanes_of_both:
        again = delivery("again")
        lane.add(again)
        again.done.result(SOON)


def test_one_that_can_not_become_a_dead_letter_waits() -> None:
    server, dead = Server(), Dead()
    server.refuses = {"one"}
    fails = [OSError("no server for dead letters")]

    def bury(delivery: Delivery, reason: str) -> None:
        if fails:
            raise fails.pop()
        dead(delivery, reason)

    lane = Lane(server, bury)
    one = delivery("one")
    lane.add(one)
    one.done.result(SOON)
    assert list(dead.letters) == ["one"]
