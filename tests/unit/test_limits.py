"""Which limits there are, when they are over, and where a task's own code may be interrupted."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from math import inf, nan
from types import FrameType
from typing import Any

import pytest
from celery import Celery
from celery.app.trace import build_tracer, trace_task_ret
from celery.exceptions import SoftTimeLimitExceeded
from greenlet import greenlet
from harness import poll
from jobs import job

from legit_worker.device.streams import StreamLaunch, Streams
from legit_worker.errors import InvalidInputError
from legit_worker.pool import fibers, watcher
from legit_worker.pool.bodies import mark_body
from legit_worker.pool.fibers import Fiber, Phase
from legit_worker.pool.limits import AGAIN, Limit, TimeLimitPassed, seconds_of
from legit_worker.pool.running import Running
from legit_worker.pool.watcher import SIGNAL, Watcher

#: What was asked, in order: where, and in which phase.
Asked = list[tuple[str, Phase]]


class Looked:
    """A function that looks in which phase it is."""

    def __init__(self, asked: Asked, where: str) -> None:
        self.asked, self.where = asked, where

    def __call__(self, *_: Any, **__: Any) -> None:
        fiber = fibers.current()
        assert fiber is not None
        self.asked.append((self.where, fiber.phase))


def run(target: Any, args: tuple[Any, ...], asked: Asked) -> None:
    """As the pool does."""
    told = {
        where: Looked(asked, where.partition("_")[0]) for where in ("callback", "error_callback", "accept_callback")
    }
    Fiber(job(target, *args, **told).run, app="", name="task").resume()


def test_what_is_no_task_of_celerys_is_its_own_and_what_is_told_of_it_is_not() -> None:
    asked: Asked = []
    run(Looked(asked, "body"), (), asked)
    assert asked == [("accept", Phase.NEW), ("body", Phase.BODY), ("callback", Phase.ENDING)]


class RetriedError(Exception):
    """What a task with `autoretry_for` may raise."""


def plain(app: Celery, looks: Looked) -> None:
    app.task(looks.__call__, name="looks", ignore_result=True, shared=False)


def with_autoretry(app: Celery, looks: Looked) -> None:
    def tries() -> None:
        looks()

    app.task(tries, name="looks", ignore_result=True, shared=False, autoretry_for=(RetriedError,))


def with_pydantic(app: Celery, looks: Looked) -> None:
    def checked() -> None:
        looks()

    app.task(checked, name="looks", ignore_result=True, shared=False, pydantic=True)


def with_a_call_of_its_own(app: Celery, looks: Looked) -> None:
    class Called(app.Task):  # type: ignore[misc, name-defined]
        name, ignore_result = "looks", True

        def __call__(self) -> None:
            looks()

        def run(self) -> None:
            """Never."""

    app.register_task(Called())


def with_a_beginning(app: Celery, looks: Looked) -> None:
    class Begins(app.Task):  # type: ignore[misc, name-defined]
        name, ignore_result = "looks", True

        def before_start(self, *_: Any) -> None:
            Looked(looks.asked, "body")()

        def run(self) -> None:
            """Nothing."""

    app.register_task(Begins())


KINDS = [plain, with_autoretry, with_pydantic, with_a_call_of_its_own, with_a_beginning]


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_of_a_task_its_own_code_can_be_interrupted_and_what_celery_does_around_it_can_not(
    make: Callable[[Celery, Looked], None],
) -> None:
    app = Celery("limits", set_as_current=False)
    asked: Asked = []
    make(app, Looked(asked, "body"))
    app.finalize()
    task = app.tasks["looks"]
    task.__trace__ = mark_body(build_tracer("looks", task, app=app))

    def loads(*_: Any, **__: Any) -> Any:
        Looked(asked, "message")()
        return (), {}, {}

    request = {"id": "one", "task": "looks", "delivery_info": {}}
    run(partial(trace_task_ret, loads=loads, app=app), ("looks", "one", request, "", "json", "utf-8"), asked)
    phases = [("accept", Phase.NEW), ("message", Phase.NEW), ("body", Phase.BODY), ("callback", Phase.ENDING)]
    assert asked == phases


def test_each_of_a_mapped_tasks_calls_is_its_own_code() -> None:
    app = Celery("limits", set_as_current=False)
    asked: Asked = []
    plain(app, Looked(asked, "body"))
    app.finalize()
    task = app.tasks["celery.starmap"]
    task.__trace__ = mark_body(build_tracer(task.name, task, app=app))
    loads = lambda *_, **__: ((app.signature("looks"), [(), ()]), {}, {})  # noqa: E731
    request = {"id": "one", "task": task.name, "delivery_info": {}}
    run(partial(trace_task_ret, loads=loads, app=app), (task.name, "one", request, "", "json", "utf-8"), asked)
    assert asked == [("accept", Phase.NEW), *[("body", Phase.BODY)] * 2, ("callback", Phase.ENDING)]


def test_what_the_task_runs_below_another_librarys_greenlet_is_its_own() -> None:
    def task() -> None:
        fiber.pending = SoftTimeLimitExceeded()
        greenlet(lambda: watcher.interrupt(SIGNAL, None)).switch()

    fiber = Fiber(job(task).run, app="", name="task")
    with pytest.raises(SoftTimeLimitExceeded):
        fiber.resume()


def test_what_is_due_while_a_fork_waits_for_batches_is_raised_after_the_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python drops what a hook of a fork raises."""
    forked: list[bool] = []

    def compute() -> None:
        is_waiting.wait(20)
        fiber.pending = SoftTimeLimitExceeded()
        signal.pthread_kill(threading.main_thread().ident or 0, SIGNAL)
        poll(lambda: handled, "the signal")

    def handle(signum: int, frame: FrameType | None) -> None:
        handled.append(signum)
        watcher.interrupt(signum, frame)

    def task() -> None:
        streams.launch(compute, lambda: None, lambda: None)
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        forked.append(True)
        signal.raise_signal(SIGNAL)

    streams, is_waiting, handled = Streams(), threading.Event(), list[int]()
    streams.count = 1
    wait = StreamLaunch.wait
    monkeypatch.setattr(StreamLaunch, "wait", lambda launch: (is_waiting.set(), wait(launch)))
    before = signal.signal(SIGNAL, handle)
    try:
        fiber = Fiber(job(task).run, app="", name="task")
        with pytest.raises(SoftTimeLimitExceeded):
            fiber.resume()
    finally:
        signal.signal(SIGNAL, before)
    assert forked
    assert len(handled) == 2


