"""Streams: batches on their own threads, beside the main thread."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from time import sleep, thread_time
from typing import Any

import pytest
import torch
from letters import Letters, error, outputs

from legit_worker.batching.costmodel import BYTES_PRIOR, CostModel
from legit_worker.device.devices import Device, Launch
from legit_worker.device.streams import MOST, StreamLaunch, Streams
from legit_worker.errors import DeviceOutOfMemoryError
from legit_worker.models.loaded import Beside, LoadedModel
from legit_worker.pool.calls import Call, Chunk
from legit_worker.pool.engine import CALLS, OWN, Engine
from legit_worker.pool.queue import ENOUGH_LAUNCHES

WAIT = 20.0


def nothing() -> None:
    pass


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    subject = Streams()
    assert subject.are_open()
    return subject


def test_two_batches_run_at_the_same_time_on_other_threads(streams: Streams) -> None:
    meeting = threading.Barrier(2, timeout=WAIT)

    def compute() -> str:
        meeting.wait()
        return threading.current_thread().name

    launches = [streams.launch(compute, nothing, nothing) for _ in range(2)]
    for launch in launches:
        launch.wait()
    assert {launch.outputs for launch in launches} == {"legit-stream-1", "legit-stream-2"}
    assert all(launch.is_done and launch.error is None for launch in launches)


def test_a_stream_that_fails_tells_the_error_and_computes_the_next_batch(streams: Streams) -> None:
    first = streams.launch(lambda: 1 / 0, nothing, nothing)
    first.wait()
    assert isinstance(first.error, ZeroDivisionError)
    for _ in range(4):
        after = streams.launch(lambda: "fine", nothing, nothing)
        after.wait()
        assert (after.outputs, after.error) == ("fine", None)


def test_a_batch_counts_as_its_share_of_the_device_and_of_the_processor_alone(streams: Streams) -> None:
    def compute() -> None:
        until = thread_time() + 0.1
        while thread_time() < until:
            pass
        sleep(0.2)

    launch = streams.launch(compute, nothing, nothing)
    launch.wait()
    assert 0.05 <= launch.seconds < 0.1


def test_a_batch_that_other_threads_compute_counts_what_they_took(streams: Streams) -> None:
    launch = streams.launch(lambda: Launch(outputs="rows", seconds=3.0), nothing, nothing)
    launch.wait()
    assert (launch.outputs, launch.seconds) == ("rows", 1.5)


def test_who_waits_is_told_when_a_batch_begins_and_when_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    told: list[str] = []
    woken = threading.Event()
    streams = Streams(woken.set)
    streams.are_open()
    launch = streams.launch(lambda: told.append("computes"), lambda: told.append("begins"), lambda: told.append("ends"))
    assert woken.wait(WAIT)
    assert told == ["begins", "computes", "ends"]
    assert launch.is_done


@pytest.mark.parametrize(("threads", "count", "each"), [(1, 0, 1), (2, 2, 1), (3, 3, 1), (4, 4, 1), (16, MOST, 4)])
def test_there_is_a_stream_for_each_core_and_on_a_large_machine_a_stream_has_several(
    threads: int, count: int, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    streams = Streams()
    assert streams.are_open() == (count > 0)
    assert (streams.count, streams._threads) == (count, each)


def test_without_the_library_that_gives_a_thread_its_cores_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not Streams().are_open()


def test_a_stream_has_its_own_number_of_threads_and_the_main_thread_keeps_its() -> None:
    before = torch.get_num_threads()
    if before < 2:
        pytest.skip("torch has one core here")
    streams = Streams()
    assert streams.are_open()
    launch = streams.launch(torch.get_num_threads, nothing, nothing)
    launch.wait()
    assert launch.outputs == before // streams.count
    assert torch.get_num_threads() == before


def test_without_a_number_of_its_own_a_stream_computes_on_all_cores(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Streams, "_take_threads", lambda self: 1 / 0)
    launch = streams.launch(lambda: "fine", nothing, nothing)
    launch.wait()
    assert launch.outputs == "fine"


def test_if_no_thread_can_start_the_batch_was_not_handed_over(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", full)
        with pytest.raises(RuntimeError, match="can't start"):
            streams.launch(lambda: "lost", nothing, nothing)
    launch = streams.launch(lambda: "fine", nothing, nothing)
    launch.wait()
    assert launch.outputs == "fine"


def test_a_task_can_set_the_precision_of_all_products_only_between_two_batches(streams: Streams) -> None:
    begun = threading.Event()

    def compute() -> str:
        begun.set()
        sleep(0.3)
        return torch.get_float32_matmul_precision()

    launch = streams.launch(compute, nothing, nothing)
    assert begun.wait(WAIT)
    torch.set_float32_matmul_precision("medium")
    try:
        assert (launch.is_done, launch.outputs) == (True, "highest")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_fork_waits_for_the_batches_in_flight(streams: Streams) -> None:
    begun = threading.Event()

    def compute() -> str:
        begun.set()
        sleep(0.3)
        return "done"

    launch = streams.launch(compute, nothing, nothing)
    assert begun.wait(WAIT)
    child = os.fork()
    if child == 0:
        os._exit(0 if launch.is_done else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert launch.outputs == "done"


def test_a_child_waits_for_no_batch_of_its_parent_though_a_signals_handler_ended_the_wait(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, dropped = threading.Event(), list[Any]()
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: dropped.append(unraisable.exc_value))

    def compute() -> list[str]:
        begun.set()
        sleep(0.5)
        return ["done"]

    def ring(*_: object) -> None:
        raise LookupError("the alarm")

    model = LoadedModel("small", "embed", Small(), Device("cpu"), CostModel(BYTES_PRIOR), Around())  # type: ignore[arg-type]
    monkeypatch.setattr(Small, "computation", lambda *_: compute, raising=False)
    launch = model.launch(["done"], lambda computing: streams.launch(computing, nothing, nothing))
    assert begun.wait(WAIT)
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(5)
            torch.set_float32_matmul_precision("highest")  # which waits for all batches
            model.restart()
            model.unload()  # which waits for its own
            os._exit(0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert [type(error) for error in dropped] == [LookupError]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    launch.wait()
    assert launch.outputs == ["done"]


def test_a_model_leaves_memory_when_the_last_batch_of_it_is_over_though_its_task_has_ended(streams: Streams) -> None:
    begun, left = threading.Event(), list[str]()

    class Own:
        computes_beside = True

        def computation(self, batch: Sequence[str]) -> Callable[[], list[str]]:
            def compute() -> list[str]:
                begun.set()
                sleep(0.3)
                left.append("the batch is over")
                return list(batch)

            return compute

        def unload(self) -> None:
            left.append("the weights are gone")

    model = LoadedModel("small", "embed", Own(), Device("cpu"), CostModel(BYTES_PRIOR), Around())  # type: ignore[arg-type]
    launch = model.launch(["a"], lambda compute: streams.launch(compute, nothing, nothing))
    assert begun.wait(WAIT)
    model.unload()
    assert left == ["the batch is over", "the weights are gone"]
    assert (launch.outputs, launch.error) == (["a"], None)


class Around:
    """No memory is short."""

    def room_for_batches(self) -> None:
        """No bound."""

    def is_loading(self) -> bool:
        return False

    def free(self, needed: int = 0, tries: int = 0) -> None:
        """Never called."""


class Small(Letters):
    """One whose batches streams may compute, if they are no longer than the test says."""

    computes_beside = True
    longest = 1000

    def __init__(self) -> None:
        super().__init__()
        self.beside: list[int] = []
        self.inline: list[int] = []

    def launch(self, batch: Sequence[str], beside: Beside | None = None) -> Launch:
        if beside is None or max(map(len, batch)) > self.longest:
            self.inline.append(len(batch))
            return Launch(outputs=self.forward(batch), seconds=0.005 + 0.001 * len(batch))
        self.beside.append(len(batch))
        return beside(lambda: self.forward(batch))


class PlayedStreams(Streams):
    """Two, whose batches are over when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.launches = 2, list[StreamLaunch]()

    def are_open(self) -> bool:
        return True

    def launch(self, compute: Callable[[], Any], on_begin: Callable[[], None], on_done: Callable[[], None]) -> Launch:
        launch = StreamLaunch(
            outputs=None, seconds=0.0, is_done=False, compute=compute, on_begin=on_begin, on_done=on_done
        )
        self.launches.append(launch)
        return launch

    def end(self, number: int, seconds: float = 0.05) -> None:
        self.launches[number].run(0.5)
        self.launches[number].seconds = seconds


