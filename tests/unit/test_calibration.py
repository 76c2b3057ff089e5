"""What a model's trial batches may cost at its load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import pytest

from legit_worker.device.simulated import simulated_device
from legit_worker.models import calibration
from legit_worker.models.calibration import BATCHES, MOST_SECONDS
from legit_worker.models.registry import Registry
from legit_worker.models.simulated import SimulatedModel, vector
from legit_worker.models.slot import Slot
from legit_worker.settings import ModelSettings


class Clocked(SimulatedModel):
    """One whose batches take their time by a clock of the test's own."""

    now: ClassVar[float] = 0.0
    sizes: ClassVar[list[tuple[int, int]]] = []
    #: The first batch takes this much longer.
    beginning: ClassVar[float] = 0.0

    def forward(self, batch: Sequence[str]) -> list[object]:  # type: ignore[override]
        cost = max(map(self.cost, batch))
        padded = len(batch) * cost
        with self._ledger.held(self._alias, padded * self._bytes_per_cost):
            Clocked.now += self.seconds_per_batch + self.seconds_per_cost * padded
            Clocked.now += 0.0 if Clocked.sizes else Clocked.beginning
        Clocked.sizes.append((len(batch), cost))
        return [vector(item) for item in batch]


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clocked, "now", 0.0)
    monkeypatch.setattr(Clocked, "sizes", [])
    monkeypatch.setattr(calibration, "monotonic", lambda: Clocked.now)


def bring(registry: Registry) -> None:
    """Load its model, and evict it again."""
    subject = registry.get("m")
    request = registry.residency.request(subject)
    request.future.result(timeout=10)
    registry.residency.release(request)
    registry.residency.evict_idle()
    assert subject.state == "unloaded"


def registry_of(path: str) -> Registry:
    """One model on the simulated device."""
    return Registry({"m": ModelSettings(kind=f"{__name__}:Clocked", path=path, keep_alive=0)}, lambda: "simulated")


def load(path: str, loads: int = 1) -> Slot:
    """A model on the simulated device, loaded and unloaded, and loaded again."""
    registry = registry_of(path)
    for _ in range(loads):
        bring(registry)
    return registry.get("m")


ALL = [BATCHES[0], *BATCHES]


def test_a_quick_model_runs_all_trial_batches_once(caplog: pytest.LogCaptureFixture) -> None:
    subject = load("0.001,0.0001,0,0,7", loads=3)
    assert Clocked.sizes == ALL
    assert subject.activations.is_known
    assert "trial" not in caplog.text


@pytest.mark.parametrize("each", [0.002, 0.01, 0.05, 0.2, 1.5])
def test_a_slow_models_trials_end_in_time_but_for_the_first(each: float, caplog: pytest.LogCaptureFixture) -> None:
    load(f"0,{each},0,0,7")
    assert Clocked.now <= max(MOST_SECONDS, each * 32) + 1e-6
    left_out = len(ALL) - len(Clocked.sizes)
    assert left_out > 0
    assert caplog.text.count(f"model 'm' is slow: {left_out} of {len(ALL)} trial batches") == 1


def test_a_model_with_a_slow_beginning_is_measured_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clocked, "beginning", 3.0)
    load("0.001,0.0001,0,0,7")
    assert Clocked.sizes == ALL


@pytest.mark.parametrize("path", ["0,0.2,0,0,7", "0.001,0.0001"], ids=["cut short", "takes no memory"])
def test_trials_are_not_repeated_at_the_next_load(path: str) -> None:
    load(path, loads=1)
    once = len(Clocked.sizes)
    Clocked.sizes.clear()
    Clocked.now = 0.0
    load(path, loads=3)
    assert len(Clocked.sizes) == once


def test_trials_that_found_no_memory_are_repeated_at_the_next_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulated_device().ledger, "total", simulated_device().ledger.used + 1)
    registry = registry_of("0.001,0.0001,0,0,7")
    bring(registry)
    assert Clocked.sizes == []
    monkeypatch.setattr(simulated_device().ledger, "total", 2**62)
    bring(registry)
    assert Clocked.sizes == ALL
