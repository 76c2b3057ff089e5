"""A model's methods: one thread at a time, and what a method may do with other models."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from pools import PlayedPool

import legit_worker
from legit_worker import parking
from legit_worker.errors import LegitWorkerError, ModelLoadError
from legit_worker.models import registry
from legit_worker.models.methods import Methods, leave
from legit_worker.models.registry import Registry
from legit_worker.settings import ModelSettings
from legit_worker.testing import use_models

#: Seconds after which two threads are taken to wait for each other.
DEADLOCK = 20.0


class Asking:
    """Prepares an item by asking the models that the item names, one after the other."""

    def load(self, device: str) -> None:
        """Nothing to read."""

    def preprocess(self, item: Any) -> Any:
        """The last one is what is left of the item."""
        alias, colon, rest = item.partition(":")
        return legit_worker.model(alias).map([rest])[0] if colon else item

    def cost(self, item: Any) -> int:
        """Any."""
        return 1

    def forward(self, batch: list[Any]) -> list[Any]:
        """Each item, with a mark."""
        return [f"{item}!" for item in batch]

    def postprocess(self, output: Any) -> Any:
        """As it is."""
        return output


class AskingAtItsBirth(Asking):
    """Asks `b` before it is loaded."""

    def __init__(self) -> None:
        legit_worker.model("b").map(["text"])


class Measuring(Asking):
    """Asks `b` to prepare its trial items."""

    def sample(self, cost: int) -> str:
        """An item that `b` is asked for."""
        return "b:text"


class AskingForSamples(Asking):
    """Asks `b` for its trial items."""

    def sample(self, cost: int) -> Any:
        """What `b` says."""
        return legit_worker.model("b").map(["text"])[0]


class AskingAtItsEnd(Asking):
    """Asks `b` when it leaves memory."""

    def unload(self) -> None:
        """Nothing to free."""
        legit_worker.model("b").map(["text"])


@pytest.fixture
def asking() -> Iterator[None]:
    """Two models that ask each other."""
    kind = f"{__name__}:Asking"
    with use_models({"a": {"kind": kind}, "b": {"kind": kind}}):
        yield


@pytest.mark.usefixtures("asking")
def test_threads_whose_models_ask_each_other_do_not_wait_for_each_other() -> None:
    start = threading.Barrier(8)

    def ask(number: int) -> list[str]:
        first, second = ("a", "b") if number % 2 else ("b", "a")
        start.wait(DEADLOCK)
        return [legit_worker.model(first).map([f"{second}:{first}:{number}"])[0] for _ in range(50)]

    with ThreadPoolExecutor(8) as threads:
        answers = [thread.result(DEADLOCK) for thread in [threads.submit(ask, number) for number in range(8)]]
    assert answers == [[f"{number}!!!"] * 50 for number in range(8)]


@pytest.mark.usefixtures("asking")
def test_a_model_may_ask_itself() -> None:
    assert legit_worker.model("a").map(["a:a:text"]) == ["text!!!"]


@pytest.mark.usefixtures("asking")
def test_a_model_that_asks_itself_for_ever_fails() -> None:
    with pytest.raises(RecursionError):
        legit_worker.model("a").map(["a:" * 10_000])
    assert legit_worker.model("a").map(["text"]) == ["text!"]


def test_a_lock_is_free_while_its_method_calls_another_model_and_held_again_after_that() -> None:
    methods, seen = Methods("one"), []

    def method() -> None:
        seen.append(methods.lock.locked())
        with leave("other"):
            seen.append(methods.lock.locked())
        seen.append(methods.lock.locked())

    methods.alone("preprocess", method)
    assert (seen, methods.lock.locked()) == ([True, False, True], False)


def test_a_task_that_waits_in_a_method_for_anything_keeps_no_other_task_out() -> None:
    pool, methods, order = PlayedPool(), Methods("one"), []

    def wait(name: str) -> None:
        order.append(f"{name} enters")
        parking.give_way("something of its own")
        order.append(f"{name} leaves")

    for name in "ab":
        pool.send(partial(methods.alone, "preprocess", wait, name), name)
    pool.run()
    parking.stop()
    assert order == ["a enters", "b enters", "a leaves", "b leaves"]
    assert not methods.lock.locked()


def test_a_method_for_which_others_wait_may_not_call_a_model() -> None:
    def method() -> None:
        with leave("other"):
            raise AssertionError

    with pytest.raises(LegitWorkerError, match=r"'one' calls model 'other' in its forward\(\)"):
        Methods("one").at_once("forward", method)
    with leave("other"):
        pass


def test_a_thread_of_a_methods_own_gives_up_no_lock_of_its_thread() -> None:
    methods, seen = Methods("one"), []

    def elsewhere() -> None:
        with leave("other"):
            seen.append(methods.lock.locked())

    methods.alone("preprocess", lambda: asyncio.run(asyncio.to_thread(elsewhere)))
    assert seen == [True]


def mapped(kind: type[Asking], device: str = "cpu") -> Any:
    """What the model `a` of this class says to a text, or its error."""
    specs = {"a": kind, "b": Asking}
    chosen = Registry(
        {alias: ModelSettings(kind=f"{__name__}:{one.__name__}", keep_alive=0) for alias, one in specs.items()},
        lambda: device,
    )
    before = registry.use(chosen)
    try:
        answer: Future[Any] = Future()

        def ask() -> None:
            try:
                answer.set_result(legit_worker.model("a").map(["text"]))
                chosen.residency.evict_idle()
            except BaseException as error:
                answer.set_exception(error)

        asking = threading.Thread(target=ask, daemon=True)  # which may wait for ever
        asking.start()
        asking.join(DEADLOCK)
        assert not asking.is_alive()
        return answer.result()
    finally:
        registry.use(before)


def test_a_model_that_asks_another_one_as_it_is_made_is_told_so() -> None:
    with pytest.raises(ModelLoadError, match=r"'a' calls model 'b' in its __init__\(\)"):
        mapped(AskingAtItsBirth)


@pytest.mark.parametrize("kind", [Measuring, AskingForSamples])
def test_a_model_whose_samples_need_another_one_has_no_trial_batches(
    kind: type[Asking], caplog: pytest.LogCaptureFixture
) -> None:
    assert mapped(kind, "simulated") == ["text!"]
    assert caplog.text.count("model 'a' calls another model to prepare its samples") == 1


def test_a_model_that_asks_another_one_as_it_leaves_holds_nobody_up(caplog: pytest.LogCaptureFixture) -> None:
    assert mapped(AskingAtItsEnd) == ["text!"]
    assert "unload() of model 'a' failed" in caplog.text
