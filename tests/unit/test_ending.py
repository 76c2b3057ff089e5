"""How a worker ends, without Celery's consumer: which tasks end, which go back, and that none keeps the rest."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from math import inf
from types import SimpleNamespace
from typing import Any

import pytest
from celery.worker import state
from pools import LOST, PlayedPool

from legit_worker import parking
from legit_worker.pool import ending, fibers
from legit_worker.pool.ending import Ending
from legit_worker.pool.fibers import Phase


class Soft:
    """A soft shutdown that the test plays."""

    until = until_if_begun = inf
    has_begun = False

    def __init__(self) -> None:
        self.cancelled: list[int] = []
        self.running: Any = None

    def is_called_by_handler(self) -> bool:
        """No signal came."""
        return False

    def cancel_rest(self) -> None:
        """Note how many tasks were left."""
        self.cancelled.append(len(self.running))


class Subject(PlayedPool):
    """A pool that can end."""

    def __init__(self) -> None:
        super().__init__()
        self.soft: Any = Soft()
        self.soft.running = self.running
        self.steps: list[str] = []
        reports: Any = SimpleNamespace(finishing=lambda waits: None)
        self.ending = Ending(
            loop=self.loop,
            running=self.running,
            engine=self.engine,
            intake=self.intake,
            soft=self.soft,
            reports=reports,
            release=lambda: self.steps.append("released"),
        )


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Subject]:
    monkeypatch.setattr(state, "should_stop", None)
    monkeypatch.setattr(ending, "LOOK", 0.01)
    yield Subject()
    parking.stop()
    atexit.unregister(ending._leave)


def test_a_warm_shutdown_lets_all_end_that_started_and_none_begin(pool: Subject) -> None:
    for name in "abc":
        pool.send(pool.engine.call, name)
    pool.is_ending = True
    pool.send(pool.engine.call, "not begun")
    pool.ending.warm()
    assert pool.ended == ["a", "b", "c"]
    assert pool.soft.cancelled == [0]
    assert pool.steps == ["released"]


def test_no_task_begins_once_a_shutdown_has_begun_whoever_began_it(pool: Subject) -> None:
    """Celery 5.6 starts tasks with an ETA meanwhile, and its remote command `shutdown` sets no flag."""
    assert not pool.ending.is_near
    pool.ending.warm()
    assert pool.ending.is_near


def test_a_cold_shutdown_unwinds_what_waits_and_stores_nothing(pool: Subject) -> None:
    for name in "abc":
        pool.send(pool.engine.call, name)
    pool.soft.until = -inf
    pool.ending.cold()
    assert pool.results == []
    assert pool.soft.cancelled == [3], "Celery tells them before they unwind"
    assert len(pool.running) == 0


def test_a_batch_that_outlasts_the_wait_at_the_end_is_not_unwound(
    pool: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's own end would unwind its thread in C++, which ends the process by an abort."""
    registered: list[tuple[Any, ...]] = []
    monkeypatch.setattr(atexit, "register", lambda *call: registered.append(call))
    monkeypatch.setattr(ending, "FOREIGN", "no thread of another test")
    pool.engine.is_computing = True
    pool.ending.warm()
    ((_, _, must),) = registered
    assert must()
    pool.engine.is_computing = False
    assert not must()


def deliver(pool: Subject, name: str, delivered: Future[None]) -> None:
    """Have a task wait for its delivery, which is done by another thread."""

    def run() -> None:
        here = fibers.current()
        assert here is not None
        here.phase = Phase.ENDING
        assert parking.park(delivered, "its result to be routed")
        pool.steps.append(name)

    pool.send(run, name)


@pytest.mark.parametrize("is_down", [False, True])
def test_a_cold_shutdown_waits_for_deliveries_if_their_servers_take_them(
    pool: Subject, monkeypatch: pytest.MonkeyPatch, is_down: bool
) -> None:
    monkeypatch.setattr(ending, "is_any_down", lambda: is_down)
    delivered: Future[None] = Future()
    deliver(pool, "a", delivered)
    threading.Timer(0.05, delivered.set_result, [None]).start()
    pool.soft.until = -inf
    pool.ending.cold()
    assert ("a" in pool.steps) is not is_down
    assert len(pool.running) == 0


def test_a_warm_shutdown_ends_though_a_broker_that_is_away_takes_no_envelopes(
    pool: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "is_any_down", lambda: True)
    monkeypatch.setattr(ending, "is_broker_down", lambda: True)
    monkeypatch.setattr(ending, "BACKEND_SECONDS", 0.1)
    deliver(pool, "a", Future())
    pool.ending.warm()
    assert "a" not in pool.steps
    assert len(pool.running) == 0


def test_a_task_that_ends_badly_keeps_no_other_from_its_end(pool: Subject) -> None:
    cleaned: list[str] = []

    def bad(name: str) -> None:
        try:
            pool.engine.call()
        finally:
            cleaned.append(name)
            raise ValueError("in its finally")

    for name in "abc":
        pool.send(lambda name=name: bad(name), name)
    pool.soft.until = -inf
    pool.ending.cold()
    assert sorted(cleaned) == ["a", "b", "c"]
    assert pool.steps == ["released"]


def test_a_batch_that_fails_badly_does_not_stop_the_drain(pool: Subject) -> None:
    failures = [OSError("the connection is gone"), None]
    step = pool.engine.step

    def flaky() -> bool:
        pool.engine.error = failures.pop(0) if failures else None
        return bool(step())

    pool.engine.step = flaky
    pool.send(pool.engine.call)
    pool.ending.warm()
    assert pool.ended == ["task"]


def test_a_lost_device_sends_late_tasks_back_and_fails_those_acked_early(pool: Subject) -> None:
    failed: list[str] = []

    def early() -> None:
        try:
            pool.engine.call()
        except Exception as error:
            failed.append(type(error).__name__)

    done: Future[None] = Future()
    pool.send(pool.engine.call, "late")
    pool.send(early, "early", acks_late=False)
    delivers = pool.send(lambda: parking.wait(done, "a delivery"), "delivers")
    pool.running.delivering.add(delivers)
    pool.ending.give_up(LOST)
    assert state.should_stop == os.EX_SOFTWARE
    assert failed == ["DeviceLostError"]
    assert pool.results == [None], "of the one that was acked early; the late one's message goes back"
    assert list(pool.running) == [delivers]
    assert pool.ending.is_near
    assert pool.engine.is_forgotten


def test_a_device_that_is_lost_in_the_drain_ends_it(pool: Subject) -> None:
    pool.engine.error = LOST
    pool.send(pool.engine.call)
    pool.ending.warm()
    assert pool.results == []
    assert len(pool.running) == 0
