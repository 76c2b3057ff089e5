"""Tasks that have not started: those that are acked early wait in a line of their own."""

from __future__ import annotations

from legit_worker.pool.backlog import Backlog
from legit_worker.pool.fibers import Fiber


def backlog(*kinds: str) -> Backlog:
    subject = Backlog()
    for number, kind in enumerate(kinds):
        subject.append(Fiber(lambda: None, app="", name=f"{kind} {number}", acks_late=kind == "late"))
    return subject


def taken(subject: Backlog, *, early: bool) -> list[str]:
    fibers = iter(lambda: subject.take(lambda fiber: fiber.acks_late or early), None)
    return [fiber.name for fiber in fibers]


def test_all_start_in_the_order_in_which_they_came_if_both_kinds_may() -> None:
    subject = backlog("early", "late", "late", "early")
    assert taken(subject, early=True) == ["early 0", "late 1", "late 2", "early 3"]
    assert len(subject) == 0


def test_those_that_may_not_start_hold_up_no_others() -> None:
    subject = backlog("early", "early", "late", "early", "late")
    assert taken(subject, early=False) == ["late 2", "late 4"]
    assert len(subject) == 3
    assert taken(subject, early=True) == ["early 0", "early 1", "early 3"]


def test_what_the_broker_gives_to_others_is_forgotten() -> None:
    subject = backlog("early", "late")
    subject.clear()
    assert len(subject) == 0
    assert taken(subject, early=True) == []
