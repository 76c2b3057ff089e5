"""Gates and lines: who gets through, in which order, and who does not wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from greenlet import GreenletExit

from legit_worker.pool import turns
from legit_worker.pool.fibers import Fiber
from legit_worker.pool.turns import Gate, Line


class Need:
    """A claim that a test ends."""

    def __init__(self) -> None:
        self.is_over = False

    def about(self) -> None:
        """Nothing."""

    def is_held(self) -> bool:
        """Until the test says so."""
        return not self.is_over


_woken: list[Fiber] = []


@pytest.fixture(autouse=True)
def woken() -> Iterator[list[Fiber]]:
    _woken.clear()
    yield _woken
    # Tests leave tasks that wait, and gates that nobody opens.
    turns._lines.clear()
    turns._gates.clear()


def start(name: str, run: Callable[[], object], *, exclusive: bool = False) -> Fiber:
    fiber = Fiber(run, app="", name=name, exclusive=exclusive, wake=_woken.append)
    fiber.resume()
    return fiber


def here() -> Fiber:
    from legit_worker.pool.fibers import current

    fiber = current()
    assert fiber is not None
    return fiber


def pass_through(gate: Gate, need: Need, order: list[str]) -> None:
    gate.take(here()).append(need)
    order.append(here().name)
    here().park("a model")
    here().holdings.end(here())


def test_a_gate_lets_one_through_at_a_time_in_the_order_in_which_they_came(woken: list[Fiber]) -> None:
    gate, order = Gate("a database"), []
    tasks = [start(name, lambda: pass_through(gate, Need(), order)) for name in "abc"]
    assert order == ["a"]
    for task, following in zip(tasks, [*tasks[1:], None], strict=True):
        woken.clear()
        task.resume()
        assert woken[:1] == [following][: following is not None]
        if following is not None:
            following.resume()
    assert order == ["a", "b", "c"]


def test_a_task_keeps_the_gate_until_it_parks_without_a_need_for_it(woken: list[Fiber]) -> None:
    gate, order, need = Gate("a database"), [], Need()

    def first() -> None:
        gate.take(here()).append(need)
        need.is_over = True
        gate.take(here()).append(again)
        here().park("a model")
        again.is_over = True
        here().park("another model")

    again = Need()
    holder = start("first", first)
    start("second", lambda: pass_through(gate, Need(), order))
    assert woken == order == []
    holder.resume()
    assert [fiber.name for fiber in woken] == ["second"]


def test_a_task_that_comes_later_does_not_take_the_turn_of_one_that_was_woken(woken: list[Fiber]) -> None:
    gate, order, need = Gate("a database"), [], Need()
    holder = start("first", lambda: pass_through(gate, need, order))
    second = start("second", lambda: pass_through(gate, Need(), order))
    holder.resume()
    assert woken
    start("third", lambda: pass_through(gate, Need(), order))
    second.resume()
    assert order == ["first", "second"]


def test_one_that_is_ended_while_it_waits_leaves_the_line_to_the_next(woken: list[Fiber]) -> None:
    gate, order = Gate("a database"), []
    holder = start("first", lambda: pass_through(gate, Need(), order))
    ended = start("second", lambda: pass_through(gate, Need(), order))
    third = start("third", lambda: pass_through(gate, Need(), order))
    ended.terminate(GreenletExit())
    holder.resume()
    assert woken == [third]


def test_a_gate_of_a_task_that_is_dead_is_open() -> None:
    gate, order = Gate("a database"), []
    start("dead", lambda: gate.take(here()).append(Need()))
    start("next", lambda: pass_through(gate, Need(), order))
    assert order == ["next"]


def test_who_can_not_wait_goes_on() -> None:
    gate, order = Gate("a database"), []
    start("first", lambda: pass_through(gate, Need(), order))
    start("alone", lambda: pass_through(gate, Need(), order), exclusive=True)
    assert order == ["first", "alone"]


def test_nobody_waits_in_a_circle() -> None:
    one, other, order = Gate("one"), Gate("other"), []

    def task(first: Gate, second: Gate) -> None:
        first.take(here()).append(Need())
        here().park("a model")
        second.take(here()).append(Need())
        order.append(here().name)

    waits = start("waits", lambda: task(one, other))
    goes_on = start("goes on", lambda: task(other, one))
    waits.resume()
    goes_on.resume()
    assert order == ["goes on"]


def test_who_needs_all_of_them_does_not_wait_for_one_that_waits_for_it() -> None:
    free: list[bool] = []
    held = Gate("a database")
    everyone: list[Fiber] = []
    line = Line("all others", lambda _: bool(free), lambda _: everyone, needs_all=True)
    answers: list[bool] = []

    def needs_all() -> None:
        held.take(here()).append(Need())
        here().park("a model")
        answers.append(line.wait(here()))

    alone = start("needs all", needs_all)
    everyone.append(start("at a model", lambda: here().park("a model")))
    everyone.append(start("waits", lambda: held.take(here())))
    alone.resume()
    assert answers == [False]


def test_the_pressing_come_first(woken: list[Fiber]) -> None:
    free: list[bool] = []
    line = Line("a connection", lambda _: bool(free), lambda _: [])
    start("came first", lambda: line.wait(here()))
    pressing = start("pressing", lambda: line.wait(here(), first=True))
    free.append(True)
    turns.look()
    assert woken == [pressing]