@pytest.fixture
def played() -> PlayedStreams:
    return PlayedStreams()


@pytest.fixture
def more() -> list[bool]:
    """Whether messages wait at the broker."""
    return [False]


@pytest.fixture
def own() -> list[float]:
    """Seconds of a task's own code."""
    return [0.0]


@pytest.fixture
def subject(played: PlayedStreams, more: list[bool], own: list[float]) -> Engine:
    return Engine(
        max_batch_seconds=0.5,
        weight_of=lambda app: 1.0,
        streams=played,
        own_seconds=lambda: own[0],
        more_there=lambda: more[0],
    )


@pytest.fixture
def model(subject: Engine, played: PlayedStreams, own: list[float]) -> Small:
    """One whose costs are known. Its item of four letters takes as long as a task's own code."""
    model = Small()
    for count in (1, 8, 32, 64, 8, 32, 64, 64):
        ask(subject, model, ["four"] * count)
        while subject.step():
            pass
    model.inline.clear()
    model.batches.clear()
    assert not played.launches
    own[0] = 0.001
    return model


def ask(engine: Engine, model: Letters, items: list[str], app: str = "") -> list[Chunk]:
    return [engine.submit(model, Call(app=app), [item]) for item in items]


def test_a_few_items_are_computed_by_all_cores_at_once(subject: Engine, model: Small) -> None:
    chunks = ask(subject, model, ["four"] * 3)
    assert subject.can_step
    assert not subject.is_ready
    subject.step()
    assert (model.inline, model.beside) == ([3], [])
    assert [outputs(chunk) for chunk in chunks] == [["fourfour"]] * 3


