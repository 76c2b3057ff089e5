"""The cost model, against devices whose law is known."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from legit_worker.batching.costmodel import ENOUGH, CostModel, best_choice

BATCHES = [(1, 8), (4, 8), (16, 32), (64, 8), (2, 256), (8, 85), (1, 128), (32, 16)]


def taught(a: float, b: float, c: float) -> CostModel:
    model = CostModel()
    for count, longest in BATCHES:
        model.observe(count, longest, a + b * count * longest + c * count * longest**2)
    return model


@pytest.mark.parametrize("law", [(4e-3, 1e-4, 1e-7), (1e-3, 1e-5, 0.0), (0.0, 2e-4, 0.0), (2e-4, 1e-7, 1e-10)], ids=str)
def test_it_learns_the_law_of_a_device(law: tuple[float, float, float]) -> None:
    model = taught(*law)
    for count, longest in [(3, 50), (20, 100), (100, 5)]:
        expected = law[0] + law[1] * count * longest + law[2] * count * longest**2
        assert model.predict(count, longest) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("solver", ["scipy", "own"])
@pytest.mark.parametrize("seconds", [0.0, float("nan"), float("inf")])
def test_a_batch_of_no_time_or_of_none_that_is_known_ends_no_learning(
    monkeypatch: pytest.MonkeyPatch, seconds: float, solver: str
) -> None:
    if solver == "own":
        monkeypatch.setitem(sys.modules, "scipy.optimize", ModuleType("scipy.optimize"))
    else:
        pytest.importorskip("scipy.optimize")
    model = taught(4e-3, 1e-4, 1e-7)
    model.observe(4, 32, seconds)
    for count, longest in BATCHES * 8:
        model.observe(count, longest, 4e-3 + 1e-4 * count * longest + 1e-7 * count * longest**2)
    assert model.predict(20, 100) == pytest.approx(4e-3 + 1e-4 * 2000 + 1e-7 * 200_000, rel=1e-6)


def test_one_batch_is_enough_to_know_how_much_slower_a_device_is() -> None:
    model = CostModel()
    expected = model.predict(8, 64)
    model.observe(4, 32, model.predict(4, 32) * 50)
    assert model.predict(8, 64) == pytest.approx(expected * 50)


def test_batches_of_one_size_don_t_tell_a_launch_from_the_items() -> None:
    model = CostModel()
    for _ in range(100):
        model.observe(4, 8, 2.0)
    assert model.launch_seconds == 0
    assert model.at_most(8, 8) == pytest.approx(4.0)
    assert model.predict(8, 8) < 3.0, "the prior's guess"


def test_two_batches_of_different_size_tell_a_launch_from_the_items() -> None:
    model = CostModel()
    model.observe(8, 8, 2.5)
    model.observe(1, 8, 2.5)
    assert model.launch_seconds == pytest.approx(2.5)
    assert model.at_most(100, 8) == model.predict(100, 8) == pytest.approx(2.5)


def test_a_model_of_memory_waits_for_more_batches_before_it_trusts_a_fit() -> None:
    model = CostModel(enough=ENOUGH)
    for _ in range(ENOUGH // 2 - 1):
        model.observe(8, 8, 2.5)
        model.observe(1, 8, 2.5)
    assert model.launch_seconds == 0
    assert model.largest(8, 10.0) == 4


def test_longer_items_than_any_seen_take_longer_by_the_priors_share() -> None:
    model = CostModel()
    for count in (1, 2, 4, 8, 16, 32, 64):
        model.observe(count, 10, 1e-4 * count * 10)
    assert model.predict(1, 1000) > 1e-4 * 1000 * 1.05


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 512), st.floats(1e-4, 5.0)), min_size=1, max_size=70))
def test_predictions_are_never_negative_nor_smaller_for_more_items(seen: list[tuple[int, int, float]]) -> None:
    model = CostModel()
    for observation in seen:
        model.observe(*observation)
    predicted = model.predict(np.arange(1, 50), np.full(49, 64))
    assert (predicted >= 0).all()
    assert (np.diff(predicted) >= -1e-12).all()


def test_the_largest_batch_within_a_time_keeps_that_time() -> None:
    model = taught(4e-3, 1e-4, 1e-7)
    for longest in (8, 64, 256):
        count = model.largest(longest, 0.5)
        assert model.predict(count, longest) <= 0.5 < model.predict(count + 1, longest)


def test_one_item_is_always_allowed() -> None:
    assert taught(4e-3, 1e-4, 1e-7).largest(100_000, 0.01) == 1


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 512), st.floats(1e-3, 5.0)), min_size=3, max_size=64))
def test_without_scipy_the_fit_is_as_good_as_scipys(seen: list[tuple[int, int, float]]) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    count, longest, seconds = np.array(seen).T
    rows = np.stack([np.ones_like(count), count * longest, count * longest**2], axis=1) / seconds[:, None]
    rows /= rows.max(axis=0)
    _, off = optimize.nnls(rows, np.ones(len(rows)))
    mine = best_choice(rows)
    assert (mine >= 0).all()
    assert np.linalg.norm(rows @ mine - 1) == pytest.approx(off, rel=1e-6, abs=1e-9)


def test_scipy_that_another_thread_is_importing_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", ModuleType("scipy.optimize"))
    assert taught(4e-3, 1e-4, 1e-7).predict(4, 100) == pytest.approx(4e-3 + 1e-4 * 400 + 1e-7 * 4 * 100**2)
