"""Whatever a task returns, its app gets one envelope of the documented form."""

from __future__ import annotations

import base64
import json
import math
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import envelopes
import numpy as np
import pytest
from harness import ROOT
from hypothesis import given
from hypothesis import strategies as st

from legit_worker.errors import InvalidInputError, ModelLoadError
from legit_worker.routing.envelope import MAX_MESSAGE, Ending, seal

#: Bytes; more than any envelope here has.
ENOUGH = 2**20


#: Bytes of 384 floats in base64 and in JSON, as the documents have them.
BASE64_BYTES, JSON_BYTES = 2_089, 8_050


def ending(**changes: Any) -> Ending:
    fields = {"id": "a1", "task": "embed", "app": "vod", "status": "SUCCESS", "finished_at": 1.5, "worker": "gpu-1"}
    return Ending(**(fields | changes))


def sealed(encoding: str = "json", max_bytes: int = ENOUGH, **changes: Any) -> dict[str, Any]:
    envelope: dict[str, Any] = json.loads(seal(ending(**changes), encoding=encoding, max_bytes=max_bytes))
    envelopes.check(envelope)
    return envelope


def failed(error: BaseException) -> dict[str, Any]:
    details: dict[str, Any] = sealed(status="FAILURE", error=error)["error"]
    return details


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(result=json_values, meta=json_values)
def test_json_comes_through_untouched(result: Any, meta: Any) -> None:
    envelope = sealed(result=result, meta=meta)
    assert (envelope["result"], envelope["meta"]) == (result, meta)
    assert envelope["status"] == "SUCCESS"


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_base64_holds_the_same_floats(vector: list[float]) -> None:
    array = sealed("base64", result=vector)["result"]
    assert (array["dtype"], array["shape"]) == ("<f4", [len(vector)])
    assert np.frombuffer(base64.b64decode(array["base64"]), "<f4").tolist() == vector


def test_base64_takes_arrays_of_any_rank_wherever_they_are() -> None:
    result = sealed("base64", result={"vectors": [[0.5, 1.0], [2.0, 3.0]], "rows": [{"score": 0.5}, {"score": [1.0]}]})[
        "result"
    ]
    assert result["vectors"]["shape"] == [2, 2]
    assert np.frombuffer(base64.b64decode(result["vectors"]["base64"]), "<f4").tolist() == [0.5, 1.0, 2.0, 3.0]
    assert result["rows"][0] == {"score": 0.5}
    assert result["rows"][1]["score"]["shape"] == [1]


@pytest.mark.parametrize("value", [[], [1, 2], ["a"], [[1.0], [1.0, 2.0]], [1.0, "a"], [1.0, None], [1e300]])
def test_base64_leaves_what_is_no_array_of_floats(value: Any) -> None:
    result = sealed("base64", result=value)["result"]
    assert json.dumps(result).count("base64") == (2 if value == [[1.0], [1.0, 2.0]] else 0)
    if value != [[1.0], [1.0, 2.0]]:
        assert result == value


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ((1, 2), [1, 2]),
        ({3, 1, 2}, [1, 2, 3]),
        (datetime(2026, 1, 1, tzinfo=timezone.utc), "2026-01-01T00:00:00+00:00"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Decimal("1.10"), "1.10"),
        (np.array([[1, 2]]), [[1, 2]]),
        ({"inner": np.float64(0.5)}, {"inner": 0.5}),
    ],
)
def test_what_other_serializers_take_becomes_json(value: Any, plain: Any) -> None:
    assert sealed(result=value)["result"] == plain


@pytest.mark.parametrize("encoding", ["json", "base64"])
@pytest.mark.parametrize("value", [math.nan, [1.0, math.inf], b"bytes", object(), {(1, 2): 3}, "\ud800", {1, "a"}])
def test_what_json_can_not_hold_becomes_a_failure(value: Any, encoding: str) -> None:
    envelope = sealed(encoding, result=value, meta={"kept": 1})
    assert envelope["status"] == "FAILURE"
    assert envelope["error"]["type"] == "RoutingError"
    assert not envelope["error"]["retryable"]
    assert envelope["meta"] == {"kept": 1}


def test_a_circle_becomes_a_failure() -> None:
    circle: list[Any] = []
    circle.append(circle)
    assert sealed(result=circle)["error"]["type"] == "RoutingError"


