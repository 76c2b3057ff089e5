"""What waits in a lane is somewhere, once, and is counted."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as some
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from legit_worker.routing.delivery import Delivery
from legit_worker.routing.waiting import LAST_RETRY, Waiting
from legit_worker.settings import AppSettings

QUEUES = some.sampled_from("abc")


def test_a_queue_that_took_nothing_and_for_which_nothing_waits_is_forgotten() -> None:
    """Clients choose the names of their `reply_to` queues."""
    waiting = Waiting()
    for number in range(100):
        one = Delivery(app="a", chosen=AppSettings(), queue=f"queue {number}", task_id="x", envelope=b"")
        waiting.put(one)
        waiting.hold(one.queue, 0.0)
        if number % 2:
            waiting.release(LAST_RETRY)
        waiting.remove(one)  # as a dead letter, while its queue pauses or as it is tried again
    assert waiting.release(LAST_RETRY) is None
    assert not waiting._holds


class Machine(RuleBasedStateMachine):
    """A lane's life, without its server."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = Waiting()
        self.here: list[Delivery] = []
        self.now = 0.0

    @rule(queue=QUEUES, size=some.integers(0, 9))
    def put(self, queue: str, size: int) -> None:
        one = Delivery(app="a", chosen=AppSettings(), queue=queue, task_id="x", envelope=b"x" * size)
        self.waiting.put(one)
        self.here.append(one)

    @rule(number=some.integers(0, 99))
    def remove(self, number: int) -> None:
        if self.here:
            one = self.here.pop(number % len(self.here))
            assert self.waiting.remove(one)
            assert not self.waiting.remove(one)

    @rule(queue=QUEUES)
    def hold(self, queue: str) -> None:
        mine = [one for one in self.here if one.queue == queue]
        held = self.waiting.hold(queue, self.now, mine[0] if mine else None)
        assert set(held) == set(mine)
        if mine:
            assert list(held)[-1] is mine[0]

    @rule(queue=QUEUES)
    def go_on(self, queue: str) -> None:
        self.waiting.go_on(queue)
        assert not self.waiting.is_held(queue)

    @rule(seconds=some.floats(0, 2 * LAST_RETRY))
    def release(self, seconds: float) -> None:
        self.now += seconds
        pause = self.waiting.release(self.now)
        assert (pause is None) == (not any(map(self.waiting.is_held, "abc")))
        assert pause is None or 0 < pause <= LAST_RETRY

    @invariant()
    def all_are_here_once_and_counted(self) -> None:
        found = list(self.waiting)
        assert len(found) == len(self.here) == self.waiting.count
        assert set(found) == set(self.here)
        assert self.waiting.bytes == sum(len(one.envelope) for one in self.here)

    @invariant()
    def none_of_a_held_queue_is_sent(self) -> None:
        group = self.waiting.group(1000)
        assert {one for one in self.here if not self.waiting.is_held(one.queue)} == set(group)


TestWaiting = Machine.TestCase
TestWaiting.settings = settings(max_examples=100, deadline=None)
