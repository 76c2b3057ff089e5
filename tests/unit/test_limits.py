"""Which limits there are, when they are over, and where a task's own code may be interrupted."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
from celery import Celery
from celery.app.trace import trace_task_ret
from celery.exceptions import SoftTimeLimitExceeded
from greenlet import greenlet

from legit_worker.pool import watcher
from legit_worker.pool.fibers import Fiber, run_task
from legit_worker.pool.limits import AGAIN, Limit, TimeLimitPassed, is_in_body
from legit_worker.pool.watcher import SIGNAL

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
    task = partial(run_task, target, args, {}, Looked(asked, "callback"), Looked(asked, "accepted"))
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

    fiber = Fiber(partial(run_task, task, (), {}, print, None), app="", name="task")
    with pytest.raises(SoftTimeLimitExceeded):
        fiber.resume()


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
