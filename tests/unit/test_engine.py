"""The engine: batches from calls, and what happens when one item spoils a batch."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from time import monotonic
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from legit_worker.batching.demand import ARRIVALS
from legit_worker.batching.sizing import FIRST_BATCH
from legit_worker.device.devices import Device, Launch
from legit_worker.errors import DeviceLostError, DeviceOutOfMemoryError
from legit_worker.pool.calls import Call
from legit_worker.pool.engine import UNKNOWN_SECONDS, Engine


class PoisonError(Exception):
    pass


class FakeEntry:
    """An entry whose model is loaded, counts letters, and chokes on `!`."""

    def __init__(self, alias: str = "letters", broken: bool = False) -> None:
        self.alias = alias
        self.model = self
        self.broken = broken
        self.batches: list[list[str]] = []

    def cost(self, item: str) -> int:
        return len(item)

    def launch(self, batch: Sequence[str]) -> Launch:
        return Device("cpu").launch(lambda: self.forward(batch))

    def observe(self, count: int, longest: int, launch: Launch) -> None:
        pass

    def largest_cost(self, longest: int) -> int:
        return 16_384

    def is_lost(self, error: BaseException) -> bool:
        return False

    def batch_key(self, item: str) -> Hashable:
        return item.isupper()

    def forward(self, batch: Sequence[str]) -> list[str]:
        self.batches.append(list(batch))
        if self.broken or any("!" in item for item in batch):
            raise PoisonError(f"{len(batch)} items")
        return [item * 2 for item in batch]


def engine(**options: Any) -> Engine:
    return Engine(**{"max_batch_seconds": 0.5, "weight_of": lambda app: 1.0, **options})


def ask(engine: Engine, entry: Any, items: list[str], app: str = "") -> Call:
    call = Call(app=app, size=len(items), low_water=0, on_progress=lambda: None)
    engine.add(entry, call, 0, items)
    return call


def run_all(engine: Engine) -> None:
    while engine.step():
        pass


def test_calls_of_many_tasks_share_a_batch_and_each_gets_its_own_part() -> None:
    subject, entry = engine(), FakeEntry()
    calls = [ask(subject, entry, [text]) for text in ("one", "two", "six", "ten")]
    run_all(subject)
    assert len(entry.batches) == 1
    assert [call.outputs for call in calls] == [["oneone"], ["twotwo"], ["sixsix"], ["tenten"]]


def test_outputs_come_in_the_callers_order_whatever_the_lengths() -> None:
    subject, entry = engine(), FakeEntry()
    items = ["x" * length for length in (9, 1, 200, 3, 40, 2)]
    call = ask(subject, entry, items)
    run_all(subject)
    assert call.outputs == [item * 2 for item in items]


def test_a_bad_item_fails_its_own_call_with_its_own_error_and_no_other() -> None:
    subject, entry = engine(), FakeEntry()
    good = [ask(subject, entry, [f"good{n}"]) for n in range(7)]
    bad = ask(subject, entry, ["bad!!"])
    run_all(subject)
    assert [call.outputs for call in good] == [[f"good{n}" * 2] for n in range(7)]
    assert isinstance(bad.error, PoisonError)
    assert str(bad.error) == "1 items"


def test_a_model_that_always_fails_fails_every_call_and_leaves_nothing_queued() -> None:
    subject, entry = engine(), FakeEntry(broken=True)
    calls = [ask(subject, entry, [f"item{n}"]) for n in range(5)]
    run_all(subject)
    assert all(isinstance(call.error, PoisonError) for call in calls)
    assert len(subject) == 0


class SmallEntry(FakeEntry):
    """One whose device takes batches up to a padded cost, and now and then not even those."""

    def __init__(self, most: int, storm: float = 0.0) -> None:
        super().__init__()
        self.most = most
        self._draw = random.Random(5)
        self._storm = storm
        self.refused = 0

    def forward(self, batch: Sequence[str]) -> list[str]:
        if len(batch) * max(map(len, batch)) > self.most or self._draw.random() < self._storm:
            self.refused += 1
            raise MemoryError("CUDA out of memory")
        return super().forward(batch)


def test_batches_that_run_out_of_memory_are_split_and_later_ones_are_smaller() -> None:
    subject, entry = engine(), SmallEntry(most=64)
    for _ in range(20):
        calls = [ask(subject, entry, [f"item{n:04}"]) for n in range(50)]
        run_all(subject)
        assert [call.outputs for call in calls] == [[f"item{n:04}" * 2] for n in range(50)]
    assert entry.refused < 20
    assert subject.counters["letters"].report()["out_of_memory"] == entry.refused


def test_a_limit_that_was_learned_rises_again() -> None:
    subject, entry = engine(), SmallEntry(most=64)
    ask(subject, entry, ["x" * 8] * 100)
    run_all(subject)
    entry.most = 10**9
    entry.batches.clear()
    for _ in range(300):
        ask(subject, entry, ["x" * 8] * 100)
        run_all(subject)
    assert len(entry.batches[-1]) * 8 > 4 * 64


def test_an_item_that_never_fits_fails_alone_and_names_the_sizes() -> None:
    subject, entry = engine(), SmallEntry(most=64)
    good = [ask(subject, entry, ["fine"]) for _ in range(5)]
    bad = ask(subject, entry, ["x" * 100])
    run_all(subject)
    assert isinstance(bad.error, DeviceOutOfMemoryError)
    assert "cost 100" in str(bad.error)
    assert all(call.outputs == ["finefine"] for call in good)
    assert len(subject) == 0


def test_a_storm_of_failures_loses_no_item() -> None:
    """Every third batch runs out of memory, whatever its size."""
    subject, entry = engine(), SmallEntry(most=10**9, storm=1 / 3)
    calls = [ask(subject, entry, [f"item{n}"]) for n in range(2000)]
    run_all(subject)
    assert entry.refused > 10
    assert [call.outputs for call in calls] == [[f"item{n}" * 2] for n in range(2000)]


def test_memory_is_freed_before_the_next_try() -> None:
    freed = []
    subject = engine(free_memory=lambda: freed.append(True))
    ask(subject, SmallEntry(most=8), ["four", "four", "four"])
    run_all(subject)
    assert freed


def test_a_batch_that_the_end_of_the_worker_interrupted_is_still_there_to_drain() -> None:
    subject, entry = engine(), FakeEntry()
    calls = [ask(subject, entry, [text]) for text in ("one", "two")]
    forward, entry.forward = entry.forward, lambda batch: (_ for _ in ()).throw(SystemExit)  # type: ignore
    with pytest.raises(SystemExit):
        subject.step()
    entry.forward = forward  # type: ignore
    run_all(subject)
    assert [call.outputs for call in calls] == [["oneone"], ["twotwo"]]


def test_a_call_dropped_from_a_failed_batch_is_not_tried_again() -> None:
    subject, entry = engine(), FakeEntry()
    gone = ask(subject, entry, ["bad!", "bad!", "bad!", "good"])
    subject.step()
    subject.drop(entry, gone)  # type: ignore[arg-type]
    assert len(subject) == 0
    assert not subject.step()


def test_an_exclusive_call_goes_first_and_others_may_ride_along() -> None:
    subject, entry = engine(), FakeEntry()
    older = [ask(subject, entry, ["x" * 300]) for _ in range(30)]
    neighbour, mine = ask(subject, entry, ["two"]), ask(subject, entry, ["one"])
    subject.step_for(entry, mine)  # type: ignore[arg-type]
    assert mine.outputs == ["oneone"]
    assert neighbour.outputs == ["twotwo"]
    assert not any(call.computed for call in older)


def test_an_exclusive_call_that_shared_a_bad_batch_is_tried_again_by_itself() -> None:
    subject, entry = engine(), FakeEntry()
    mine, bad = ask(subject, entry, ["good"]), ask(subject, entry, ["bad!"])
    while mine.computed == 0:
        subject.step_for(entry, mine)  # type: ignore[arg-type]
    assert mine.outputs == ["goodgood"]
    run_all(subject)
    assert isinstance(bad.error, PoisonError)


def test_a_key_that_is_no_key_fails_its_own_call_and_leaves_nothing_queued() -> None:
    subject, entry = engine(), FakeEntry()
    entry.batch_key = lambda item: hash([item])  # type: ignore  # as Entry's, which checks it
    with pytest.raises(TypeError, match="unhashable"):
        ask(subject, entry, ["one", "two"])
    assert len(subject) == 0


def test_items_with_different_keys_never_share_a_batch() -> None:
    subject, entry = engine(), FakeEntry()
    ask(subject, entry, ["abc", "ABC", "def", "DEF"])
    run_all(subject)
    assert sorted(map(sorted, entry.batches)) == [["ABC", "DEF"], ["abc", "def"]]


def test_models_take_turns_by_the_seconds_they_had() -> None:
    subject, first, second = engine(), FakeEntry("first"), FakeEntry("second")
    ask(subject, first, ["a" * 300] * 40)
    ask(subject, second, ["b"])
    for _ in range(2):
        subject.step()
    assert first.batches
    assert second.batches


def test_a_dropped_call_is_not_computed() -> None:
    subject, entry = engine(), FakeEntry()
    gone, stays = ask(subject, entry, ["gone"]), ask(subject, entry, ["stay"])
    subject.drop(entry, gone)  # type: ignore[arg-type]
    run_all(subject)
    assert entry.batches == [["stay"]]
    assert (stays.computed, gone.computed) == (1, 0)


def test_a_batch_is_predicted_to_end_within_the_bound() -> None:
    subject, entry = engine(max_batch_seconds=0.05), FakeEntry()
    ask(subject, entry, ["x" * 50] * 100)
    subject.step()
    sizing = subject._queues["letters"].sizing
    sizing.observe(10, 50, 0.1)
    within = sizing.costs.largest(50, 0.05)
    subject.step()
    assert len(entry.batches[1]) == within < 10


def test_counters_say_how_much_was_padding() -> None:
    subject, entry = engine(), FakeEntry()
    ask(subject, entry, ["xx", "xxxx"])
    run_all(subject)
    counters = subject.counters["letters"]
    assert (counters.batches, counters.items) == (1, 2)
    assert counters.waste == pytest.approx(1 - 6 / 8)


class GpuEntry(FakeEntry):
    """One whose batches are in flight until the test lands them; `?` breaks the device."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def launch(self, batch: Sequence[str]) -> Launch:
        self.batches.append(list(batch))
        outputs = [item * 2 for item in batch]
        self.launches.append(Launch(outputs=outputs, seconds=0.01, is_done=False))
        return self.launches[-1]

    def land(self, error: Exception | None = None) -> None:
        launch = next(launch for launch in self.launches if not launch.is_done)
        launch.error, launch.is_done = error, True

    def is_lost(self, error: BaseException) -> bool:
        return "device-side assert" in str(error)