#: A fork in a task, while whose hooks a limit is due. The hook is there before this package's, as logging's is.
FORKS = """
import os, signal
os.register_at_fork(after_in_parent=lambda: signal.raise_signal(signal.SIGVTALRM))

from celery.exceptions import SoftTimeLimitExceeded
from legit_worker.pool import watcher
from legit_worker.pool.fibers import Fiber, Phase

def task():
    fiber.phase, fiber.pending = Phase.BODY, SoftTimeLimitExceeded()
    if os.fork() == 0:
        os._exit(0)
    assert fiber.pending is not None, "dropped"
    signal.raise_signal(signal.SIGVTALRM)

signal.signal(signal.SIGVTALRM, watcher.interrupt)
fiber = Fiber(task, app="", name="task")
try:
    fiber.resume()
except SoftTimeLimitExceeded:
    print("raised after the fork")
"""


def test_what_is_due_in_another_librarys_hook_of_a_fork_is_raised_after_the_fork() -> None:
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("raised after the fork\n", "")


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
    tasks = [Fiber(lambda: None, app="", name=f"task {number}") for number in range(3)]
    for fiber in tasks:
        fiber.limit = Unlookable()  # type: ignore[assignment]
    tasks[1].limit = Limit(soft=0.001, hard=0.3, on_timeout=lambda is_soft, seconds: None)
    running = Running()
    for task in tasks:
        running.add(task)
    subject = Watcher(running=running, wake=lambda: None, stall_seconds=60)
    with caplog.at_level(logging.ERROR), tasks[1].clock.running():
        subject.start()
        for task in tasks:
            subject.follow(task)
        try:
            poll(lambda: isinstance(tasks[1].pending, SoftTimeLimitExceeded), "the one that can be looked at")
            poll(lambda: isinstance(tasks[1].pending, TimeLimitPassed), "a later look")
        finally:
            subject.stop()
    assert set(subject.take_due()) == {tasks[1]}
    assert len([record for record in caplog.records if "the watcher failed" in record.message]) == 1


@pytest.mark.parametrize("value", [10**400, "x" * 10_000, {"a" * 1000: ["b" * 1000] * 1000}])
def test_a_large_value_is_refused_by_its_beginning(value: Any) -> None:
    with pytest.raises(InvalidInputError) as error:
        seconds_of(value, "the limit")
    assert len(str(error.value)) < 600
