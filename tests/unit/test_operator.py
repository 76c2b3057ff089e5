"""What an operator does to one process's models, and who looks after them without a loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from budgets import Limited
from celery.worker.control import Panel

from legit_worker import control
from legit_worker.errors import UnknownModelError
from legit_worker.models import operator
from legit_worker.models.handle import Handle, use
from legit_worker.models.operator import RefusedError
from legit_worker.models.registry import Registry
from legit_worker.models.registry import use as use_registry
from legit_worker.settings import ModelSettings

SIZE = 100


def registry(most: int | None = None, load_seconds: float = 0.0, **more: float) -> Registry:
    """Two models of 100 bytes."""
    spec = ModelSettings(kind="simulated", path=f"0,0,{SIZE},{load_seconds}", **more)
    return Registry({"a": spec, "b": spec}, lambda: "cpu", Limited(most))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_load_ends_later_and_nobody_has_the_model_then() -> None:
    models = registry(load_seconds=0.1)
    assert operator.load(models, "A") == "model 'a' is being loaded"
    until(lambda: models.slots["a"].state == "resident")
    until(lambda: models.slots["a"].users == 0)
    assert operator.load(models, "a") == "model 'a' is in memory"
    assert operator.unload(models, "a") == "model 'a' has left memory"
    assert operator.unload(models, "a") == "model 'a' is not in memory"


def test_what_can_not_be_done_is_refused_with_the_next_step() -> None:
    models = registry(most=SIZE, load_seconds=0.1)
    with pytest.raises(UnknownModelError, match="there are: a"):
        operator.load(models, "c")
    operator.pin(models, "a")
    with pytest.raises(RefusedError, match="is being loaded"):
        operator.unload(models, "a")
    until(lambda: models.slots["a"].is_pinned)
    with pytest.raises(RefusedError, match="is pinned: unpin it first"):
        operator.unload(models, "a")
    models.slots["b"].size = SIZE
    with pytest.raises(RefusedError, match="beside the pinned models"):
        operator.load(models, "b")
    operator.unpin(models, "a")
    operator.load(models, "b")
    until(lambda: models.slots["b"].state == "resident")
    assert models.slots["a"].state == "unloaded"


def test_a_model_in_use_says_so_and_leaves_after_it() -> None:
    models = registry()
    with use(models.slots["a"], models.residency):
        assert "once 1 calls are done" in operator.unload(models, "a")
        assert operator.shown(models)["models"]["a"]["is_leaving"]
    until(lambda: models.slots["a"].state == "unloaded")


def test_a_load_waits_for_memory_and_has_it_without_any_loop() -> None:
    models = registry(most=SIZE)
    models.slots["a"].size = models.slots["b"].size = SIZE
    with use(models.slots["a"], models.residency):
        assert "waits for memory (its weights take 100 bytes" in operator.load(models, "b")
        assert operator.shown(models)["models"]["b"]["waiting"] == 1
    until(lambda: models.slots["b"].state == "resident")


def test_a_pin_is_taken_back_before_the_model_is_there() -> None:
    models = registry(load_seconds=0.1)
    assert "is pinned once it is there" in operator.pin(models, "a")
    assert operator.unpin(models, "a") == "model 'a' is not pinned, and may leave memory"
    until(lambda: models.slots["a"].state == "resident")
    until(lambda: models.slots["a"].users == 0)
    assert not models.slots["a"].is_pinned


@pytest.mark.parametrize("wish", [operator.load, operator.pin])
def test_a_load_that_waits_for_memory_is_taken_back_by_unload(wish: Callable[[Registry, str], str]) -> None:
    models = registry(most=SIZE)
    models.slots["a"].size = models.slots["b"].size = SIZE
    with use(models.slots["a"], models.residency):
        assert "waits for memory" in wish(models, "b")
        assert wish(models, "b")
        assert operator.unload(models, "b") == "model 'b' is not in memory, and no load of an operator's waits any more"
        assert operator.shown(models)["models"]["b"]["waiting"] == 0
    models.residency.watch()
    assert (models.slots["b"].state, models.slots["b"].is_pinned) == ("unloaded", False)
    operator.load(models, "b")  # and a later wish counts
    until(lambda: models.slots["b"].state == "resident")
    assert not models.slots["b"].is_pinned


def test_a_task_that_waits_for_memory_waits_on_when_an_operator_unloads() -> None:
    models = registry(most=SIZE)
    models.slots["a"].size = models.slots["b"].size = SIZE
    with use(models.slots["a"], models.residency):
        request = models.residency.request(models.slots["b"])
        assert operator.unload(models, "b") == "model 'b' is not in memory"
    assert request.future.result(20) is not None
    models.residency.release(request)


@pytest.fixture
def panel(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The commands that a worker of this process answers; at first none."""
    monkeypatch.setattr(Panel, "data", {})
    return Panel.data