#: Two batches of these are full, and a third is not.
FULL = ["x" * 4096] * 4


def test_a_batch_in_flight_is_collected_when_it_is_done() -> None:
    watched: list[Launch] = []
    subject, entry = engine(watch=lambda launch, on_done: watched.append(launch)), GpuEntry()
    call = ask(subject, entry, ["one", "two"])
    assert subject.step()
    assert subject.is_busy
    subject.collect()
    assert call.computed == 0
    assert watched == entry.launches
    entry.land()
    subject.collect()
    assert call.outputs == ["oneone", "twotwo"]
    assert not subject.is_busy
    assert subject.counters["letters"].batches == 1


def test_a_tasks_clock_counts_the_batches_of_its_items_while_the_device_is_at_them() -> None:
    on_done: list[Callable[[], None]] = []
    subject, entry = engine(watch=lambda launch, then: on_done.append(then)), GpuEntry()
    first, behind = (ask(subject, entry, [text]) for text in ("one", "TWO"))  # never in one batch
    subject.step()
    subject.step()
    assert len(entry.launches) == 2
    assert (first.clock.is_in_batch, behind.clock.is_in_batch) == (True, False)
    entry.land()
    on_done[0]()
    now = monotonic() + 60
    assert first.clock.seconds(now) < 60, "its batch is over, though nobody has taken it yet"
    subject.collect()
    assert (first.clock.seconds(now), first.clock.is_in_batch) == (entry.launches[0].seconds, False)
    assert behind.clock.is_in_batch
    entry.land(PoisonError())
    subject.collect()
    assert not behind.clock.is_in_batch


