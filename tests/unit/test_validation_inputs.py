"""What `celery legit validate` reads may be anything: it is refused in a sentence, and never read wrongly."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from celery import Celery

from legit_worker.validation.command import configured
from legit_worker.validation.comparison import Failed, Tolerance, compare
from legit_worker.validation.paths import ROUTES, STOCK, opened
from legit_worker.validation.reference import ValidationError, _row
from legit_worker.validation.run import _skipped

PACKED = next(route for route in ROUTES if route.format == "json" and route.encoding == "base64")


def answer(result: Any, **changes: Any) -> Any:
    envelope = {"v": 1, "id": "1", "app": PACKED.app, "status": "SUCCESS", "result": result} | changes
    return opened(PACKED, envelope)[1]


def packed(shape: Any) -> dict[str, Any]:
    return {"base64": base64.b64encode(np.zeros(4, "<f4").tobytes()).decode(), "dtype": "<f4", "shape": shape}


def test_numbers_as_texts_are_no_vector() -> None:
    found = compare([[1.0, 2.0]], {0: ["1.0", "2.0"]}, Tolerance()).findings
    assert [finding.problem for finding in found] == ["not a vector of numbers but list of str"]


@pytest.mark.parametrize("shape", [[-1], [2, -1], "4", [4.0], None])
def test_a_shape_is_never_guessed(shape: Any) -> None:
    assert isinstance(answer(packed(shape)), Failed)


def test_a_whole_shape_is_read() -> None:
    assert answer(packed([4])).tolist() == [0.0] * 4


def test_an_error_of_any_form_is_told() -> None:
    assert answer(None, status="FAILURE", error="broken").reason == "FAILURE: broken"
    assert answer(None, status="FAILURE", error={"type": "E", "message": "m"}).reason == "FAILURE: E: m"


def test_json_that_is_nested_without_end_is_refused() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        opened(PACKED, b"[" * 100_000)


@pytest.mark.parametrize("number", [True, None, "1", float("nan"), 10**400])
def test_a_reference_holds_finite_numbers_only(number: Any) -> None:
    with pytest.raises(ValidationError, match="something other than finite numbers"):
        _row(Path("reference.jsonl"), 3, {"text": "a", "vector": [1.0, number]})


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_an_alias_whose_vectors_have_a_scale_is_not_compared(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEGIT_WORKER_MODELS__SCALED__PATH", "/models/minilm")
    monkeypatch.setenv("LEGIT_WORKER_MODELS__SCALED__PRECISION", precision)
    with pytest.raises(ValidationError, match=f"PRECISION={precision}, whose scale .* without PRECISION"):
        configured("scaled")


@pytest.mark.parametrize(
    ("backend", "skipped"),
    [
        ("redis://", None),
        ("rpc://", None),
        ("disabled://", "the project has no result backend"),
        ("cache+memory://", "the project's results stay in the worker's own memory"),
    ],
)
def test_results_that_no_other_process_finds_are_not_looked_for(backend: str, skipped: str | None) -> None:
    told = _skipped(Celery(broker="memory://", backend=backend, set_as_current=False))
    assert told == ({} if skipped is None else {STOCK: skipped})
