"""Who is next: calls within an app, and apps among each other."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from touches import Touched, touches

from legit_worker.batching.fairness import FRONT, LIGHT_BATCHES, FairQueue, Item


@dataclass(eq=False)
class FakeCall:
    """A call that knows its items."""

    app: str = ""
    finish_tag: float = 0.0
    waiting: int = 0
    items: list[Item] = field(default_factory=list)


def queue_of(weights: dict[str, float] | None = None) -> FairQueue:
    return FairQueue(lambda app: (weights or {}).get(app, 1.0))


def add(queue: FairQueue, call: FakeCall, costs: list[int]) -> list[Item]:
    items = [Item(call, call, None, cost, None) for cost in costs]
    for item in items:
        queue.add(item)
    call.items += items
    return items


def serve(queue: FairQueue, at_a_time: int) -> list[Item]:
    batch = list(queue.first(at_a_time))
    queue.take(batch)
    return batch


def test_calls_of_one_item_go_oldest_first() -> None:
    queue = queue_of()
    items = [add(queue, FakeCall(), [cost])[0] for cost in (9, 1, 5, 3)]
    assert queue.first(4) == items


def test_a_single_item_is_served_before_most_of_a_call_of_thousands_that_came_first() -> None:
    queue = queue_of()
    add(queue, FakeCall(), [10] * 1000)
    serve(queue, 8)
    single = add(queue, FakeCall(), [10])[0]
    assert single in serve(queue, 8)


def test_a_call_of_thousands_goes_on_while_single_items_keep_coming() -> None:
    queue = queue_of()
    bulk = FakeCall()
    add(queue, bulk, [10] * 1000)
    served = 0
    for _ in range(200):
        for _ in range(8):
            add(queue, FakeCall(), [10])
        served += sum(item.call is bulk for item in serve(queue, 8))
    assert served >= 15


def test_apps_share_by_weight_whatever_they_queue() -> None:
    queue = queue_of({"a": 3.0, "b": 1.0})
    for _ in range(400):
        add(queue, FakeCall("a"), [10])
    for _ in range(4000):
        add(queue, FakeCall("b"), [10])
    served = [item.call.app for _ in range(50) for item in serve(queue, 4)]
    assert 140 <= served.count("a") <= 160


def test_an_app_that_was_away_gets_no_credit_for_it() -> None:
    queue = queue_of()
    add(queue, FakeCall("b"), [1])
    serve(queue, 1)
    add(queue, FakeCall("a"), [10] * 500)
    for _ in range(20):
        serve(queue, 10)
    add(queue, FakeCall("b"), [10] * 500)
    served = [item.call.app for _ in range(10) for item in serve(queue, 10)]
    assert 45 <= served.count("b") <= 55


def test_an_app_of_long_standing_waits_no_longer_than_one_that_comes_when_nothing_waits() -> None:
    queue = queue_of()
    for _ in range(500):
        add(queue, FakeCall("old"), [10])
        serve(queue, 10)
    add(queue, FakeCall("new"), [10] * 500)
    add(queue, FakeCall("old"), [10] * 500)
    served = [item.call.app for _ in range(10) for item in serve(queue, 10)]
    assert 45 <= served.count("old") <= 55


def test_an_app_that_takes_less_than_its_part_is_light_beside_a_flood_and_goes_first() -> None:
    queue = queue_of()
    add(queue, FakeCall("flood"), [10] * 1000)
    serve(queue, 8)
    assert not queue.light_cost, "nobody else is here"
    add(queue, FakeCall("small"), [7])
    serve(queue, 8)
    assert queue.light_cost == 7
    assert not queue.has_light
    queue.take(queue.first(1))  # a head start for whoever is only served by turns
    mine = add(queue, FakeCall("small"), [7] * 3)
    assert queue.has_light
    assert queue.first(3) == mine


def test_an_app_is_light_if_it_had_a_small_part_of_a_batch_that_left_nobody_behind() -> None:
    queue = queue_of()
    for small, others, light in ((1, 1, 0), (1, 7, 1)):
        add(queue, FakeCall("small"), [1] * small)
        add(queue, FakeCall("other"), [1] * others)
        serve(queue, 8)
        assert queue.light_cost == light


def test_an_app_whose_items_are_left_behind_is_not_light_and_neither_is_one_that_is_gone() -> None:
    queue = queue_of()
    add(queue, FakeCall("flood"), [10] * 1000)
    add(queue, FakeCall("small"), [7] * 3)
    serve(queue, 2)
    assert not queue.light_cost, "it has more than its turn"
    serve(queue, 4)
    for _ in range(LIGHT_BATCHES):
        assert queue.light_cost
        serve(queue, 1)
    assert not queue.light_cost


@pytest.mark.parametrize("in_flight", [1, 4, 8])
def test_an_app_whose_items_come_again_with_each_batch_has_no_more_than_its_part(in_flight: int) -> None:
    """Beside a light app, a batch has no more than as many items."""
    queue = queue_of()
    add(queue, FakeCall("flood"), [10] * 2000)
    served: Counter[str] = Counter()
    mine = in_flight
    for _ in range(100):
        for _ in range(mine):
            add(queue, FakeCall("loop"), [10])
        batch = serve(queue, max(2, in_flight) if queue.light_cost else 16)
        mine = sum(item.call.app == "loop" for item in batch)
        served.update(item.call.app for item in batch)
    assert served["flood"] >= served["loop"] - 16


def test_items_are_due_if_their_app_has_no_more_than_a_batch_and_another_has_more() -> None:
    queue = queue_of()
    add(queue, FakeCall(app="big"), [10] * 1000)
    few = [add(queue, FakeCall(app="small"), [10])[0] for _ in range(8)]
    assert set(queue.due(200)) == set(few)
    add(queue, FakeCall(app="small"), [10] * 100)
    assert queue.due(200) == []  # two floods take turns by cost, and batches are picked by length


def test_nothing_is_due_if_nobody_has_more_than_a_batch_or_nobody_else_waits() -> None:
    queue = queue_of()
    assert queue.due(100) == []
    add(queue, FakeCall(app="one"), [10] * 3)
    add(queue, FakeCall(app="two"), [10] * 3)
    assert queue.due(100) == []
    alone = queue_of()
    add(alone, FakeCall(app="one"), [10] * 1000)
    assert alone.due(100) == []


def test_dropping_a_call_leaves_the_others() -> None:
    queue = queue_of()
    gone, stays = FakeCall(), FakeCall()
    add(queue, gone, [1, 2, 3])
    kept = add(queue, stays, [4])
    queue.remove(gone.items)
    assert queue.first(10) == kept
    assert len(queue) == 1


@given(
    st.lists(
        st.tuples(st.sampled_from(["", "a", "b"]), st.lists(st.integers(1, 50), min_size=1, max_size=9)),
        min_size=1,
        max_size=20,
    ),
    st.integers(1, 16),
)
def test_everything_is_served_once_and_the_cost_adds_up(calls: list[tuple[str, list[int]]], at_a_time: int) -> None:
    queue = queue_of({"a": 2.0})
    items = [item for app, costs in calls for item in add(queue, FakeCall(app), costs)]
    assert queue.cost == sum(item.cost for item in items)
    served: list[Item] = []
    while len(queue):
        served += serve(queue, at_a_time)
    assert sorted(map(id, served)) == sorted(map(id, items))
    assert queue.cost == 0


class PlainLane:
    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.items: list[Item] = []
        self.now = self.served = 0.0
        self.light = 0


class PlainQueue:
    """What `FairQueue` does, by reading the whole queue each time."""

    def __init__(self, weights: dict[str, float]) -> None:
        self.lanes = {app: PlainLane(weight) for app, weight in weights.items()}
        self.tags: dict[Item, float] = {}
        self.finish: dict[FakeCall, float] = {}

    def add(self, call: FakeCall, items: list[Item]) -> None:
        lane = self.lanes[call.app]
        if items and not lane.items:
            busy = [other.served for other in self.lanes.values() if other.items]
            lane.served = max(lane.served, min(busy) if busy else max(other.served for other in self.lanes.values()))
        for item in items:
            self.tags[item] = max(lane.now, self.finish.get(call, 0.0))
            self.finish[call] = self.tags[item] + item.cost
            lane.items.append(item)
        lane.items.sort(key=self.tags.__getitem__)

    def first(self, count: int) -> list[Item]:
        served = {app: lane.served for app, lane in self.lanes.items()}
        left = {app: list(lane.items) for app, lane in self.lanes.items() if lane.items}
        found: list[Item] = []
        while left and len(found) < count:
            app = min(left, key=lambda app: (not self.lanes[app].light, served[app], app))
            found.append(left[app].pop(0))
            served[app] += found[-1].cost / self.lanes[app].weight
            if not left[app]:
                del left[app]
        return found

    def take(self, batch: list[Item]) -> None:
        for app, lane in self.lanes.items():
            if mine := [item for item in batch if item.call.app == app]:
                cost = sum(item.cost for item in mine)
                lane.now += cost / len({item.call for item in lane.items})
                lane.served += cost / lane.weight
        self.remove(batch)
        costs = Counter({app: sum(item.cost for item in batch if item.call.app == app) for app in self.lanes})
        parts = sum(cost > 0 for cost in costs.values())
        least = min((lane.served for lane in self.lanes.values() if lane.items), default=math.inf)
        for app, lane in self.lanes.items():
            if costs[app] and (lane.items or lane.served - costs[app] / lane.weight > least):
                lane.light = 0
            elif costs[app] and (self.first(1) or costs[app] * 2 * parts <= costs.total()):
                lane.light = LIGHT_BATCHES
            else:
                lane.light = max(0, lane.light - 1)

    def remove(self, items: list[Item]) -> None:
        for lane in self.lanes.values():
            lane.items = [item for item in lane.items if item not in items]


WEIGHTS = {"": 1.0, "a": 2.0, "b": 1.0}

#: What is done to a queue: a call brings items, new or not; some of the first items are taken; a call is dropped.
steps = st.lists(
    st.one_of(
        st.tuples(st.just("call"), st.sampled_from(sorted(WEIGHTS)), st.lists(st.integers(1, 50), max_size=9)),
        st.tuples(st.just("more"), st.integers(0, 99), st.lists(st.integers(1, 50), max_size=9)),
        st.tuples(st.just("take"), st.integers(1, 20), st.lists(st.booleans(), min_size=1, max_size=20)),
        st.tuples(st.just("drop"), st.integers(0, 99), st.none()),
    ),
    max_size=60,
)


@given(steps)
def test_it_gives_what_reading_the_whole_queue_each_time_gives(steps: list[Any]) -> None:
    with mock.patch("legit_worker.batching.fairness.FRONT", 4):
        compare(FairQueue(WEIGHTS.__getitem__), PlainQueue(WEIGHTS), steps)


def compare(queue: FairQueue, plain: PlainQueue, steps: list[Any]) -> None:
    calls: list[FakeCall] = []
    for step, which, details in steps:
        if step == "take":
            batch = [item for item, wanted in zip(queue.first(which), details, strict=False) if wanted]
            queue.take(batch)
            plain.take(batch)
        elif step == "drop" and calls:
            left = [item for item in calls[which % len(calls)].items if item.place is not None]
            queue.remove(left)
            plain.remove(left)
        elif step == "call" or (step == "more" and calls):
            if step == "call":
                calls.append(FakeCall(which))
            call = calls[-1] if step == "call" else calls[which % len(calls)]
            plain.add(call, add(queue, call, details))
        everything = sum(len(lane.items) for lane in plain.lanes.values())
        assert (len(queue), queue.cost) == (everything, sum(item.cost for item in plain.first(everything)))
        for count in (1, 3, everything):
            assert queue.first(count) == plain.first(count)


def waiting(count: int) -> tuple[FairQueue, list[Item]]:
    queue = queue_of()
    items: list[Item] = [Touched(FakeCall(), None, None, 1 + number % 9, None) for number in range(count)]
    for item in items:
        queue.add(item)
    return queue, items


@pytest.mark.parametrize("order", ["oldest first", "newest first"])
def test_ending_all_of_many_calls_costs_each_as_much_as_ending_one_of_a_few(order: str) -> None:
    def each(count: int) -> float:
        queue, items = waiting(count)
        queue.first(FRONT)
        in_turn = items if order == "oldest first" else items[::-1]

        def end_all() -> None:
            for item in in_turn:
                queue.remove([item])

        return touches(end_all) / count

    assert each(4096) <= each(64) + 2


def test_taking_a_batch_costs_as_much_however_many_wait_behind_it() -> None:
    def cost(count: int) -> int:
        queue, _ = waiting(count)
        queue.first(FRONT)
        return touches(lambda: queue.take(queue.first(32)))

    assert cost(16_384) <= cost(1024)


def test_reading_the_first_items_costs_as_much_however_many_have_left() -> None:
    queue, items = waiting(10_000)
    spent = touches(lambda: [(queue.take(queue.first(FRONT)[::2]), queue.first(1)) for _ in range(15)])
    assert spent <= 15 * 12 * FRONT
    assert sum(item.place is not None for item in items) == 10_000 - 15 * FRONT // 2


def test_looking_at_a_queue_touches_no_item() -> None:
    queue, _ = waiting(1000)
    assert touches(lambda: (len(queue), queue.cost, repr(queue))) == 0
