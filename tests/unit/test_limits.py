"""Which limits there are, when they are over, and where a task's own code may be interrupted."""

from __future__ import annotations

import inspect
import logging
from functools import partial
from math import inf, nan
from time import monotonic
from typing import Any

import pytest
from celery import Celery
from celery.app.trace import trace_task_ret
from celery.exceptions import SoftTimeLimitExceeded
from greenlet import greenlet
from harness import poll

from legit_worker.errors import InvalidInputError
from legit_worker.pool import watcher
from legit_worker.pool.fibers import Fiber, run_task
from legit_worker.pool.limits import AGAIN, Limit, TimeLimitPassed, is_in_body, seconds_of
from legit_worker.pool.watcher import SIGNAL, Watcher

#: What was asked, in order: where, and whether it is the task's own.
Asked = list[tuple[str, bool]]


class Looked:
    """A function that looks where it is."""

    def __init__(self, asked: Asked, where: str) -> None:
        self.asked, self.where = asked, where

    def __call__(self, *_: Any, **__: Any) -> None:
        self.asked.append((self.where, is_in_body(inspect.currentframe())))


def run(target: Any, args: tuple[Any, ...], asked: Asked) -> None:
    """As the pool does."""
    told = [Looked(asked, where) for where in ("callback", "error_callback", "accepted")]
    task = partial(run_task, target, args, {}, *told)
    Fiber(task, app="", name="task").resume()


def test_what_is_no_task_of_celerys_is_its_own_and_what_is_told_of_it_is_not() -> None:
    asked: Asked = []
    run(Looked(asked, "body"), (), asked)
    assert asked == [("accepted", False), ("body", True), ("callback", False)]


def test_of_a_task_its_function_is_its_own_and_its_message_is_not() -> None:
    app = Celery("limits", set_as_current=False)
    asked: Asked = []

    @app.task(name="looks", ignore_result=True)
    def looks() -> None:
        Looked(asked, "body")()

    app.finalize()

    def loads(*_: Any, **__: Any) -> Any:
        Looked(asked, "message")()
        return (), {}, {}

    request = {"id": "one", "task": "looks", "delivery_info": {}}
    run(partial(trace_task_ret, loads=loads, app=app), ("looks", "one", request, "", "json", "utf-8"), asked)
    assert asked == [("accepted", False), ("message", False), ("body", True), ("callback", False)]


def test_what_the_task_runs_below_another_librarys_greenlet_is_its_own() -> None:
    def task() -> None:
        fiber.overdue = SoftTimeLimitExceeded()
        greenlet(lambda: watcher.interrupt(SIGNAL, inspect.currentframe())).switch()

    fiber = Fiber(partial(run_task, task, (), {}, print, print, None), app="", name="task")
    with pytest.raises(SoftTimeLimitExceeded):
        fiber.resume()


@pytest.mark.parametrize(
    ("value", "seconds"), [(3, 3), (0.5, 0.5), ("3", 3), (" 0.5 ", 0.5), (None, None), (0, None), ("0", None)]
)
def test_a_limit_is_a_number_or_a_number_in_text_or_none(value: Any, seconds: float | None) -> None:
    assert seconds_of(value, "the limit") == seconds


@pytest.mark.parametrize("value", ["x", "", [], [3], {}, -1, "-0.5", nan, "nan", inf, "inf", True, False, b"3"])
def test_whatever_else_is_refused_by_its_value(value: Any) -> None:
    with pytest.raises(InvalidInputError) as error:
        seconds_of(value, "the limit of one[1]")
    assert f"the limit of one[1] is {value!r}: " in str(error.value)


def test_a_soft_limit_is_due_once_and_a_hard_one_again_and_again() -> None:
    told: list[tuple[bool, float]] = []
    subject = Limit(soft=1, hard=2, on_timeout=lambda is_soft, seconds: told.append((is_soft, seconds)))
    assert subject.due(0.9, 50) is None, "of its own time, and not of the time since it started"
    assert isinstance(subject.due(1.0, 51), SoftTimeLimitExceeded)
    assert subject.due(1.9, 52) is None
    assert told == [(True, 1)]
    assert isinstance(subject.due(2.0, 60), TimeLimitPassed)
    assert subject.due(2.1, 60 + AGAIN / 2) is None
    assert isinstance(subject.due(2.1, 60 + AGAIN), TimeLimitPassed), "also if it waits and has no time of its own"


class Unlookable:
    """A limit that can't be asked."""

    def due(self, own: float, now: float) -> None:
        """Raises `TypeError`, as text in place of a number would."""
        raise TypeError("'>=' not supported")


def test_a_task_that_the_watcher_cannot_look_at_takes_the_limits_from_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fibers = [Fiber(lambda: None, app="", name=f"task {number}") for number in range(3)]
    for fiber in fibers:
        fiber.limit = Unlookable()  # type: ignore[assignment]
    fibers[1].limit = Limit(soft=0.001, hard=None, on_timeout=lambda is_soft, seconds: None)
    looks: list[float] = []
    subject = Watcher(running=set(fibers), wake=lambda: looks.append(monotonic()), stall_seconds=60)
    with caplog.at_level(logging.ERROR), fibers[1].clock.running():
        subject.start()
        try:
            poll(lambda: fibers[1].overdue, "the limit of the one that can be looked at")
            fibers[1].limit = Limit(soft=None, hard=0.001, on_timeout=lambda is_soft, seconds: None)
            poll(lambda: isinstance(fibers[1].overdue, TimeLimitPassed), "a later look")
        finally:
            subject.stop()
    assert len([record for record in caplog.records if "the watcher failed" in record.message]) == 1