def test_a_result_over_the_limit_becomes_a_failure_with_both_sizes() -> None:
    envelope = sealed(result="x" * 5000, meta="m", max_bytes=1000)
    assert envelope["status"] == "FAILURE"
    assert "LEGIT_WORKER_RESULT_MAX_BYTES allows 1000" in envelope["error"]["message"]
    assert envelope["meta"] == "m"


@pytest.mark.parametrize("prompt", ["\ud800", "p" * 5000])
def test_a_prompt_that_can_not_be_sent_takes_nothing_else_with_it(prompt: str) -> None:
    envelope = sealed(result=[1], meta="m", computed_by={"prompt": prompt}, max_bytes=1000)
    assert (envelope["status"], envelope["meta"], envelope["computed_by"]) == ("FAILURE", "m", None)


def test_a_result_of_exactly_the_limit_is_sent() -> None:
    size = len(seal(ending(result="x" * 500), encoding="json", max_bytes=ENOUGH))
    assert sealed(result="x" * 500, max_bytes=size)["status"] == "SUCCESS"
    assert sealed(result="x" * 500, max_bytes=size - 1)["status"] == "FAILURE"


@pytest.mark.parametrize("meta", ["m" * 5000, b"bytes", math.nan])
def test_a_meta_that_can_not_be_sent_is_left_out_of_the_failure(meta: Any) -> None:
    envelope = sealed(result=1, meta=meta, max_bytes=1000)
    assert envelope["status"] == "FAILURE"
    assert envelope["meta"] is None


def test_an_error_is_named_without_its_traceback() -> None:
    error = InvalidInputError("the text is empty")
    assert failed(error) == {"type": "InvalidInputError", "message": "the text is empty", "retryable": False}


@pytest.mark.parametrize(
    ("error", "retryable"),
    [(ModelLoadError("m"), True), (ConnectionResetError("c"), True), (TimeoutError("t"), True), (KeyError("k"), False)],
)
def test_an_error_says_whether_trying_again_may_help(error: Exception, retryable: bool) -> None:
    assert failed(error)["retryable"] is retryable


@pytest.mark.parametrize(
    "url", ["redis://:secret@host:6379/0", "amqp://user:secret@host//", "https://u:secret@h@x/p?q"]
)
def test_an_error_keeps_the_passwords_of_urls_to_itself(url: str) -> None:
    message = failed(ValueError(f"no answer from {url} today"))["message"]
    assert "secret" not in message
    assert message.startswith("no answer from ")


def test_a_long_message_is_cut() -> None:
    assert len(failed(ValueError("x" * 10_000))["message"]) == MAX_MESSAGE


def test_a_message_that_is_no_unicode_is_sent_all_the_same() -> None:
    assert failed(ValueError("\ud800 odd"))["message"] == "? odd"


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00.000Z"),
        ("2026-01-01T01:00:00.500+01:00", "2026-01-01T00:00:00.500Z"),
        ("yesterday", None),
        (12, None),
        (None, None),
    ],
)
def test_only_a_time_is_taken_for_the_producers_time(text: Any, sent: str | None) -> None:
    assert sealed(queued_at=text)["queued_at"] == sent


def test_times_are_utc_with_milliseconds() -> None:
    envelope = sealed(started_at=0.25, finished_at=1.5)
    assert (envelope["started_at"], envelope["finished_at"]) == ("1970-01-01T00:00:00.250Z", "1970-01-01T00:00:01.500Z")


@pytest.mark.parametrize("document", ["docs/result-routing.md", "examples/vodmanager.env"])
def test_the_documents_tell_how_large_a_vector_is(document: str) -> None:
    vector = np.random.default_rng(0).normal(size=384).astype("<f4")
    result = (vector / np.linalg.norm(vector)).tolist()
    sizes = {
        encoding: len(json.dumps(sealed(encoding, result=result)["result"], separators=(",", ":")))
        for encoding in ("base64", "json")
    }
    assert sizes == {"base64": BASE64_BYTES, "json": pytest.approx(JSON_BYTES, rel=0.01)}
    text = (ROOT / document).read_text()
    assert "a quarter of the" in text
    assert f"{BASE64_BYTES:,}" in text
    assert f"{JSON_BYTES:,}" in text


def test_an_id_that_is_no_unicode_is_sent_even_so() -> None:
    envelope = sealed(id="a\ud800")
    assert envelope["id"] == "a?"
    assert envelope["status"] == "FAILURE"


def test_an_error_that_can_not_tell_its_message_is_sent_all_the_same() -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("who knows")

    assert failed(MuteError())["message"] == "its message can't be read, since its __str__() raises RuntimeError"
