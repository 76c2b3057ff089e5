"""Who is next: calls within an app, and apps among each other."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from legit_worker.batching.fairness import FairQueue, Item


@dataclass(eq=False)
class FakeCall:
    """A call of one chunk."""

    app: str = ""
    finish_tag: float = 0.0

    @property
    def call(self) -> FakeCall:
        return self


def queue_of(weights: dict[str, float] | None = None) -> FairQueue:
    return FairQueue(lambda app: (weights or {}).get(app, 1.0))


def add(queue: FairQueue, call: FakeCall, costs: list[int]) -> list[Item]:
    items = [Item(call, call, index, None, cost, None) for index, cost in enumerate(costs)]
    for item in items:
        queue.add(item)
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


def test_dropping_a_call_leaves_the_others() -> None:
    queue = queue_of()
    gone, stays = FakeCall(), FakeCall()
    add(queue, gone, [1, 2, 3])
    kept = add(queue, stays, [4])
    queue.drop(gone)
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
