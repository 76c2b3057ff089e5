"""What `celery legit doctor` and `validate` say of a model that another backend than torch computes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from legit_worker import settings
from legit_worker.doctor import checks, probes
from legit_worker.validation import reference


@pytest.fixture
def auto(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> settings.Settings:
    """Settings of one model with `BACKEND=auto`."""
    monkeypatch.setenv("LEGIT_WORKER_MODELS__M__PATH", str(tmp_path))
    monkeypatch.setenv("LEGIT_WORKER_MODELS__M__BACKEND", "auto")
    return settings.load()


def texts_of(findings: Iterable[checks.Finding]) -> list[str]:
    return [finding.seen for finding in findings]


def test_auto_without_openvino_is_a_warning(auto: settings.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_version", lambda package: None)
    assert "m: BACKEND=auto, and openvino is not installed" in texts_of(checks._models(auto))


def test_auto_with_openvino_is_none(auto: settings.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_version", lambda package: "2026.4")
    assert not [text for text in texts_of(checks._models(auto)) if "BACKEND=auto" in text]


def test_the_doctor_names_what_computed_the_batches(auto: settings.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {"device": "cpu", "backend": "openvino int8", "cosine": 1.0, "of": "texts", "batched": 9.0, "alone": 3.0}
    monkeypatch.setattr(checks, "probe", lambda name, *aliases: dict.fromkeys(aliases, seen))
    (text,) = texts_of(checks._batches(auto))
    assert "by openvino int8" in text


@pytest.mark.parametrize("backend", ["openvino", "onnx", "auto"])
def test_another_backend_is_compared_with_float32(backend: str) -> None:
    model = settings.ModelSettings(path="m", backend=backend, dtype="bfloat16")  # type: ignore[arg-type]
    assert reference.origin(model)["dtype"] == "float32"


def test_torch_is_compared_with_its_own_type() -> None:
    model = settings.ModelSettings(path="m", dtype="bfloat16")
    assert reference.origin(model)["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("nomod:Nix", "ModuleNotFoundError: No module named 'nomod'"),
        ("legit_worker.models.simulated:Simulatd", "AttributeError: module"),
        ("pathlib:Path", "it has no load, preprocess, cost, forward, postprocess"),
        ("legit_worker.models.simulated:SimulatedModel", None),
    ],
)
def test_a_class_of_ones_own_is_imported_and_looked_at(kind: str, said: str | None) -> None:
    wrong = probes.own_class(kind).get("error")
    assert wrong is None if said is None else wrong.startswith(said)
