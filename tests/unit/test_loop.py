"""The loop without Celery, broker or model: who runs when, and who is told what."""

from __future__ import annotations

import contextlib
import select
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from unittest.mock import MagicMock

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from greenlet import GreenletExit, greenlet
from pools import LOST, PlayedPool

from legit_worker import parking
from legit_worker.errors import DeviceLostError, WaitedTooLongError
from legit_worker.pool import fibers, loop
from legit_worker.pool.fibers import Fiber, Phase
from legit_worker.pool.host import FiberHost
from legit_worker.settings import AppSettings


@pytest.fixture(autouse=True)
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time passes: a slow machine changes no order."""
    monkeypatch.setattr(loop, "monotonic", lambda: 100.0)


@pytest.fixture
def pool() -> Iterator[PlayedPool]:
    yield PlayedPool()
    parking.stop()


def waits_in_vain(pool: PlayedPool, error: type[BaseException], told: list[str]) -> Callable[[], None]:
    """A task that waits for a batch, and notes what it is told in place of it."""

    def waits() -> None:
        try:
            pool.engine.call()
        except error as found:
            told.append(str(found))

    return waits


def test_tasks_that_wait_share_a_batch_and_go_on_in_the_order_in_which_they_came(pool: PlayedPool) -> None:
    for name in "abc":
        pool.send(pool.engine.call, name)
    assert pool.running.parked == 3
    pool.turn()
    assert pool.engine.batches == [3]
    assert pool.ended == ["a", "b", "c"]
    assert pool.results == ["an answer"] * 3
    assert not pool.loop.has_work


def test_the_window_bounds_what_runs_and_the_rest_begins_as_others_end() -> None:
    pool = PlayedPool(window=2)
    for name in "abcde":
        pool.send(pool.engine.call, name)
    assert (len(pool.running), len(pool.loop.backlog)) == (2, 3)
    pool.run()
    assert pool.engine.batches == [2, 2, 1]
    assert pool.ended == list("abcde")
    parking.stop()


def test_nothing_begins_once_the_worker_is_ending(pool: PlayedPool) -> None:
    pool.is_ending = True
    pool.send(pool.engine.call)
    assert (len(pool.running), len(pool.loop.backlog)) == (0, 1)


def test_a_task_that_gives_way_lets_the_others_run_first(pool: PlayedPool) -> None:
    order: list[str] = []

    def long() -> None:
        for part in range(3):
            order.append(f"part {part}")
            parking.give_way("its input")

    pool.send(long)
    pool.send(lambda: order.append("short"))
    pool.run()
    assert order == ["part 0", "short", "part 1", "part 2"]


def test_a_turn_ends_while_many_tasks_give_way_and_each_gets_its_part(
    pool: PlayedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    now = step = 0.0
    monkeypatch.setattr(loop, "monotonic", lambda: now)

    def long(name: str) -> None:
        nonlocal now
        for _ in range(3):
            order.append(name)
            now += step
            parking.give_way("its input")

    for name in "abcde":
        pool.send(partial(long, name), name)
    assert "".join(order) == "abcde"
    step = loop.FULL_TURN * 0.6
    for turn in ("ab", "cd", "ea", "bc", "de"):
        del order[:]
        pool.turn()
        assert "".join(order) == turn


def test_once_tasks_have_begun_for_long_the_next_turn_is_overdue(
    pool: PlayedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(loop, "monotonic", lambda: now)

    def long() -> None:
        nonlocal now
        now += loop.MOST_BEGINNING * 0.6
        pool.engine.call()

    pool.send(long, "a")
    assert not pool.loop.is_overdue
    pool.send(long, "b")
    assert pool.loop.is_overdue
    pool.turn()
    assert not pool.loop.is_overdue


def test_tasks_that_came_begin_for_no_longer_than_until_the_next_turn_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    now, pool = 100.0, PlayedPool()
    monkeypatch.setattr(loop, "monotonic", lambda: now)

    def long() -> None:
        nonlocal now
        now += loop.MOST_BEGINNING * 0.6
        pool.engine.call()

    pool.is_ending = True
    for name in "abcde":
        pool.send(long, name)
    pool.is_ending = False
    for ended in ("ab", "abcd", "abcde"):
        pool.turn()
        assert "".join(pool.ended) == ended
    parking.stop()


def test_what_is_due_is_raised_where_the_task_waits_and_in_no_other(pool: PlayedPool) -> None:
    errors: list[str] = []
    waits = waits_in_vain(pool, SoftTimeLimitExceeded, errors)
    late, other = pool.send(waits, "late"), pool.send(pool.engine.call, "other")
    late.pending = SoftTimeLimitExceeded()
    pool.watcher._noted.append(late)
    pool.loop.turn(lambda: False)
    assert len(errors) == 1
    assert late.dead
    assert other.phase is Phase.PARKED


def test_a_task_is_told_of_its_time_after_its_batch(pool: PlayedPool) -> None:
    from legit_worker.pool.clock import Work

    seen: list[str] = []

    def waits() -> None:
        try:
            pool.engine.call()
            seen.append("answer")
            pool.engine.call()
        except SoftTimeLimitExceeded:
            seen.append("told")

    fiber = pool.send(waits)
    batch = Work(is_batch=True)
    batch.begin()
    fiber.clock.follow(batch)
    fiber.pending = SoftTimeLimitExceeded()
    pool.watcher._noted.append(fiber)
    pool.loop.turn(lambda: False)
    assert seen == [], "its batch is being computed"
    fiber.clock.settle(batch)
    pool.loop.turn(lambda: False)
    assert seen == ["told"]


def test_a_callback_that_fails_badly_takes_no_other_task_with_it(pool: PlayedPool) -> None:
    def fails(result: object) -> None:
        raise ConnectionError("the broker is gone")

    def waits() -> None:
        with contextlib.suppress(SoftTimeLimitExceeded):
            pool.engine.call()

    pool.told = fails
    for name in "abc":
        fiber = pool.send(waits, name)
        fiber.pending = SoftTimeLimitExceeded()
        pool.watcher._noted.append(fiber)
    for name in "def":
        pool.send(pool.engine.call, name)
    while pool.loop.has_work or len(pool.running):
        with contextlib.suppress(ConnectionError):
            pool.turn()
    assert sorted(pool.ended) == list("abcdef")


def test_a_task_that_waited_too_long_fails_unless_it_is_about_to_go_on(pool: PlayedPool) -> None:
    errors: list[str] = []
    waits = waits_in_vain(pool, WaitedTooLongError, errors)
    late, lucky = pool.send(waits, "late"), pool.send(waits, "lucky")
    for fiber in (late, lucky):
        fiber.max_wait, fiber.has_waited_too_long = 0.0, True
        pool.watcher._noted.append(fiber)
    pool.loop.wake(lucky)
    pool.engine.asked[1].set_result("an answer")
    pool.loop.turn(lambda: False)
    assert [error.split()[0] for error in errors] == ["late"]
    assert pool.ended == ["late", "lucky"]


def test_a_lost_device_is_told_once_and_the_rest_goes_on(pool: PlayedPool) -> None:
    done: Future[None] = Future()
    over = pool.send(lambda: None, "over")
    assert over.dead
    pool.send(lambda: parking.wait(done, "its result"), "delivers")
    pool.loop.note_lost(LOST)
    with pytest.raises(DeviceLostError):
        pool.turn()
    done.set_result(None)
    pool.turn()
    assert pool.ended == ["over", "delivers"]


def test_a_fiber_with_an_exclusive_section_drives_the_batch_itself(pool: PlayedPool) -> None:
    pool.send(pool.engine.call, "other")
    pool.send(pool.engine.call, "alone", exclusive=True)
    assert pool.ended == ["alone"], "the other's item rides along, and its code waits for the loop"
    assert pool.engine.batches == [2]
    pool.run()
    assert pool.ended == ["alone", "other"]


def test_outside_a_fiber_a_thread_drives_or_blocks(pool: PlayedPool) -> None:
    assert pool.engine.call() == "an answer"
    done: Future[str] = Future()
    assert not parking.park(done, "nothing")
    done.set_result("done")
    assert parking.park(done, "nothing")


def test_a_task_that_waited_too_long_is_told_although_it_was_woken_for_nothing(pool: PlayedPool) -> None:
    errors: list[str] = []
    waits = waits_in_vain(pool, WaitedTooLongError, errors)
    fiber = pool.send(waits)
    fiber.max_wait, fiber.has_waited_too_long = 0.0, True
    pool.watcher._noted.append(fiber)
    pool.loop.wake(fiber)
    pool.loop.turn(lambda: False)
    assert len(errors) == 1


def test_without_a_loop_nobody_parks_not_even_after_its_own_code(pool: PlayedPool) -> None:
    parking.use(FiberHost(pool.loop, pool.engine, pool.running, is_inline=True))

    def over() -> None:
        fiber = fibers.current()
        assert fiber is not None
        fiber.phase = Phase.ENDING
        pool.engine.call()

    pool.send(over, exclusive=True)
    assert pool.ended == ["task"]


def test_a_task_that_ends_within_another_librarys_greenlet_can_end_itself(pool: PlayedPool) -> None:
    def within() -> None:
        fiber = fibers.current()
        assert fiber is not None
        fiber.terminate()
        assert isinstance(fiber.pending, GreenletExit)
        fiber.pending = None

    pool.send(lambda: greenlet(within).switch())
    assert pool.ended == ["task"]


def test_a_turn_that_ends_overdue_has_another_turn_behind_it(pool: PlayedPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that waited before its own code, as for its STARTED to be stored, begins that within a turn."""
    now = 100.0
    monkeypatch.setattr(loop, "monotonic", lambda: now)
    stored: Future[None] = Future()

    def waits_and_takes_long() -> None:
        nonlocal now
        fiber.wait_for(stored, "its start to be stored", in_own_code=False)
        now += 1

    fiber = fibers.Fiber(waits_and_takes_long, app="", name="long", wake=pool.loop.wake)
    pool.loop.admit(fiber)
    stored.set_result(None)
    pool.wakeup.clear()
    pool.turn()
    assert fiber.dead
    assert pool.loop.is_overdue
    assert select.select([pool.wakeup], [], [], 0)[0]


def test_a_task_that_a_timer_starts_answers_for_no_other_of_its_app() -> None:
    """The one that came first begins first. If its end can't be stored, the other's message is not touched."""
    pool = PlayedPool(apps={"shop": AppSettings(max_in_flight=1)})
    ended: list[str] = []

    def fails() -> None:
        raise OSError("the result backend is away")

    def fiber(name: str, run: Callable[[], object]) -> Fiber:
        return Fiber(run, app="shop", name=name, request=MagicMock(name=name), wake=pool.loop.wake)

    pool.running.by_app["shop"] += 1
    first, second = fiber("first", fails), fiber("second", lambda: ended.append("second"))
    pool.loop.admit(first)
    pool.running.by_app["shop"] -= 1
    pool.loop.admit(second)
    pool.run()
    assert pool.timed == [first.request]
    assert ended == ["second"]
    parking.stop()