def test_a_batch_that_fails_counts_and_so_do_its_halves() -> None:
    subject, entry = engine(), FakeEntry()
    calls = [ask(subject, entry, [text]) for text in ("one", "two!")]
    run_all(subject)
    assert calls[1].error is not None
    for call in calls:
        own = call.clock.seconds(0.0)
        assert own > 0
        assert call.clock.seconds(60.0) == own, "it is over"


def test_behind_a_batch_in_flight_only_a_full_one_is_worth_handing_over() -> None:
    subject, entry = engine(), GpuEntry()
    ask(subject, entry, ["one"])
    assert subject.can_step
    subject.step()
    ask(subject, entry, ["two"])
    assert not subject.can_step, "while the device is busy, more may come"
    ask(subject, entry, FULL * 3)
    assert subject.can_step
    subject.step()
    assert not subject.can_step, "the device has enough to do"
    entry.land()
    subject.collect()
    assert subject.can_step


def test_one_that_waits_alone_gets_what_is_in_flight_first() -> None:
    subject, entry = engine(), GpuEntry()
    other = ask(subject, entry, ["other"])
    subject.step()
    mine = ask(subject, entry, ["mine"])
    for launch in entry.launches:
        launch.wait = entry.land  # type: ignore[method-assign]
    entry.launch = landing(entry.launch)  # type: ignore[method-assign]
    subject.step_for(entry, mine)  # type: ignore[arg-type]
    assert (other.outputs, mine.outputs) == (["otherother"], ["minemine"])


