"""Fibers: what is a task's own, and who gets control when."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import weakref
from contextvars import ContextVar

import pytest
import torch
from celery.result import allow_join_result, denied_join_result, task_join_will_block
from greenlet import greenlet
from jobs import job

import legit_worker
from legit_worker.pool import fibers
from legit_worker.pool.fibers import Fiber, fiber_of

name: ContextVar[str] = ContextVar("name", default="nobody")


def fiber(run: object, **options: bool) -> Fiber:
    return Fiber(run, app="", name="a test", **options)  # type: ignore[arg-type]


def test_context_variables_of_one_task_are_not_seen_in_another_nor_in_the_loop() -> None:
    seen = []

    def task(mine: str) -> None:
        seen.append(name.get())
        name.set(mine)
        here.park("a model")
        seen.append(name.get())

    for mine in ("a", "b"):
        here = fiber(lambda mine=mine: task(mine))
        here.resume()
        assert name.get() == "nobody"
        here.resume()
    assert seen == ["nobody", "a", "nobody", "b"]


def test_the_pid_is_the_process_and_leads_back_to_the_fiber() -> None:
    subject = fiber(lambda: None)
    assert subject.pid == os.getpid()
    assert json.dumps(subject.pid) == str(os.getpid())
    assert fiber_of(subject.pid) is subject


def test_a_fiber_that_was_parked_while_the_collector_ran_goes_when_it_ends() -> None:
    def target() -> None:
        current = fibers.current()
        assert current is not None
        current.park("a model")

    told: list[int] = []
    subject = fiber(job(target, accept_callback=lambda pid, _: told.append(pid)).run)
    subject.resume()
    gc.collect()
    subject.resume()
    assert subject.dead
    gone = weakref.ref(subject)
    del subject
    gc.collect()
    assert gone() is None
    assert fiber_of(told[0]) is None


def test_leave_to_join_results_stays_with_the_task_that_took_it() -> None:
    """Celery keeps it in one flag for the process. The blocks overlap, and the one that began first ends first."""
    seen = []

    def task() -> None:
        with allow_join_result():
            here.park("a model")
            seen.append(task_join_will_block())
        seen.append(task_join_will_block())

    with denied_join_result():
        tasks = []
        for _ in range(2):
            here = fiber(task)
            here.resume()
            tasks.append(here)
            assert task_join_will_block()
        for here in tasks:
            here.resume()
            assert task_join_will_block()
    assert seen == [False, True] * 2


def test_a_terminated_fiber_runs_its_finally_and_goes_no_further() -> None:
    steps = []

    def task() -> None:
        try:
            subject.park("a model")
            steps.append("went on")
        finally:
            steps.append("cleaned up")

    subject = fiber(task)
    subject.resume()
    subject.terminate()
    assert steps == ["cleaned up"]
    assert subject.dead


def test_a_fiber_can_be_terminated_from_within_another_which_then_goes_on_as_it_was() -> None:
    seen = []

    def task() -> None:
        with denied_join_result():
            parked.park("a model")

    def other() -> None:
        with allow_join_result(), torch.inference_mode():
            parked.terminate()
            seen.append((task_join_will_block(), torch.is_inference_mode_enabled()))

    with denied_join_result():
        parked = fiber(task)
        parked.resume()
        fiber(other).resume()
    assert parked.dead
    assert seen == [(False, True)]


def test_a_task_that_is_revoked_as_it_is_accepted_never_runs_its_own_code() -> None:
    ran: list[str] = []

    life = job(
        lambda: ran.append("its own code"),
        callback=lambda _: ran.append("stored"),
        error_callback=lambda _: ran.append("failed"),
        accept_callback=lambda *_: subject.terminate(),
    )
    subject = fiber(life.run)
    subject.resume()
    assert subject.dead
    assert ran == []


def test_outside_a_fiber_there_is_none_and_exclusive_does_nothing() -> None:
    with legit_worker.exclusive():
        assert fibers.current() is None


@pytest.mark.parametrize("exclusive", [True, False])
def test_a_task_may_park_unless_it_was_made_exclusive(exclusive: bool) -> None:
    seen: list[bool] = []
    subject = fiber(lambda: seen.append(subject.may_park()), exclusive=exclusive)
    subject.resume()
    assert seen == [not exclusive]


def test_exclusive_sections_nest() -> None:
    seen = []

    def task() -> None:
        with legit_worker.exclusive():
            with legit_worker.exclusive():
                seen.append(subject.may_park())
            seen.append(subject.may_park())
        seen.append(subject.may_park())

    subject = fiber(task)
    subject.resume()
    assert seen == [False, False, True]


def test_it_may_not_park_below_an_event_loop_or_another_librarys_greenlet() -> None:
    seen = []

    async def coroutine() -> None:
        seen.append(subject.may_park())

    def task() -> None:
        asyncio.run(coroutine())
        greenlet(lambda: seen.append(fibers.current() is subject and subject.may_park())).switch()
        seen.append(subject.may_park())

    subject = fiber(task)
    subject.resume()
    assert seen == [False, False, True]
