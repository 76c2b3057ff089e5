"""The watcher's looks at tasks with limits: when, how often, and that it keeps none of them."""

from __future__ import annotations

import gc
import importlib
import sys
import threading
import weakref
from math import inf
from pathlib import Path
from time import monotonic

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from greenlet import GreenletExit

from legit_worker.pool import watcher
from legit_worker.pool.fibers import Fiber
from legit_worker.pool.limits import Limit
from legit_worker.pool.running import Running
from legit_worker.pool.watcher import Watcher


class CountedLimit(Limit):
    """Counts how often it is asked."""

    asked = 0

    def due(self, own: float, now: float) -> BaseException | None:
        """As the others."""
        CountedLimit.asked += 1
        return super().due(own, now)


def limited(soft: float | None, hard: float | None = None) -> Fiber:
    fiber = Fiber(lambda: None, app="", name="task")
    fiber.limit = CountedLimit(soft=soft, hard=hard, on_timeout=lambda is_soft, seconds: None)
    return fiber


def watching(running: Running) -> Watcher:
    return Watcher(running=running, wake=lambda: None, stall_seconds=60)


def test_each_task_is_looked_at_when_it_begins_and_then_when_its_limit_can_be_over() -> None:
    CountedLimit.asked = 0
    running = Running()
    subject = watching(running)
    tasks = [limited(3600) for _ in range(4096)]
    for fiber in tasks:
        running.add(fiber)
        subject.follow(fiber)
    for _ in range(50):
        subject._look_at_limits()
    assert CountedLimit.asked == len(tasks)


def test_what_is_due_is_handed_to_the_loop_once() -> None:
    running = Running()
    subject = watching(running)
    late, other = limited(0.0001), limited(3600)
    with late.clock.running():
        for fiber in (late, other):
            running.add(fiber)
            subject.follow(fiber)
        while not (due := subject.take_due()):
            subject._look_at_limits()
    assert due == [late]
    assert isinstance(late.pending, SoftTimeLimitExceeded)
    assert subject.take_due() == []


def test_a_limit_does_not_replace_the_end_of_a_task_that_was_cancelled() -> None:
    running = Running()
    subject = watching(running)
    fiber = Fiber(lambda: None, app="", name="task")
    fiber.limit = Limit(soft=None, hard=0.0001, on_timeout=lambda is_soft, seconds: None)
    fiber.pending = ended = GreenletExit()
    with fiber.clock.running():
        running.add(fiber)
        subject.follow(fiber)
        while not subject.take_due():
            subject._look_at_limits()
    assert fiber.pending is ended


def test_a_task_without_a_limit_and_without_a_bound_on_waiting_is_not_followed() -> None:
    subject = watching(Running())
    subject.follow(Fiber(lambda: None, app="", name="task"))
    assert not subject._begun
    bounded = Fiber(lambda: None, app="", name="task")
    bounded.max_wait = 1.0
    subject.follow(bounded)
    assert len(subject._begun) == 1


def test_a_task_that_is_over_is_kept_by_none_of_the_looks_to_come() -> None:
    running = Running()
    subject = watching(running)
    gc.disable()
    try:
        ended = []
        for _ in range(10 * watcher.SPARE):
            fiber = limited(3600, inf)
            running.add(fiber)
            subject.follow(fiber)
            fiber.resume()
            running.discard(fiber)
            ended.append(weakref.ref(fiber))
        del fiber
        assert not any(gone() for gone in ended)
        subject._look_at_limits()
        assert len(subject._looks) <= watcher.SPARE
    finally:
        gc.enable()


def test_a_wait_for_another_threads_import_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, goes_on = threading.Event(), threading.Event()
    monkeypatch.setattr(sys, "imported_slowly", (begun, goes_on), raising=False)
    (tmp_path / "imported_slowly.py").write_text(
        "import sys\nbegun, goes_on = sys.imported_slowly\nbegun.set()\ngoes_on.wait(30)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    threads = [threading.Thread(target=importlib.import_module, args=("imported_slowly",)) for _ in range(2)]
    threads[0].start()
    assert begun.wait(30)
    threads[1].start()
    until = monotonic() + 30
    while not watcher.waits_for_import(sys._current_frames().get(threads[1].ident or 0)):
        assert monotonic() < until
    assert not watcher.waits_for_import(sys._current_frames().get(threads[0].ident or 0))
    goes_on.set()
    for thread in threads:
        thread.join()
