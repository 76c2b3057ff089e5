"""How a task computes in a fiber: chunk by chunk, parked or alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from letters import Letters, PoisonError

from legit_worker import parking
from legit_worker.pool.computing import CHUNK, CHUNKS, Computing
from legit_worker.pool.engine import Engine
from legit_worker.pool.fibers import Fiber, exclusive
from legit_worker.pool.host import FiberHost
from legit_worker.pool.running import Running


@pytest.fixture(autouse=True)
def parks() -> Iterator[None]:
    yield
    parking.stop()


class Loop:
    """The least that makes fibers go on: one batch, then those whose futures are done."""

    def __init__(self) -> None:
        self.engine = Engine(max_batch_seconds=0.5, weight_of=lambda app: 1.0)
        self.computing = Computing(self.engine, self)  # type: ignore[arg-type]
        self._ready: deque[Fiber] = deque()
        self.lost = None
        host: Any = FiberHost(self, self.engine, Running(), is_inline=False)  # type: ignore[arg-type]
        parking.use(host)
        #: The most items that ever waited at a time.
        self.most = 0

    def start(self, run: Callable[[], Any]) -> Fiber:
        fiber = Fiber(run, app="", name="a task", wake=self._ready.append)
        fiber.resume()
        return fiber

    def turn(self) -> bool:
        self.most = max(self.most, len(self.engine))
        went_on = self.engine.step()
        while self._ready:  # one that gave way may have nothing at the engine yet
            went_on = True
            self._ready.popleft().resume()
        return went_on


def test_a_large_call_has_two_chunks_at_the_engine_and_its_outputs_in_order() -> None:
    loop, model = Loop(), Letters()
    items = ["x" * (1 + number % 50) for number in range(5 * CHUNK + 7)]
    found: list[str] = []
    loop.start(lambda: found.extend(loop.computing.compute(model, items)))  # type: ignore[arg-type]
    while loop.turn():
        pass
    assert found == [item * 2 for item in items]
    assert loop.most == CHUNKS * CHUNK


def test_a_large_call_takes_turns_with_single_ones() -> None:
    loop, model = Loop(), Letters()
    large = loop.start(lambda: loop.computing.compute(model, ["text"] * 20 * CHUNK))  # type: ignore[arg-type]
    for _ in range(5):
        loop.turn()
    single = loop.start(lambda: loop.computing.compute(model, ["text"]))  # type: ignore[arg-type]
    loop.turn()
    loop.turn()
    assert (single.dead, large.dead) == (True, False)


def test_a_bad_item_ends_its_call_and_the_rest_of_it_is_forgotten() -> None:
    loop, model = Loop(), Letters()
    told: list[str] = []

    def run() -> None:
        with pytest.raises(PoisonError):
            loop.computing.compute(model, [*["good"] * 100, "bad!", *["good"] * 1000])  # type: ignore[arg-type]
        told.append(f"{len(loop.engine)} left")

    loop.start(run)
    while loop.turn():
        pass
    assert told == ["0 left"]
    assert loop.engine.calls == 1


def test_what_a_task_that_was_ended_has_asked_for_is_forgotten() -> None:
    loop, model = Loop(), Letters()
    fiber = loop.start(lambda: loop.computing.compute(model, ["text"] * 1000))  # type: ignore[arg-type]
    loop.turn()
    fiber.terminate()
    assert len(loop.engine) == 0
    assert not loop.turn()


def test_an_exclusive_call_is_over_before_its_task_gives_the_thread_away() -> None:
    loop, model = Loop(), Letters()
    other = loop.start(lambda: loop.computing.compute(model, ["two"]))  # type: ignore[arg-type]

    def run() -> None:
        with exclusive():
            assert loop.computing.compute(model, ["one"] * 1000) == ["oneone"] * 1000  # type: ignore[arg-type]

    assert loop.start(run).dead
    assert not other.dead, "its item was computed, and nobody resumed it"
    loop.turn()
    assert other.dead
