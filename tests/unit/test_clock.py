"""What counts as a task's own time, and what as waiting."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import pytest

from legit_worker.pool import clock
from legit_worker.pool.clock import Clock, Work, work_of
from legit_worker.pool.counters import Counters
from legit_worker.pool.reports import RECENT, Reports

#: Moves time on by this many seconds.
Pass = Callable[[float], None]


@pytest.fixture
def after(monkeypatch: pytest.MonkeyPatch) -> Pass:
    """The only clock there is."""
    now = [100.0]
    monkeypatch.setattr(clock, "monotonic", lambda: now[0])

    def move(seconds: float) -> None:
        now[0] += seconds

    return move


def read(subject: Clock) -> tuple[float, float]:
    """A task's own seconds, and those that it waited."""
    now = clock.monotonic()
    return subject.seconds(now), subject.waited(now)


def test_its_own_code_counts_and_its_wait_does_not(after: Pass) -> None:
    subject = Clock()
    after(5)
    assert read(subject) == (0, 0), "it has not started"
    with subject.running():
        after(2)
    after(10)
    with subject.running():
        after(1)
        assert read(subject) == (3, 10)
        with subject.stopped():
            after(4)
            assert read(subject) == (3, 14)
        after(1)
    assert read(subject) == (4, 14)


def test_a_batch_counts_from_when_the_device_gets_to_it_and_while_it_runs(after: Pass) -> None:
    subject, batch = Clock(), Work(is_batch=True)
    with subject.running():
        pass
    subject.follow(batch)
    after(3)
    assert read(subject) == (0, 3)
    assert not subject.is_in_batch
    batch.begin()
    after(2)
    assert read(subject) == (2, 3)
    assert subject.is_in_batch
    batch.end()
    after(7)  # its outputs wait to be taken
    assert read(subject) == (2, 10)
    batch.end(1.5)  # by the device's own clock
    subject.settle(batch)
    assert read(subject) == (1.5, 10.5)
    assert not subject.is_in_batch


def test_a_batch_that_many_share_counts_whole_for_each(after: Pass) -> None:
    subjects, batch = [Clock(), Clock()], Work(is_batch=True)
    batch.begin()
    for subject in subjects:
        subject.follow(batch)
    after(2)
    batch.end()
    for subject in subjects:
        subject.settle(batch)
        subject.settle(batch)  # once more changes nothing
    assert [subject.seconds(clock.monotonic()) for subject in subjects] == [2, 2]


def test_work_that_never_began_took_no_time(after: Pass) -> None:
    subject, work = Clock(), Work()
    with subject.running():
        pass
    subject.follow(work)
    after(5)
    work.end()
    subject.settle(work)
    assert read(subject) == (0, 5)


@pytest.mark.parametrize("taken_early", [True, False])
def test_a_helpers_work_begins_when_a_helper_takes_it(after: Pass, taken_early: bool) -> None:
    future: Future[int] = Future()
    if taken_early:
        future.set_running_or_notify_cancel()
    work = work_of(future)
    after(5)
    if not taken_early:
        assert work.seconds(clock.monotonic()) == 0
        future.set_running_or_notify_cancel()
        assert future.running()
    after(2)
    future.set_result(1)
    after(7)
    assert work.seconds(clock.monotonic()) == (7 if taken_early else 2)


def test_input_that_no_helper_took_is_no_work(after: Pass) -> None:
    future: Future[int] = Future()
    work = work_of(future)
    after(5)
    future.cancel()
    future.set_running_or_notify_cancel()
    assert work.seconds(clock.monotonic()) == 0


def test_the_worst_wait_is_forgotten_and_the_total_is_not() -> None:
    subject = Reports(Counters, lambda: 0)
    subject.ended(60)
    assert subject.report() == {"waited_seconds": 60, "worst_recent_wait_seconds": 60}
    for _ in range(RECENT):
        subject.ended(0.5)
    assert subject.report() == {"waited_seconds": 60 + RECENT / 2, "worst_recent_wait_seconds": 0.5}