def test_the_celery_command_knows_the_commands_and_only_a_worker_of_ours_answers_them(panel: dict[str, Any]) -> None:
    ours = {"legit_models", *(f"legit_{action}" for action in operator.ACTIONS)}
    control.describe()
    assert ours <= set(Panel.meta)
    assert not panel
    control.register()
    assert set(panel) == ours


def caretakers() -> int:
    return sum(thread.name == "legit-caretaker" for thread in threading.enumerate())


@pytest.fixture
def idle() -> Iterator[Registry]:
    """The models of this process, which leave a moment after their last use."""
    models = registry(keep_alive=0.1)
    before = use_registry(models)
    yield models
    use_registry(before)


def test_an_idle_model_goes_after_its_keep_alive_where_no_loop_evicts_and_so_does_the_thread(idle: Registry) -> None:
    assert Handle("a").map(["x"])
    assert idle.slots["a"].state == "resident"
    until(lambda: idle.slots["a"].state == "unloaded")
    until(lambda: not caretakers())
    assert Handle("a").map(["x"])
    until(lambda: idle.slots["a"].state == "unloaded")
    assert idle.slots["a"].loads == 2
    until(lambda: not caretakers())


@pytest.mark.parametrize("step", ["review", "evict_idle"])
def test_an_error_of_one_look_is_logged_once_and_ends_no_later_look(
    idle: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step: str
) -> None:
    looks, good = [], getattr(idle.residency, step)

    def look() -> None:
        if threading.current_thread().name == "legit-caretaker":
            looks.append(step)
            if len(looks) <= 2:
                raise RuntimeError("NVML is gone for a moment")
        good()

    monkeypatch.setattr("legit_worker.models.caretaker.MOST_LOOK", 0.05)
    monkeypatch.setattr(idle.residency, step, look)
    assert Handle("a").map(["x"])
    until(lambda: idle.slots["a"].state == "unloaded")
    until(lambda: not caretakers())
    assert len(looks) > 1
    assert sum("NVML is gone" in str(record.exc_info) for record in caplog.records) == 1


def test_a_call_has_its_result_if_no_thread_can_start_and_a_later_call_starts_it(
    idle: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    operator.load(idle, "a")
    until(lambda: idle.slots["a"].state == "unloaded" and not caretakers())
    start = threading.Thread.start

    def refuse(self: threading.Thread) -> None:
        if self.name == "legit-caretaker":
            raise RuntimeError("can't start new thread")
        start(self)

    with monkeypatch.context() as limited:
        limited.setattr(threading.Thread, "start", refuse)
        assert Handle("a").map(["x"])
    assert "can't start new thread" in caplog.text
    assert idle.slots["a"].state == "resident"
    assert Handle("a").map(["x"])
    until(lambda: idle.slots["a"].state == "unloaded")


def test_a_loop_that_looks_after_the_models_needs_no_thread() -> None:
    models = registry(keep_alive=0.1)
    models.residency.is_looked_after = True
    with use(models.slots["a"], models.residency):
        pass
    assert not caretakers()


def test_a_loop_that_begins_takes_over_from_the_thread() -> None:
    models = registry(keep_alive=0.1)
    with use(models.slots["a"], models.residency):
        pass
    assert caretakers()
    models.residency.is_looked_after = True
    until(lambda: not caretakers())
    assert models.residency.is_looked_after
    with use(models.slots["a"], models.residency):
        pass
    assert not caretakers()
