"""The fakes that ship for users' tests."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import legit_worker
from legit_worker.errors import DeviceOutOfMemoryError, InvalidInputError
from legit_worker.models.registry import default_registry
from legit_worker.testing import Ledger, ModelOnDevice, use_models, vector


def test_a_ledger_refuses_to_overdraw_and_says_who_has_what() -> None:
    ledger = Ledger(100)
    ledger.take("clip", 70)
    with pytest.raises(DeviceOutOfMemoryError, match=r"minilm needs 40 bytes, 30 of 100 are free: clip has 70"):
        ledger.take("minilm", 40)
    assert (ledger.used, ledger.free, ledger.peak) == (70, 30, 70)


def test_nobody_gives_back_more_than_they_have() -> None:
    ledger = Ledger(100)
    ledger.take("clip", 70)
    with pytest.raises(ValueError, match="gives back 71"):
        ledger.give_back("clip", 71)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 60)), max_size=30))
def test_what_is_held_is_never_more_than_there_is(moves: list[tuple[str, int]]) -> None:
    ledger = Ledger(100)
    for owner, size in moves:
        try:
            ledger.take(owner, size)
        except DeviceOutOfMemoryError:
            ledger.give_back(owner, ledger.owners.get(owner, 0))
        assert 0 <= ledger.used <= ledger.peak <= ledger.total


def test_a_model_on_a_device_holds_its_weights_and_lends_its_activations() -> None:
    ledger = Ledger(1000)
    model = ModelOnDevice(ledger, "minilm", weights=400, bytes_per_cost=50)
    model.load("simulated")
    assert ledger.used == 400
    model.forward([model.preprocess("one two three"), model.preprocess("four")])
    assert (ledger.used, ledger.peak) == (400, 700)
    with pytest.raises(DeviceOutOfMemoryError):
        model.forward([model.preprocess("word " * 20)])
    assert ledger.used == 400


def test_handles_find_the_models_of_a_test_and_compute_in_it() -> None:
    with use_models({"minilm": {"kind": "simulated"}}) as models:
        handle = legit_worker.model("minilm")
        assert handle.map(["a", 2]) == [[float(value) for value in vector(item)] for item in ("a", "2")]
        assert handle.encode("a").shape == (8,)
        assert handle.encode(["a", "b"]).shape == (2, 8)
        with pytest.raises(InvalidInputError):
            handle.map([None])
        assert models.slots["minilm"].state == "resident"


def test_a_simulated_model_takes_the_options_that_a_projects_tasks_have() -> None:
    with use_models({"minilm": {"kind": "simulated"}}):
        handle, text = legit_worker.model("minilm"), "red apple"
        unit = handle.encode(text, "query", normalize_embeddings=True, batch_size=32, show_progress_bar=True)
        np.testing.assert_allclose(unit, vector(text) / np.linalg.norm(vector(text)), rtol=1e-6)
        assert handle.encode([text], truncate_dim=3, convert_to_numpy=True).tolist() == [vector(text)[:3].tolist()]
        assert handle.encode_query(text, prompt="find: ", device="cpu").tolist() == vector(text).tolist()
        with pytest.raises(TypeError, match="takes no beams"):
            handle.encode(text, beams=3)
        with pytest.raises(ValueError, match="tensors are refused"):
            handle.encode(text, convert_to_tensor=True)


def test_there_is_one_registry_for_all_and_the_one_before_comes_back() -> None:
    before = default_registry()
    with use_models({"minilm": {"kind": "simulated"}}) as models:
        assert default_registry() is models
        with use_models({"other": {"kind": "simulated"}}) as inner:
            assert default_registry() is inner
        assert default_registry() is models
    assert default_registry() is before


def test_a_model_that_comes_back_before_it_was_moved_is_entered_once() -> None:
    ledger = Ledger(100)
    model = ModelOnDevice(ledger, "minilm", weights=40, bytes_per_cost=0)
    model.load("simulated")
    model.to("simulated")
    assert ledger.used == 40
    model.to("cpu")
    model.to("simulated")
    assert ledger.used == 40