def test_more_than_a_batch_goes_to_the_streams_and_one_more_waits_behind_them(
    subject: Engine, model: Small, played: PlayedStreams
) -> None:
    chunks = ask(subject, model, ["four"] * 400)
    assert subject.is_ready
    while subject.can_step:
        subject.step()
    assert len(played.launches) == 3
    assert not model.inline
    assert subject.collect() is False
    played.end(1)  # the second one is done before the first one
    assert subject.collect()
    assert sum(chunk.done.done() for chunk in chunks) == model.beside[1]
    assert subject.can_step


def test_streams_begin_when_a_batch_on_all_cores_is_over(
    subject: Engine, model: Small, played: PlayedStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As OpenVINO has it: a batch on all cores is in flight, too."""
    whole = Launch(outputs=["fourfour"] * 3, seconds=0.01, is_done=False)
    first = ask(subject, model, ["four"] * 3)
    with monkeypatch.context() as patched:
        patched.setattr(model, "launch", lambda *_: whole)
        subject.step()
    others = ask(subject, model, ["four"] * 400)
    assert not subject.can_step
    assert not played.launches
    whole.is_done = True
    assert subject.collect()
    assert [outputs(chunk) for chunk in first] == [["fourfour"]] * 3
    while subject.can_step:
        subject.step()
    assert len(played.launches) == 3
    for number in (2, 0, 1):
        played.end(number)
    assert subject.collect()
    assert sum(chunk.done.done() for chunk in others) == sum(model.beside)


def test_a_stream_gets_its_next_batch_between_two_tasks(subject: Engine, model: Small, played: PlayedStreams) -> None:
    ask(subject, model, ["four"] * 400)
    for count in (1, 2, 3):
        assert not subject.refill()
        assert len(played.launches) == count
        ask(subject, model, ["four"] * CALLS)
    assert not subject.refill()
    assert len(played.launches) == 3
    played.end(0)
    assert subject.refill()
    assert len(played.launches) == 4


@pytest.mark.parametrize("pads", [True, False])
def test_a_stream_without_a_batch_has_a_smaller_one_between_two_tasks_if_that_needs_no_padding(
    subject: Engine, model: Small, played: PlayedStreams, more: list[bool], pads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "pads", lambda item: pads)
    more[0] = True
    launch = subject.launch_seconds
    ask(subject, model, ["four"] * CALLS)
    few = math.ceil(ENOUGH_LAUNCHES * launch() / 0.001)
    assert few > CALLS
    subject.refill()
    assert not played.launches
    ask(subject, model, ["four"] * few)
    subject.refill()
    assert model.beside == ([] if pads else [CALLS + few])
    if not pads:
        ask(subject, model, ["four"] * few)
        subject.refill()
        ask(subject, model, ["four"] * few)
        subject.refill()
        assert model.beside == [CALLS + few, few]  # behind them, only a full batch


def test_a_batch_goes_on_until_it_is_done_whoever_waits_for_it(
    subject: Engine, model: Small, played: PlayedStreams
) -> None:
    assert not subject.is_computing
    ask(subject, model, ["four"] * 400)
    subject.step()
    subject.wait(0)
    assert subject.is_computing
    played.end(0)
    assert not subject.is_computing


def test_a_stream_that_has_nothing_takes_what_is_left(subject: Engine, model: Small, played: PlayedStreams) -> None:
    ask(subject, model, ["four"] * 200)
    while subject.is_ready and subject.can_step:
        subject.step()
    left = len(subject)
    assert len(played.launches) == 2
    assert 0 < left < model.beside[0]
    assert not subject.can_step  # both streams are busy, and more may come meanwhile
    played.end(0)
    subject.collect()
    subject.step()
    assert model.beside[2:] == [left]
    assert not model.inline


def test_while_messages_wait_at_the_broker_a_small_batch_goes_to_a_stream(
    subject: Engine, model: Small, played: PlayedStreams, more: list[bool]
) -> None:
    more[0] = True
    ask(subject, model, ["four"] * 3)
    subject.step()
    assert model.beside == [3]


def test_a_batch_that_no_stream_may_compute_is_computed_here(
    subject: Engine, model: Small, played: PlayedStreams, more: list[bool]
) -> None:
    more[0] = True
    chunks = ask(subject, model, ["x" * 2000])
    subject.step()
    assert model.inline == [1]
    assert outputs(chunks[0]) == ["x" * 4000]


def test_a_model_whose_calls_take_long_gains_nothing_by_streams(
    subject: Engine, model: Small, played: PlayedStreams, own: list[float]
) -> None:
    own[0] = 0.001 / OWN / 2
    ask(subject, model, ["four"] * 400)
    subject.step()
    assert model.inline
    assert not played.launches


def test_beside_an_app_that_sends_little_batches_have_all_cores(
    played: PlayedStreams, model: Small, subject: Engine
) -> None:
    ask(subject, model, ["four"] * 400, app="flood")
    ask(subject, model, ["four"] * 2, app="little")
    for _ in range(4):
        subject.step()
    assert subject.is_shared
    before = len(played.launches)
    played_all(played)
    subject.collect()
    subject.step()
    assert len(played.launches) == before


def played_all(played: PlayedStreams) -> None:
    for number, launch in enumerate(played.launches):
        if not launch.is_done:
            played.end(number)


def test_a_batch_that_fails_in_a_stream_is_split_as_any_other(
    subject: Engine, model: Small, played: PlayedStreams
) -> None:
    chunks = ask(subject, model, ["four"] * 399 + ["bad!"])
    while len(subject) or "0 batches in flight" not in repr(subject):
        while subject.can_step:
            subject.step()
        played_all(played)
        subject.collect()
    assert [outputs(chunk) for chunk in chunks[:-1]] == [["fourfour"]] * 399
    assert error(chunks[-1]) is not None
    assert not isinstance(error(chunks[-1]), DeviceOutOfMemoryError)


def test_one_that_waits_alone_gets_what_the_streams_are_at_first(subject: Engine, model: Small) -> None:
    subject._streams = subject._flights._streams = real = Streams()
    real.are_open()
    chunks = ask(subject, model, ["four"] * 400)
    if real.count:
        subject.step()
    subject.drive(chunks[-1])
    assert outputs(chunks[-1]) == ["fourfour"]


def test_a_tasks_clock_counts_its_batch_from_when_its_stream_begins(
    subject: Engine, model: Small, played: PlayedStreams
) -> None:
    calls = [Call(app="") for _ in range(400)]
    for call in calls:
        subject.submit(model, call, ["four"])
    subject.step()
    assert not any(call.clock.is_in_batch for call in calls)
    played.launches[0].on_begin()
    assert sum(call.clock.is_in_batch for call in calls) == model.beside[0]
    played.end(0)
    subject.collect()
    assert not any(call.clock.is_in_batch for call in calls)
