"""The registry: which model is meant, and how it is loaded."""

from __future__ import annotations

import gc
import multiprocessing
import threading
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
from forks import start_forked

import legit_worker
from legit_worker.errors import LegitWorkerError, ModelLoadError, UnknownModelError
from legit_worker.models import policy, registry
from legit_worker.models.handle import Handle
from legit_worker.models.loaded import MAX_COST
from legit_worker.models.simulated import vector
from legit_worker.testing import use_models


class Named:
    """Notes what its constructor and its loader got."""

    def __init__(self, alias: str, path: str, dtype: str | None) -> None:
        self.given = (alias, path, dtype)

    def load(self, device: str) -> None:
        self.loaded = (device, threading.current_thread().name)

    def preprocess(self, item: Any) -> Any:
        return item

    def cost(self, item: Any) -> int:
        return 1

    def forward(self, batch: Sequence[Any]) -> list[Any]:
        return [(self.given, self.loaded) for _ in batch]

    def postprocess(self, output: Any) -> Any:
        return output


class Broken(Named):
    loads = 0

    def load(self, device: str) -> None:
        Broken.loads += 1
        raise OSError("no such weights")


class Weights:
    """What a load had read when it failed."""


class HalfRead(Named):
    """Its load fails by an error that comes from another one, which was raised where the weights are."""

    read: ClassVar[list[weakref.ref[Weights]]] = []

    def load(self, device: str) -> None:
        try:
            self._read()
        except OSError:
            raise ValueError("not whole") from None

    def _read(self) -> None:
        weights = Weights()
        HalfRead.read.append(weakref.ref(weights))
        raise OSError


class Short(Named):
    def forward(self, batch: Sequence[Any]) -> list[Any]:
        return []


class Ending(Named):
    """Its `encode` has arguments of its own."""

    def plan_encode(self, inputs: list[str], ending: str, mark: str = ".") -> Any:
        return inputs, lambda outputs: [f"{text}{ending}{mark}" for text, _ in zip(inputs, outputs, strict=True)]


def spec(name: str) -> dict[str, Any]:
    return {"kind": f"{__name__}:{name}", "path": "/weights"}


def test_a_class_is_given_what_its_constructor_names_and_loaded_by_the_loader_thread() -> None:
    with use_models({"mine": spec("Named")}):
        [(given, loaded)] = legit_worker.model("mine").map([1])
    assert given == ("mine", "/weights", None)
    assert loaded == ("cpu", "legit-loader")


def test_aliases_are_found_in_any_case() -> None:
    with use_models({"sim": {"kind": "simulated"}}) as models:
        assert models.get("SIM") is models.get("sim")


def test_aliases_are_found_by_any_name_that_folds_to_the_same() -> None:
    with use_models({"text_embedding_3": {"kind": "simulated"}}) as models:
        for name in ("text-embedding-3", "Text.Embedding/3", "text_embedding_3"):
            assert models.get(name).alias == "text_embedding_3"
        with pytest.raises(UnknownModelError, match="LEGIT_WORKER_MODELS__TEXT_EMBEDDING_4__PATH"):
            models.get("text-embedding-4")


def test_an_unknown_alias_is_refused_with_those_that_there_are() -> None:
    with use_models({"sim": {"kind": "simulated"}}), pytest.raises(UnknownModelError, match=r"'nope'.*sim \(simulated"):
        legit_worker.model("nope").map([1])


def test_an_empty_alias_is_an_unknown_one() -> None:
    with use_models({"sim": {"kind": "simulated"}}) as models:
        with pytest.raises(UnknownModelError, match=r"no model '' is configured; there are: sim \(simulated\)$"):
            Handle("", "simulated").map([1])
        assert Handle(None, "simulated").slot is models.get("sim")


def test_no_alias_means_the_only_model_of_a_kind() -> None:
    with use_models({"a": {"kind": "simulated"}, "b": spec("Named")}) as models:
        assert models.only("simulated").alias == "a"
        with pytest.raises(UnknownModelError, match=r"0 are configured.*Set LEGIT_WORKER_MODELS__.*rerank"):
            models.only("rerank")


