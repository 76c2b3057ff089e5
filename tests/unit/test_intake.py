"""How many messages are asked for, if they are large."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from legit_worker.pool.intake import Intake
from legit_worker.pool.running import Running

MIB = 2**20


class Told:
    """What the broker hears."""

    count = 0

    def want(self, count: int, *, at_most: bool) -> None:
        """Note it."""
        self.count = count


def intake(running: Running, told: Told) -> Intake:
    share: Any = SimpleNamespace(cold=lambda window: 32, most=lambda held, waiting, window: window)
    subject = Intake(
        1000,
        running,
        share,
        waiting=lambda: 0,
        aside=lambda: 0,
        is_ending=lambda: False,
        max_bytes=8 * MIB,
    )
    subject._prefetch = told  # type: ignore[assignment]
    return subject


class Task:
    """A fiber, as far as it is counted."""

    app, acks_late = "", True

    def __init__(self, size: int) -> None:
        message = SimpleNamespace(body="x" * size)
        self.request = SimpleNamespace(id=f"{size}", request_dict={}, message=message)


def fiber(size: int) -> Any:
    return Task(size)


def test_as_many_are_held_as_fit_if_they_are_as_large_as_those_that_run() -> None:
    running, told = Running(), Told()
    subject = intake(running, told)
    subject.decide()
    assert told.count == 1000
    fibers = [fiber(MIB), fiber(MIB), fiber(2 * MIB), fiber(0)]
    for one in fibers:
        running.add(one)
    subject.decide()
    assert told.count == 8
    for one in fibers:
        running.discard(one)
    assert running.bytes == 0
    subject.decide()
    assert told.count == 1000


def test_one_is_held_however_large_it_is() -> None:
    running, told = Running(), Told()
    subject = intake(running, told)
    running.add(fiber(9 * MIB))
    subject.decide()
    assert told.count == 1