def landing(launch_of: Any) -> Any:
    """Launches that are done once they are waited for."""

    def launch(batch: Sequence[str]) -> Launch:
        made: Launch = launch_of(batch)
        made.wait = lambda: setattr(made, "is_done", True)  # type: ignore[method-assign]
        return made

    return launch


def test_a_batch_that_fails_in_flight_is_split_as_any_other() -> None:
    subject, entry = engine(), GpuEntry()
    calls = [ask(subject, entry, [text]) for text in ("one", "two")]
    subject.step()
    entry.land(MemoryError("CUDA out of memory"))
    subject.collect()
    for _ in range(2):
        subject.step()
        entry.land()
        subject.collect()
    assert [len(batch) for batch in entry.batches] == [2, 1, 1]
    assert [call.outputs for call in calls] == [["oneone"], ["twotwo"]]


def test_a_lost_device_fails_the_item_that_was_alone_and_no_other() -> None:
    subject, entry = engine(), GpuEntry()
    broken = RuntimeError("CUDA error: device-side assert triggered")
    call = ask(subject, entry, ["one"])
    subject.step()
    entry.land(broken)
    with pytest.raises(DeviceLostError, match=r"a batch of 1 broke model 'letters'.*device-side assert"):
        subject.collect()
    assert call.error is broken
    several = [ask(subject, entry, [text]) for text in ("two", "three")]
    subject.step()
    entry.land(broken)
    with pytest.raises(DeviceLostError):
        subject.collect()
    assert [call.error for call in several] == [None, None]
    assert len(subject) == 2


def test_a_batch_is_no_larger_than_memory_allows() -> None:
    subject, entry = engine(), FakeEntry()
    entry.largest_cost = lambda longest: 64  # type: ignore[method-assign]
    ask(subject, entry, ["x" * 8] * 100)
    run_all(subject)
    assert max(map(len, entry.batches)) == 8