def test_the_error_of_a_failed_load_which_is_kept_keeps_no_weights() -> None:
    with use_models({"mine": spec("HalfRead")}) as models:
        with pytest.raises(ModelLoadError, match="not whole"):
            legit_worker.model("mine").map([1])
        assert models.get("mine").error is not None
        gc.collect()
        assert [weights() for weights in HalfRead.read] == [None]


def test_a_failed_load_is_remembered_for_a_while_and_then_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    Broken.loads = 0
    with use_models({"mine": spec("Broken")}):
        for _ in range(3):
            with pytest.raises(ModelLoadError, match=r"'mine'.*/weights.*OSError: no such weights"):
                legit_worker.model("mine").map([1])
        assert Broken.loads == 1
        monkeypatch.setattr(policy, "LOAD_RETRY_AFTER", -1.0)
        with pytest.raises(ModelLoadError):
            legit_worker.model("mine").map([1])
        assert Broken.loads == 2


def test_a_forward_that_loses_items_is_an_error_that_says_so() -> None:
    with use_models({"mine": spec("Short")}), pytest.raises(LegitWorkerError, match="0 outputs for a batch of 2"):
        legit_worker.model("mine").map([1, 2])


class Keyless(Named):
    def batch_key(self, prepared: Any) -> Any:
        return [prepared]


def test_a_batch_key_that_can_not_be_compared_as_one_is_an_error() -> None:
    with use_models({"mine": spec("Keyless")}), pytest.raises(TypeError, match="unhashable"):
        legit_worker.model("mine").map([1])


class Unequal(Named):
    def batch_key(self, prepared: Any) -> Any:
        return NotItself()


class NotItself:
    """As a tensor is: it has a hash, and two of them compare to many answers."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return False


def test_a_batch_key_that_does_not_equal_itself_is_an_error() -> None:
    with use_models({"mine": spec("Unequal")}), pytest.raises(TypeError, match="does not equal itself"):
        legit_worker.model("mine").map([1])


def test_costs_are_at_least_one_and_within_the_packers_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    with use_models({"mine": spec("Named")}) as models:
        entry = models.get("mine")
        model = models.residency.request(entry).future.result(timeout=10)
        for said, taken in ((0, 1), (-3, 1), (7.9, 7), (2**80, MAX_COST)):
            monkeypatch.setattr(model.model, "cost", lambda item, said=said: said)
            assert model.cost("an item") == taken


def test_a_loaders_thread_ends_with_its_load() -> None:
    with use_models({"mine": spec("Named")}):
        legit_worker.model("mine").map([1])
        for thread in threading.enumerate():
            if thread.name == "legit-loader":
                thread.join(timeout=5)
        assert "legit-loader" not in {thread.name for thread in threading.enumerate()}


def test_a_method_that_the_kind_lacks_is_an_error_that_names_the_way() -> None:
    with use_models({"sim": {"kind": "simulated"}}), pytest.raises(TypeError, match=r"no predict\(\): use map\(\)"):
        legit_worker.model("sim").predict([("a", "b")])


def _child(queue: Any) -> None:
    queue.put([legit_worker.model(alias).map(["x"])[0] for alias in ("first", "second")])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_can_load_what_its_parent_had_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for alias in ("FIRST", "SECOND"):
        monkeypatch.setenv(f"LEGIT_WORKER_MODELS__{alias}__KIND", "simulated")
    before = registry.use(None)
    try:
        legit_worker.model("first").map(["x"])
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=_child, args=(queue,))
        start_forked(child)
        assert queue.get(timeout=20) == [[float(value) for value in vector("x")]] * 2
        child.join()
    finally:
        registry.use(before)


def test_a_class_gets_the_arguments_of_its_own_call_by_their_places() -> None:
    with use_models({"own": spec("Ending")}):
        assert legit_worker.model("own").encode(["a"], "b", "?") == ["ab?"]
