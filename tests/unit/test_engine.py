"""The engine: batches from calls, and what happens when one item spoils a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from time import monotonic
from typing import Any

import pytest
import torch
from celery.exceptions import WorkerShutdown, WorkerTerminate
from greenlet import GreenletExit
from hypothesis import given
from hypothesis import strategies as st
from letters import Letters, PoisonError, error, outputs

from legit_worker.batching.demand import ARRIVALS
from legit_worker.batching.sizing import FIRST_BATCH
from legit_worker.device.devices import Launch
from legit_worker.errors import DeviceLostError
from legit_worker.pool.calls import Call, Chunk
from legit_worker.pool.engine import UNKNOWN_SECONDS, Engine
from legit_worker.pool.queue import ModelQueue


def engine(**options: Any) -> Engine:
    return Engine(**{"max_batch_seconds": 0.5, "weight_of": lambda app: 1.0, **options})


def ask(engine: Engine, entry: Any, items: list[str], app: str = "") -> Chunk:
    return engine.submit(entry, Call(app=app), items)


def run_all(engine: Engine) -> None:
    while engine.step():
        pass


def test_a_fault_between_two_tasks_is_told_as_a_lost_device(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = engine()
    ask(subject, Letters(), ["one"])
    monkeypatch.setattr(ModelQueue, "next_batch", lambda self: [][0])
    with pytest.raises(DeviceLostError, match=r"failed between two tasks.*IndexError"):
        subject.step()


def test_items_whose_keys_can_not_be_compared_share_no_batch() -> None:
    subject, entry = engine(), Letters()
    entry.batch_key = lambda text: ("shape", torch.ones(2))  # type: ignore[method-assign, assignment]
    call = ask(subject, entry, ["one", "two"])
    run_all(subject)
    assert outputs(call) == ["oneone", "twotwo"]
    assert subject.counters[entry.alias].batches == 2


@pytest.mark.parametrize("end", [WorkerShutdown, WorkerTerminate, GreenletExit])
@pytest.mark.parametrize("method", ["forward", "postprocess"])
def test_a_batch_that_the_end_of_the_worker_interrupted_is_still_there_to_drain(
    end: type[BaseException], method: str
) -> None:
    subject, entry = engine(), Letters()
    calls = [ask(subject, entry, [text]) for text in ("one", "two", "six")]
    interrupted = getattr(entry, method)

    def interrupt(argument: Any) -> Any:
        if argument == "oneone":  # has been delivered before the signal comes
            return interrupted(argument)
        setattr(entry, method, interrupted)
        raise end

    setattr(entry, method, interrupt)
    with pytest.raises(end):
        subject.step()
    run_all(subject)
    assert [outputs(call) for call in calls] == [["oneone"], ["twotwo"], ["sixsix"]]


def test_a_model_that_nobody_asked_for_a_while_gets_no_credit_for_that() -> None:
    subject, busy, away = engine(), Letters("busy"), Letters("away")
    for model in (busy, away):
        model.launch = lambda batch: Launch(outputs=list(batch), seconds=1.0)  # type: ignore[method-assign]
    ask(subject, away, ["text"])
    subject.step()
    for _ in range(20):
        ask(subject, busy, ["text"])
        subject.step()
    for model in (busy, away):
        ask(subject, model, ["x" * 4096] * 100)
    before = subject.counters["away"].batches
    for _ in range(10):
        subject.step()
    assert 4 <= subject.counters["away"].batches - before <= 6


def test_a_model_that_computed_out_of_turn_waits_no_longer_than_a_new_one() -> None:
    subject, old, new = engine(), Letters("old"), Letters("new")
    for model in (old, new):
        model.launch = lambda batch: Launch(outputs=list(batch), seconds=1.0)  # type: ignore[method-assign]
    for _ in range(20):
        subject.drive(ask(subject, old, ["text"], app="alone"))
    for model in (new, old):
        ask(subject, model, ["x" * 4096] * 100)
    before = subject.counters["old"].batches
    for _ in range(10):
        subject.step()
    assert 4 <= subject.counters["old"].batches - before <= 6


@pytest.mark.parametrize("bad", [KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("method", ["forward", "postprocess"])
def test_what_would_end_a_process_is_the_guilty_items_error_if_a_model_raises_it(
    bad: type[BaseException], method: str
) -> None:
    subject, entry = engine(), Letters()
    calls = [ask(subject, entry, [text]) for text in ("one", "bad", "six")]
    healthy = getattr(entry, method)

    def raise_it(argument: Any) -> Any:
        if "bad" in argument or "badbad" in argument:
            raise bad
        return healthy(argument)

    setattr(entry, method, raise_it)
    run_all(subject)
    assert [outputs(calls[0]), outputs(calls[2])] == [["oneone"], ["sixsix"]]
    assert isinstance(error(calls[1]), bad)
    assert len(subject) == 0


def test_models_take_turns_by_the_seconds_they_had() -> None:
    subject, first, second = engine(), Letters("first"), Letters("second")
    ask(subject, first, ["a" * 300] * 40)
    ask(subject, second, ["b"])
    for _ in range(2):
        subject.step()
    assert first.batches
    assert second.batches


class GpuEntry(Letters):
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
    assert "1 batches in flight" in repr(subject)
    subject.collect()
    assert not call.done.done()
    assert watched == entry.launches
    entry.land()
    subject.collect()
    assert outputs(call) == ["oneone", "twotwo"]
    assert "0 batches in flight" in repr(subject)
    assert subject.counters["letters"].batches == 1


def test_a_tasks_clock_counts_the_batches_of_its_items_while_the_device_is_at_them() -> None:
    on_done: list[Callable[[], None]] = []
    subject, entry = engine(watch=lambda launch, then: on_done.append(then)), GpuEntry()
    first, behind = (ask(subject, entry, [text]) for text in ("one", "TWO"))  # never in one batch
    subject.step()
    subject.step()
    assert len(entry.launches) == 2
    assert (first.call.clock.is_in_batch, behind.call.clock.is_in_batch) == (True, False)
    entry.land()
    on_done[0]()
    now = monotonic() + 60
    assert first.call.clock.seconds(now) < 60, "its batch is over, though nobody has taken it yet"
    subject.collect()
    assert (first.call.clock.seconds(now), first.call.clock.is_in_batch) == (entry.launches[0].seconds, False)
    assert behind.call.clock.is_in_batch
    entry.land(PoisonError())
    subject.collect()
    assert not behind.call.clock.is_in_batch


def test_a_batch_that_fails_counts_and_so_do_its_halves() -> None:
    subject, entry = engine(), Letters()
    calls = [ask(subject, entry, [text]) for text in ("one", "two!")]
    run_all(subject)
    assert error(calls[1]) is not None
    for call in calls:
        own = call.call.clock.seconds(0.0)
        assert own > 0
        assert call.call.clock.seconds(60.0) == own, "it is over"


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


def test_items_of_an_app_that_sends_little_do_not_wait_for_company() -> None:
    subject, entry = engine(), Letters()
    ask(subject, entry, FULL * 3, app="flood")
    assert not subject.is_urgent
    for _ in range(2):
        ask(subject, entry, ["one"], app="small")
        subject.step()
    assert not subject.is_urgent, "none of them waits"
    ask(subject, entry, ["two"], app="small")
    assert subject.is_urgent
    run_all(subject)


def test_one_that_waits_alone_gets_what_is_in_flight_first() -> None:
    subject, entry = engine(), GpuEntry()
    other = ask(subject, entry, ["other"])
    subject.step()
    mine = ask(subject, entry, ["mine"])
    for launch in entry.launches:
        launch.wait = entry.land  # type: ignore[method-assign]
    entry.launch = landing(entry.launch)  # type: ignore[method-assign]
    subject.drive(mine)
    assert (outputs(other), outputs(mine)) == (["otherother"], ["minemine"])


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
    assert [outputs(call) for call in calls] == [["oneone"], ["twotwo"]]


def test_a_lost_device_fails_the_item_that_was_alone_and_no_other() -> None:
    subject, entry = engine(), GpuEntry()
    broken = RuntimeError("CUDA error: device-side assert triggered")
    call = ask(subject, entry, ["one"])
    subject.step()
    entry.land(broken)
    with pytest.raises(DeviceLostError, match=r"a batch of 1 broke model 'letters'.*device-side assert"):
        subject.collect()
    assert error(call) is broken
    several = [ask(subject, entry, [text]) for text in ("two", "three")]
    subject.step()
    entry.land(broken)
    with pytest.raises(DeviceLostError):
        subject.collect()
    assert [error(call) for call in several] == [None, None]
    assert len(subject) == 2


def test_what_was_forgotten_can_still_be_dropped_by_the_tasks_that_end() -> None:
    subject, entry = engine(), Letters(broken=True)
    chunks = [ask(subject, entry, ["text"] * 10) for _ in range(10)]
    subject.step()  # whose halves wait now
    subject.forget()
    for chunk in chunks:
        subject.drop(chunk)
    assert len(subject) == 0
    assert not subject.can_step
    ask(subject, entry, ["text"])
    assert len(subject) == 1


def test_a_model_that_was_loaded_anew_computes_in_the_place_of_the_old_one() -> None:
    subject, old, new = engine(), Letters(), Letters()
    for model in (old, new):
        ask(subject, model, ["one"])
        subject.step()
    assert (len(old.batches), len(new.batches)) == (1, 1)
    assert subject.counters["letters"].batches == 2


def test_a_broken_device_that_looks_like_memory_is_broken() -> None:
    subject, entry = engine(), GpuEntry()
    several = [ask(subject, entry, [text]) for text in ("one", "two")]
    subject.step()
    entry.land(RuntimeError("device-side assert; CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    with pytest.raises(DeviceLostError):
        subject.collect()
    assert [error(call) for call in several] == [None, None]


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
    assert (error(culprits), error(bystander)) == (None, None)


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


def ran(subject: Engine, entry: Any, *batches: tuple[int, float]) -> None:
    """As if batches of that many items of cost 4 had taken so many seconds."""
    for count, seconds in batches:
        subject._queue(entry).sizing.observe(count, 4, seconds)


def test_before_any_batch_ran_nothing_is_known_about_the_work_that_is_held() -> None:
    subject, entry = engine(), Letters()
    assert subject.held_seconds(5) is None
    ask(subject, entry, ["text"])
    assert subject.held_seconds(5) == 6 * UNKNOWN_SECONDS
    run_all(subject)
    assert subject.held_seconds(5) != 5 * UNKNOWN_SECONDS


def test_tasks_whose_model_is_yet_to_be_loaded_are_held_too() -> None:
    subject, known, cold = engine(), Letters("known"), Letters("cold")
    with subject.expecting(cold.alias):
        assert subject.held_seconds() == UNKNOWN_SECONDS
        assert subject.held_seconds(7) == 8 * UNKNOWN_SECONDS
    assert subject.held_seconds() is None
    ran(subject, known, (1, 0.1), (2, 0.2))
    with subject.expecting(cold.alias), subject.expecting(known.alias):
        assert subject.held_seconds() == UNKNOWN_SECONDS, "the known model's next batch counts nothing"
        with contextlib.ExitStack() as many:
            for _ in range(1000):
                many.enter_context(subject.expecting(known.alias))
            assert subject.held_seconds() > 2 * UNKNOWN_SECONDS  # type: ignore[operator]


def test_tasks_that_wait_for_any_load_are_counted_until_they_wait_no_more() -> None:
    subject, first, second = engine(), Letters("first"), Letters("second")
    with subject.expecting(first.alias), subject.expecting(first.alias):
        assert subject.loading == 2
        with contextlib.suppress(PoisonError), subject.expecting(second.alias):
            assert subject.loading == 3
            raise PoisonError  # a load that failed
        assert subject.loading == 2
    assert subject.loading == 0


def test_held_work_is_what_waits_and_what_further_tasks_like_the_last_ones_bring() -> None:
    subject, entry = engine(), Letters()
    ran(subject, entry, (1, 0.1), (2, 0.2))
    for _ in range(10):
        ask(subject, entry, ["text"] * 3)
    assert subject.held_seconds() == pytest.approx((30 - 1) * 0.1), "all but the next batch, which is one item"
    assert subject.held_seconds(100) == pytest.approx((330 - 1) * 0.1)


def test_further_tasks_are_for_the_models_that_the_last_ones_called() -> None:
    subject, cheap, dear = engine(), Letters("cheap"), Letters("dear")
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
    subject, entry = engine(), Letters()
    ran(subject, entry, (1, 2.5))
    ask(subject, entry, ["text"])
    assert subject.held_seconds(1) == 0, "a batch of two tells whether the launch takes long"
    assert subject.held_seconds(2) == pytest.approx(2.5)
    ran(subject, entry, (2, 2.5))
    assert subject.held_seconds(7) == 0
    assert subject.held_seconds(15) == pytest.approx(2.5)


def test_a_model_that_never_ran_counts_as_if_its_first_batch_took_the_bound() -> None:
    subject, known, new = engine(), Letters("known"), Letters("new")
    ran(subject, known, (1, 0.0001))
    ask(subject, new, ["text"] * 3 * FIRST_BATCH)
    assert subject.held_seconds() == pytest.approx(2 * 0.5)


def test_tasks_that_wait_for_a_load_are_set_aside_while_another_model_has_work() -> None:
    subject, known, loading = engine(), Letters("known"), Letters("loading")
    with ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(subject.expecting(loading.alias))
        assert subject.set_aside == 0, "of a worker that knows no model, they are its work"
        assert subject.held_seconds() == pytest.approx(50 * UNKNOWN_SECONDS)
        ran(subject, known, (1, 0.0001), (8, 0.0008))
        assert subject.set_aside == 50
        assert subject.held_seconds() == subject.surplus_seconds() == 0
        with subject.expecting(known.alias):
            assert subject.set_aside == 0, "the other one is being loaded, too"
    assert subject.set_aside == 0


def test_halves_of_a_batch_that_failed_are_held_too() -> None:
    subject, entry = engine(), Letters(broken=True)
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
    subject, entries = engine(), [Letters("first"), Letters("second")]
    ran(subject, entries[0], (1, 0.1), *batches)
    for number, costs in enumerate(calls):
        ask(subject, entries[number % 2], ["x" * cost for cost in costs])
    fewer, many = map(subject.held_seconds, more)
    assert fewer is not None
    assert many is not None
    assert 0 <= fewer <= many


def test_a_model_that_was_loaded_anew_computes_what_comes_then() -> None:
    subject, before, after = engine(), Letters(), Letters()
    for model in (before, after):
        subject.submit(model, Call(app=""), ["one"])
        run_all(subject)
    assert [before.batches, after.batches] == [[["one"]], [["one"]]]