def test_a_broken_device_that_looks_like_memory_is_broken() -> None:
    subject, entry = engine(), GpuEntry()
    several = [ask(subject, entry, [text]) for text in ("one", "two")]
    subject.step()
    entry.land(RuntimeError("device-side assert; CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    with pytest.raises(DeviceLostError):
        subject.collect()
    assert [call.error for call in several] == [None, None]


def test_who_was_launched_behind_the_one_that_broke_the_device_is_not_blamed() -> None:
    subject, entry = engine(), GpuEntry()
    culprits = ask(subject, entry, ["one", "two"])
    subject.step()
    bystander = ask(subject, entry, ["three"])

    def refuse(batch: Sequence[str]) -> Launch:
        raise RuntimeError("CUDA error: device-side assert triggered")

    entry.launch = refuse  # type: ignore[method-assign]
    with pytest.raises(DeviceLostError):
        subject.step()
    assert (culprits.error, bystander.error) == (None, None)


def test_a_batch_stays_where_memory_can_not_be_freed() -> None:
    def refuse() -> None:
        raise RuntimeError("empty_cache failed")

    subject = engine(free_memory=refuse)
    call = ask(subject, SmallEntry(most=8), ["four", "four", "four"])
    run_all(subject)
    assert call.outputs == ["fourfour"] * 3


def test_longer_items_are_bounded_by_their_own_need_of_memory() -> None:
    """A long item takes more for each unit than the short one that is first in line."""
    subject, entry = engine(), FakeEntry()
    entry.largest_cost = lambda longest: 4000 if longest < 100 else 400  # type: ignore[method-assign]
    for text in ("x" * 8, *["x" * 200] * 20):
        ask(subject, entry, [text])
    run_all(subject)
    assert all(len(batch) * max(map(len, batch)) <= 400 for batch in entry.batches if max(map(len, batch)) >= 100)


def test_a_model_whose_forward_waits_for_the_device_is_not_put_behind_another_batch() -> None:
    subject, entry = engine(), GpuEntry()
    ask(subject, entry, FULL * 4)
    subject.step()
    assert subject.can_step
    subject.step()
    entry.launches[1].host_seconds = 10.0
    for _ in range(2):
        entry.land()
        subject.collect()
    subject.step()
    assert len(subject)
    assert not subject.can_step


def test_an_output_that_can_not_be_finished_fails_its_own_call() -> None:
    subject, entry = engine(), FakeEntry()
    call, other = ask(subject, entry, ["one"]), ask(subject, entry, ["two"])
    call.postprocess = lambda output: 1 / 0
    run_all(subject)
    assert isinstance(call.error, ZeroDivisionError)
    assert other.outputs == ["twotwo"]


def test_a_model_whose_launch_takes_all_the_time_there_is_still_has_batches() -> None:
    subject, entry = engine(), FakeEntry()
    ask(subject, entry, ["x"] * 100)
    queue = subject._queues["letters"]
    for count in (8, 16, 32, 64, 8, 16, 32):
        queue.sizing.observe(count, 1, 0.6 + 0.001 * count)
    subject.step()
    assert len(entry.batches[-1]) == 100


def test_a_model_that_takes_as_long_for_many_items_as_for_one_soon_gets_them_all() -> None:
    """Half a second for any batch, give or take; nothing smaller than what already ran tells more about it."""
    subject, entry = engine(), FakeEntry()
    draw, sizes = random.Random(1), []

    def launch(batch: Sequence[str]) -> Launch:
        sizes.append(len(batch))
        return Launch(outputs=[item * 2 for item in batch], seconds=0.5 + draw.uniform(0, 1e-3))

    entry.launch = launch  # type: ignore[method-assign]
    ask(subject, entry, ["text 10"] * 300)
    run_all(subject)
    assert len(sizes) < 15
    assert max(sizes) > 100


def test_a_model_that_was_only_asked_for_single_items_learns_what_more_of_them_take() -> None:
    """Each batch takes as long: what the first ones show fits a model of which each item takes that long, too."""
    subject, entry = engine(), FakeEntry()
    sizes: list[int] = []

    def launch(batch: Sequence[str]) -> Launch:
        sizes.append(len(batch))
        return Launch(outputs=list(batch), seconds=0.2)

    entry.launch = launch  # type: ignore[method-assign]
    for count in [1] * 80 + [1000]:
        ask(subject, entry, ["xxxx"] * count)
        run_all(subject)
    grown = sizes[80:]
    assert grown[0] == 2
    assert max(grown) == 256
    assert all(after <= 4 * max(2, *grown[: number + 1]) for number, after in enumerate(grown[1:]))


def ran(subject: Engine, entry: Any, *batches: tuple[int, float]) -> None:
    """As if batches of that many items of cost 4 had taken so many seconds."""
    for count, seconds in batches:
        subject._queue(entry).sizing.observe(count, 4, seconds)


def test_before_any_batch_ran_nothing_is_known_about_the_work_that_is_held() -> None:
    subject, entry = engine(), FakeEntry()
    assert subject.held_seconds(5) is None
    ask(subject, entry, ["text"])
    assert subject.held_seconds(5) == 6 * UNKNOWN_SECONDS
    run_all(subject)
    assert subject.held_seconds(5) != 5 * UNKNOWN_SECONDS


def test_tasks_whose_model_is_yet_to_be_loaded_are_held_too() -> None:
    subject, known, cold = engine(), FakeEntry("known"), FakeEntry("cold")
    with subject.expecting(cold):
        assert subject.held_seconds() == UNKNOWN_SECONDS
        assert subject.held_seconds(7) == 8 * UNKNOWN_SECONDS
    assert subject.held_seconds() is None
    ran(subject, known, (1, 0.1), (2, 0.2))
    with subject.expecting(cold), subject.expecting(known):
        assert subject.held_seconds() == UNKNOWN_SECONDS, "the known model's next batch counts nothing"
        with contextlib.ExitStack() as many:
            for _ in range(1000):
                many.enter_context(subject.expecting(known))
            assert subject.held_seconds() > 2 * UNKNOWN_SECONDS  # type: ignore[operator]


def test_held_work_is_what_waits_and_what_further_tasks_like_the_last_ones_bring() -> None:
    subject, entry = engine(), FakeEntry()
    ran(subject, entry, (1, 0.1), (2, 0.2))
    for _ in range(10):
        ask(subject, entry, ["text"] * 3)
    assert subject.held_seconds() == pytest.approx((30 - 1) * 0.1), "all but the next batch, which is one item"
    assert subject.held_seconds(100) == pytest.approx((330 - 1) * 0.1)


def test_further_tasks_are_for_the_models_that_the_last_ones_called() -> None:
    subject, cheap, dear = engine(), FakeEntry("cheap"), FakeEntry("dear")
    ran(subject, cheap, (1, 0.01), (100, 1.0))
    ran(subject, dear, (1, 1.0), (2, 2.0))
    for _ in range(10):
        for entry in (cheap, cheap, cheap, dear):
            ask(subject, entry, ["text"])
    rate = (subject.held_seconds(140) - subject.held_seconds(40)) / 100  # type: ignore[operator]
    assert rate == pytest.approx(0.75 * 0.01 + 0.25 * 1.0)
    for _ in range(ARRIVALS):
        ask(subject, cheap, ["text"])
    rate = (subject.held_seconds(140) - subject.held_seconds(40)) / 100  # type: ignore[operator]
    assert rate == pytest.approx(0.01)


def test_until_a_launch_is_known_the_next_batch_is_held_for_nothing_and_the_rest_at_the_items_price() -> None:
    subject, entry = engine(), FakeEntry()
    ran(subject, entry, (1, 2.5))
    ask(subject, entry, ["text"])
    assert subject.held_seconds(1) == 0, "a batch of two tells whether the launch takes long"
    assert subject.held_seconds(2) == pytest.approx(2.5)
    ran(subject, entry, (2, 2.5))
    assert subject.held_seconds(7) == 0
    assert subject.held_seconds(15) == pytest.approx(2.5)


def test_a_model_that_never_ran_counts_as_if_its_first_batch_took_the_bound() -> None:
    subject, known, new = engine(), FakeEntry("known"), FakeEntry("new")
    ran(subject, known, (1, 0.0001))
    ask(subject, new, ["text"] * 3 * FIRST_BATCH)
    assert subject.held_seconds() == pytest.approx(2 * 0.5)


def test_tasks_that_wait_for_a_load_are_held_but_there_is_nothing_to_compute_for_them() -> None:
    subject, known, loading = engine(), FakeEntry("known"), FakeEntry("loading")
    ran(subject, known, (1, 0.0001), (8, 0.0008))
    with ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(subject.expecting(loading))  # type: ignore[arg-type]
        assert subject.held_seconds() == pytest.approx(50 * UNKNOWN_SECONDS)
        assert subject.surplus_seconds() == 0


def test_halves_of_a_batch_that_failed_are_held_too() -> None:
    subject, entry = engine(), FakeEntry(broken=True)
    ran(subject, entry, (1, 0.1), (2, 0.2), (100, 0.5), (100, 0.5))
    ask(subject, entry, ["text"] * 100)
    before = subject.held_seconds(1000)
    subject.step()
    assert subject.held_seconds(1000) == before


@given(
    batches=st.lists(st.tuples(st.integers(1, 64), st.floats(1e-4, 5.0)), max_size=10),
    calls=st.lists(st.lists(st.integers(1, 100), min_size=1, max_size=5), max_size=20),
    more=st.lists(st.integers(0, 2000), min_size=2, max_size=2).map(sorted),
)
def test_held_seconds_are_never_negative_nor_less_for_more_tasks(
    batches: list[tuple[int, float]], calls: list[list[int]], more: list[int]
) -> None:
    subject, entries = engine(), [FakeEntry("first"), FakeEntry("second")]
    ran(subject, entries[0], (1, 0.1), *batches)
    for number, costs in enumerate(calls):
        ask(subject, entries[number % 2], ["x" * cost for cost in costs])
    fewer, many = map(subject.held_seconds, more)
    assert fewer is not None
    assert many is not None
    assert 0 <= fewer <= many
