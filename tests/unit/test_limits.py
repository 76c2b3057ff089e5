"""Where a task's own code may be interrupted."""

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
from legit_worker.pool.limits import is_in_body
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
