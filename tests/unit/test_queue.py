"""One model's queue: batches from chunks, and what happens when one item spoils a batch."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from letters import Letters, PoisonError, SmallLetters, error, outputs
from touches import Touched, touches

from legit_worker.batching.fairness import FRONT, Item
from legit_worker.device.devices import Launch
from legit_worker.errors import DeviceOutOfMemoryError
from legit_worker.pool.calls import Call, Chunk
from legit_worker.pool.queue import TRIES_ALONE, ModelQueue


def queue(model: Letters, **options: Any) -> ModelQueue:
    return ModelQueue(model, **{"max_batch_seconds": 0.5, "weight_of": lambda app: 1.0, **options})


def ask(queue: ModelQueue, items: list[str], app: str = "") -> Chunk:
    return queue.submit(Call(app=app), items)


def compute(queue: ModelQueue, batch: list[Item]) -> None:
    """What the engine does with a batch."""
    try:
        launch = queue.launch(batch)
    except Exception as failure:
        queue.failed(batch, failure)
    else:
        queue.succeeded(batch, launch)


def step(queue: ModelQueue) -> bool:
    if len(queue):
        compute(queue, queue.next_batch())
        return True
    return False


def drive(queue: ModelQueue, chunk: Chunk) -> None:
    compute(queue, queue.batch_of(chunk))


def run_all(queue: ModelQueue) -> None:
    while step(queue):
        pass


def test_calls_of_many_tasks_share_a_batch_and_each_gets_its_own_part() -> None:
    entry = Letters()
    subject = queue(entry)
    calls = [ask(subject, [text]) for text in ("one", "two", "six", "ten")]
    run_all(subject)
    assert len(entry.batches) == 1
    assert [outputs(call) for call in calls] == [["oneone"], ["twotwo"], ["sixsix"], ["tenten"]]


def test_outputs_come_in_the_callers_order_whatever_the_lengths() -> None:
    entry = Letters()
    subject = queue(entry)
    items = ["x" * length for length in (9, 1, 200, 3, 40, 2)]
    call = ask(subject, items)
    run_all(subject)
    assert outputs(call) == [item * 2 for item in items]


def test_a_bad_item_fails_its_own_call_with_its_own_error_and_no_other() -> None:
    entry = Letters()
    subject = queue(entry)
    good = [ask(subject, [f"good{n}"]) for n in range(7)]
    bad = ask(subject, ["bad!!"])
    run_all(subject)
    assert [outputs(call) for call in good] == [[f"good{n}" * 2] for n in range(7)]
    assert isinstance(error(bad), PoisonError)
    assert str(error(bad)) == "1 items"


def test_a_model_that_always_fails_fails_every_call_and_leaves_nothing_queued() -> None:
    entry = Letters(broken=True)
    subject = queue(entry)
    calls = [ask(subject, [f"item{n}"]) for n in range(5)]
    run_all(subject)
    assert all(isinstance(error(call), PoisonError) for call in calls)
    assert len(subject) == 0


def test_batches_that_run_out_of_memory_are_split_and_later_ones_are_smaller() -> None:
    entry = SmallLetters(most=64)
    subject = queue(entry)
    for _ in range(20):
        calls = [ask(subject, [f"item{n:04}"]) for n in range(50)]
        run_all(subject)
        assert [outputs(call) for call in calls] == [[f"item{n:04}" * 2] for n in range(50)]
    assert entry.refused < 20
    assert subject.counters.report()["out_of_memory"] == entry.refused


def test_a_limit_that_was_learned_rises_again() -> None:
    entry = SmallLetters(most=64)
    subject = queue(entry)
    ask(subject, ["x" * 8] * 100)
    run_all(subject)
    entry.most = 10**9
    entry.batches.clear()
    for _ in range(300):
        ask(subject, ["x" * 8] * 100)
        run_all(subject)
    assert len(entry.batches[-1]) * 8 > 4 * 64


def test_an_item_that_never_fits_fails_alone_and_names_the_sizes() -> None:
    entry = SmallLetters(most=64)
    subject = queue(entry)
    good = [ask(subject, ["fine"]) for _ in range(5)]
    bad = ask(subject, ["x" * 100])
    run_all(subject)
    assert isinstance(error(bad), DeviceOutOfMemoryError)
    assert "cost 100" in str(error(bad))
    assert all(outputs(call) == ["finefine"] for call in good)
    assert len(subject) == 0


def test_a_storm_of_failures_loses_no_item() -> None:
    """Every third batch runs out of memory, whatever its size."""
    entry = SmallLetters(most=10**9, storm=1 / 3)
    entry.largest_cost = lambda longest: 1024  # type: ignore[method-assign]
    subject = queue(entry)
    calls = [ask(subject, [f"item{n}"]) for n in range(2000)]
    run_all(subject)
    assert entry.refused > 10
    assert [outputs(call) for call in calls] == [[f"item{n}" * 2] for n in range(2000)]


def test_memory_is_freed_before_the_next_try() -> None:
    model = SmallLetters(most=8)
    subject = queue(model)
    ask(subject, ["four", "four", "four"])
    ask(subject, ["too long", "it never fits"])
    run_all(subject)
    assert model.freed[0][0] > 1
    assert [tries for count, longest, tries in model.freed if count == 1] == list(range(TRIES_ALONE))


def test_a_call_dropped_from_a_failed_batch_is_not_tried_again() -> None:
    entry = Letters()
    subject = queue(entry)
    gone = ask(subject, ["bad!", "bad!", "bad!", "good"])
    step(subject)
    subject.drop(gone)
    assert len(subject) == 0
    assert not step(subject)


def test_an_exclusive_call_goes_first_and_others_may_ride_along() -> None:
    entry = Letters()
    subject = queue(entry)
    older = [ask(subject, ["x" * 300]) for _ in range(30)]
    neighbour, mine = ask(subject, ["two"]), ask(subject, ["one"])
    drive(subject, mine)
    assert outputs(mine) == ["oneone"]
    assert outputs(neighbour) == ["twotwo"]
    assert not any(chunk.done.done() for chunk in older)


def test_an_exclusive_call_that_shared_a_bad_batch_is_tried_again_by_itself() -> None:
    entry = Letters()
    subject = queue(entry)
    mine, bad = ask(subject, ["good"]), ask(subject, ["bad!"])
    while not mine.done.done():
        drive(subject, mine)
    assert outputs(mine) == ["goodgood"]
    run_all(subject)
    assert isinstance(error(bad), PoisonError)


def test_a_key_that_is_no_key_fails_its_own_call_and_leaves_nothing_queued() -> None:
    entry = Letters()
    subject = queue(entry)
    entry.batch_key = lambda item: hash([item])  # type: ignore  # as Entry's, which checks it
    with pytest.raises(TypeError, match="unhashable"):
        ask(subject, ["one", "two"])
    assert len(subject) == 0


def test_items_with_different_keys_never_share_a_batch() -> None:
    entry = Letters()
    subject = queue(entry)
    ask(subject, ["abc", "ABC", "def", "DEF"])
    run_all(subject)
    assert sorted(map(sorted, entry.batches)) == [["ABC", "DEF"], ["abc", "def"]]


def test_a_dropped_call_is_not_computed() -> None:
    entry = Letters()
    subject = queue(entry)
    gone, stays = ask(subject, ["gone"]), ask(subject, ["stay"])
    subject.drop(gone)
    run_all(subject)
    assert entry.batches == [["stay"]]
    assert (stays.done.done(), gone.done.done()) == (True, False)


def test_what_an_app_sends_at_once_is_not_thinned_out_by_the_lengths_of_a_flood() -> None:
    subject = queue(Letters())
    for _ in range(20):
        ask(subject, ["x" * 10] * 8, "big")
    run_all(subject)
    flood = [ask(subject, ["x" * 8], "big") for _ in range(1000)]
    few = [ask(subject, ["x" * (8 + number % 5)], "small") for number in range(8)]
    step(subject)
    assert all(call.is_over for call in few)
    assert any(call.is_over for call in flood)


def test_a_long_item_that_is_due_is_not_padded_with_short_ones() -> None:
    model = Letters()
    subject = queue(model)
    ask(subject, ["x"] * 1000, "big")
    ask(subject, ["x" * 100], "small")
    while not any(len(batch[0]) == 100 for batch in model.batches):
        step(subject)
    assert ["x" * 100] in model.batches


def test_a_batch_that_nothing_is_learned_from_reaches_its_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = queue(Letters())
    call = ask(subject, ["one"])
    monkeypatch.setattr(subject.sizing, "observe", lambda *_: 1 / 0)
    run_all(subject)
    assert outputs(call) == ["oneone"]


def test_a_batch_is_predicted_to_end_within_the_bound() -> None:
    entry = Letters()
    subject = queue(entry, max_batch_seconds=0.05)
    ask(subject, ["x" * 50] * 100)
    step(subject)
    sizing = subject.sizing
    sizing.observe(10, 50, 0.1)
    within = sizing.costs.largest(50, 0.05)
    step(subject)
    assert len(entry.batches[1]) == within < 10


class Unpadded(Letters):
    """Takes as long for a batch as it has letters."""

    def pads(self, item: str) -> bool:
        return False

    def launch(self, batch: Sequence[str]) -> Launch:
        return Launch(outputs=self.forward(batch), seconds=0.001 * sum(map(len, batch)))


def test_a_model_without_padding_has_what_came_first_whatever_the_lengths() -> None:
    entry = Unpadded()
    subject = queue(entry)
    draw = random.Random(1)
    items = ["x" * draw.randint(4, 12) for _ in range(400)]
    calls = [ask(subject, [item]) for item in items]
    run_all(subject)
    assert [outputs(call) for call in calls] == [[item * 2] for item in items]
    full = [batch for batch in entry.batches if len(batch) > 10]
    assert len(full) > 10
    assert all(len(set(map(len, batch))) > 4 for batch in full)
    assert subject.counters.waste == 0
    assert subject.sizing.costs.predict(10, 8) == pytest.approx(0.08, rel=0.01)
    assert all(sum(map(len, batch)) <= 500 for batch in entry.batches)


class SmallUnpadded(SmallLetters):
    """Computes no padding, but has memory for it in its input."""

    def pads(self, item: str) -> bool:
        return False


def test_batches_without_padding_that_run_out_of_memory_make_later_ones_smaller() -> None:
    entry = SmallUnpadded(most=250)
    subject = queue(entry)
    draw = random.Random(1)
    items = ["x" * draw.choice([2, 3, 40]) for _ in range(1000)]
    calls = [ask(subject, [item]) for item in items]
    run_all(subject)
    assert [outputs(call) for call in calls] == [[item * 2] for item in items]
    assert 0 < entry.refused < 10


def learned(count: int) -> tuple[Unpadded, ModelQueue]:
    """A model without padding, and its queue, which knows what so many short items take."""
    entry = Unpadded()
    subject = queue(entry)
    for _ in range(3):
        ask(subject, ["four"] * count)
        run_all(subject)
    entry.batches.clear()
    return entry, subject


def test_a_long_item_without_padding_waits_for_one_batch_and_no_longer() -> None:
    entry, subject = learned(20)
    for item in ("shrt", "shrt", "long" * 50, *["shrt"] * 200):
        ask(subject, [item])
    step(subject)
    assert "long" * 50 not in entry.batches[0]
    step(subject)
    assert entry.batches[1][0] == "long" * 50


def test_of_a_model_without_padding_what_is_due_comes_first() -> None:
    entry, subject = learned(40)
    for _ in range(300):
        ask(subject, ["flooding"], "flood")
    for item in ("little", "a", "few more"):
        ask(subject, [item], "little")
    step(subject)
    assert {"little", "a", "few more"} <= set(entry.batches[0])


def test_counters_say_how_much_was_padding() -> None:
    entry = Letters()
    subject = queue(entry)
    ask(subject, ["xx", "xxxx"])
    run_all(subject)
    counters = subject.counters
    assert (counters.batches, counters.items) == (1, 2)
    assert counters.waste == pytest.approx(1 - 6 / 8)


def test_a_batch_is_no_larger_than_memory_allows() -> None:
    entry = Letters()
    subject = queue(entry)
    entry.largest_cost = lambda longest: 64  # type: ignore[method-assign]
    ask(subject, ["x" * 8] * 100)
    run_all(subject)
    assert max(map(len, entry.batches)) == 8


def test_a_batch_stays_where_memory_can_not_be_freed() -> None:
    class Refusing(SmallLetters):
        def make_room(self, count: int, longest: int, tries: int = 0) -> None:
            raise RuntimeError("empty_cache failed")

    subject = queue(Refusing(most=8))
    call = ask(subject, ["four", "four", "four"])
    run_all(subject)
    assert outputs(call) == ["fourfour"] * 3


def test_longer_items_are_bounded_by_their_own_need_of_memory() -> None:
    """A long item takes more for each unit than the short one that is first in line."""
    entry = Letters()
    subject = queue(entry)
    entry.largest_cost = lambda longest: 4000 if longest < 100 else 400  # type: ignore[method-assign]
    for text in ("x" * 8, *["x" * 200] * 20):
        ask(subject, [text])
    run_all(subject)
    assert all(len(batch) * max(map(len, batch)) <= 400 for batch in entry.batches if max(map(len, batch)) >= 100)


def test_an_output_that_can_not_be_finished_fails_its_own_call() -> None:
    entry = Letters()
    subject = queue(entry)
    call, other = ask(subject, ["one"]), ask(subject, ["two"])
    entry.postprocess = lambda output: output if output == "twotwo" else 1 / 0  # type: ignore
    run_all(subject)
    assert isinstance(error(call), ZeroDivisionError)
    assert outputs(other) == ["twotwo"]


def test_a_model_whose_launch_takes_all_the_time_there_is_still_has_batches() -> None:
    entry = Letters()
    subject = queue(entry)
    ask(subject, ["x"] * 100)
    for count in (8, 16, 32, 64, 8, 16, 32):
        subject.sizing.observe(count, 1, 0.6 + 0.001 * count)
    step(subject)
    assert len(entry.batches[-1]) == 100


def test_a_model_that_takes_as_long_for_many_items_as_for_one_soon_gets_them_all() -> None:
    """Half a second for any batch, give or take; nothing smaller than what already ran tells more about it."""
    entry = Letters()
    subject = queue(entry)
    draw, sizes = random.Random(1), []

    def launch(batch: Sequence[str]) -> Launch:
        sizes.append(len(batch))
        return Launch(outputs=[item * 2 for item in batch], seconds=0.5 + draw.uniform(0, 1e-3))

    entry.launch = launch  # type: ignore[method-assign]
    ask(subject, ["text 10"] * 300)
    run_all(subject)
    assert len(sizes) < 15
    assert max(sizes) > 100


def test_a_model_that_was_only_asked_for_single_items_learns_what_more_of_them_take() -> None:
    """Each batch takes as long: what the first ones show fits a model of which each item takes that long, too."""
    entry = Letters()
    subject = queue(entry)
    sizes: list[int] = []

    def launch(batch: Sequence[str]) -> Launch:
        sizes.append(len(batch))
        return Launch(outputs=list(batch), seconds=0.2)

    entry.launch = launch  # type: ignore[method-assign]
    for count in [1] * 80 + [1000]:
        ask(subject, ["xxxx"] * count)
        run_all(subject)
    grown = sizes[80:]
    assert grown[0] == 2
    assert max(grown) >= 256
    assert all(after <= 4 * max(2, *grown[: number + 1]) for number, after in enumerate(grown[1:]))


class Memorable(Letters):
    """One whose equal items have the same output."""

    def identity(self, item: str) -> Hashable:
        return item

    def launch(self, batch: Sequence[str]) -> Launch:
        return Launch(outputs=[[item * 2] for item in self.forward(batch)], seconds=0.01 * len(batch))


def test_equal_items_in_the_window_are_computed_once_and_each_task_gets_its_own_output() -> None:
    model = Memorable()
    subject = queue(model)
    chunks = [ask(subject, [text], app) for app in ("a", "b") for text in ("one", "two", "one", "one")]
    run_all(subject)
    assert sorted(item for batch in model.batches for item in batch) == ["one", "two"]
    results = [outputs(chunk)[0] for chunk in chunks]
    assert results == [["oneoneoneone"], ["twotwotwotwo"], ["oneoneoneone"], ["oneoneoneone"]] * 2
    assert len(set(map(id, results))) == len(results)
    assert subject.counters.report()["duplicates"] == 6
    assert (len(subject), subject.cost) == (0, 0)


def test_equal_items_of_one_call_are_computed_once() -> None:
    model = Memorable()
    subject = queue(model)
    chunk = ask(subject, ["one", "two", "one"])
    drive(subject, chunk)
    assert outputs(chunk) == [["oneoneoneone"], ["twotwotwotwo"], ["oneoneoneone"]]
    assert sorted(model.batches[0]) == ["one", "two"]


def test_equal_items_with_different_keys_are_not_the_same() -> None:
    model = Memorable()
    model.identity = lambda item: item.lower()  # type: ignore[method-assign]
    subject = queue(model)
    chunks = [ask(subject, [text]) for text in ("one", "ONE")]
    run_all(subject)
    assert [outputs(chunk)[0] for chunk in chunks] == [["oneoneoneone"], ["ONEONEONEONE"]]


def test_an_error_reaches_each_of_the_equal_items() -> None:
    subject = queue(Memorable())
    bad = [ask(subject, ["bad!"]) for _ in range(5)]
    good = [ask(subject, ["good"]) for _ in range(3)]
    run_all(subject)
    errors = [error(chunk) for chunk in bad]
    assert all(isinstance(one, PoisonError) for one in errors)
    assert len(set(map(id, errors))) == len(errors)
    assert [outputs(chunk)[0] for chunk in good] == [["goodgoodgoodgood"]] * 3


def test_a_task_that_is_gone_takes_nothing_from_those_that_asked_for_the_same() -> None:
    model = Memorable()
    subject = queue(model)
    first, second, third = (ask(subject, ["one"]) for _ in range(3))
    subject.drop(first)
    batch = subject.next_batch()
    assert len(batch) == 2
    subject.drop(second)
    compute(subject, batch)
    assert outputs(third) == [["oneoneoneone"]]
    assert not second.done.done()
    assert len(subject) == 0


def test_an_equal_item_that_comes_while_one_is_computed_is_computed_again() -> None:
    model = Memorable()
    subject = queue(model)
    first = ask(subject, ["one"])
    batch = subject.next_batch()
    second = ask(subject, ["one"])
    compute(subject, batch)
    assert outputs(first)
    assert not second.done.done()
    run_all(subject)
    assert outputs(second) == outputs(first)


def test_many_equal_items_count_as_one_for_the_sizes_of_batches_and_their_memory() -> None:
    class Small(SmallLetters, Memorable):
        pass

    model = Small(most=40)
    subject = queue(model)
    chunks = [ask(subject, ["x" * 20]) for _ in range(100)] + [ask(subject, ["y" * 20])]
    run_all(subject)
    assert model.refused == 0
    assert all(outputs(chunk) for chunk in chunks)
    assert sum(map(len, model.batches)) == 2
    assert (subject.counters.items, subject.counters.padded_cost) == (2, 40)


def test_equal_items_that_run_out_of_memory_fail_as_one_by_itself_does() -> None:
    class Small(SmallLetters, Memorable):
        pass

    subject = queue(Small(most=8))
    bad = [ask(subject, ["it never fits"]) for _ in range(3)]
    good = ask(subject, ["fine"])
    run_all(subject)
    assert all(isinstance(error(chunk), DeviceOutOfMemoryError) for chunk in bad)
    assert outputs(good)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.booleans()), max_size=60),
    st.integers(1, 60),
)
def test_whatever_comes_and_goes_each_gets_its_output_and_nothing_is_left(
    steps: list[tuple[int, int, bool]], most: int
) -> None:
    subject = queue(Memorable())
    asked: list[tuple[Chunk, str]] = []
    dropped = set()
    for text, app, is_drop in steps:
        if is_drop and asked:
            number = text * 7 % len(asked)
            if not asked[number][0].done.done():
                dropped.add(number)
            subject.drop(asked[number][0])
        else:
            asked.append((ask(subject, ["x" * (text + 1)], f"app{app}"), "x" * (text + 1)))
        if len(subject) >= most:
            step(subject)
    run_all(subject)
    for number, (chunk, text) in enumerate(asked):
        assert number in dropped or outputs(chunk) == [[text * 4]]
    assert (len(subject), subject.cost) == (0, 0)


class Text(str):
    """One that can be referred to weakly."""


def test_what_was_computed_or_dropped_is_not_kept_by_what_still_waits() -> None:
    entry = Letters()
    subject = queue(entry)
    ask(subject, ["waits" * 100] * 50)
    refs: list[weakref.ref[Text]] = []

    def ask_and_remember() -> Chunk:
        text = Text("a text")
        refs.append(weakref.ref(text))
        return ask(subject, [text])

    gc.disable()  # nothing of this is in a cycle
    try:
        computed, dropped = ask_and_remember(), ask_and_remember()
        subject.drop(dropped)
        drive(subject, computed)
        assert outputs(computed)
        assert len(subject)
        entry.batches.clear()
        assert [ref() for ref in refs] == [None, None]
    finally:
        gc.enable()


def test_items_of_a_call_that_is_over_are_not_tried_again() -> None:
    entry = Letters()
    subject = queue(entry)
    gone, stays = ask(subject, ["gone!"]), ask(subject, ["stay"])
    batch = subject.next_batch()
    subject.drop(gone)
    subject.failed(batch, PoisonError())
    run_all(subject)
    assert entry.batches == [["stay"]]
    assert outputs(stays) == ["staystay"]


def end_all(count: int, monkeypatch: pytest.MonkeyPatch) -> float:
    """Touches per call, if as many calls of one item are dropped, the newest first."""
    monkeypatch.setattr("legit_worker.pool.queue.Item", Touched)
    subject = queue(Letters())
    chunks = [ask(subject, ["text"]) for _ in range(count)]
    assert subject.is_full
    spent = touches(lambda: [subject.drop(chunk) for chunk in reversed(chunks)])
    assert len(subject) == 0
    return spent / count


def test_ending_4096_tasks_costs_each_as_much_as_ending_one_of_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    assert end_all(4096, monkeypatch) <= end_all(64, monkeypatch) + 2


def test_looking_whether_a_batch_is_full_costs_as_much_however_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("legit_worker.pool.queue.Item", Touched)
    subject = queue(Letters())
    for _ in range(16):
        ask(subject, ["text"] * FRONT)
    assert touches(lambda: (len(subject), subject.cost, repr(subject), subject.waiting_seconds())) == 0
    subject.next_batch()
    assert touches(lambda: subject.is_full) < 4 * FRONT
