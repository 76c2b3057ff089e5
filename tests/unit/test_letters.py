"""Dead letters keep what they are given, and whatever lies in their place has an id and its bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from legit_worker.routing.letters import Kind, envelope_of, read, sealed

#: What a task may return, and what looks like a letter's own note.
RESULTS = some.recursive(
    some.none() | some.booleans() | some.floats(allow_nan=False) | some.text() | some.just({"dead": {"queue": "x"}}),
    lambda inner: some.lists(inner) | some.dictionaries(some.text() | some.just("dead"), inner),
    max_leaves=10,
)


def envelope(result: Any) -> bytes:
    fields = {"v": 1, "id": "an-id", "task": "t", "app": "alpha", "status": "SUCCESS", "result": result}
    return json.dumps(fields | {"finished_at": "2026-01-01T00:00:00.000Z"}, ensure_ascii=False).encode(
        errors="surrogatepass"
    )


@given(result=RESULTS, queue=some.none() | some.text(), reason=some.text() | some.just(',"dead":{"queue":'))
def test_a_sealed_envelope_comes_out_as_it_was(result: Any, queue: str | None, reason: str) -> None:
    bare = envelope(result)
    letter = read(sealed(bare, queue=queue, reason=reason), "result")
    assert envelope_of(letter) == bare
    assert (letter.id, letter.app, letter.queue, letter.reason) == ("an-id", "alpha", queue, reason)
    assert letter.content == json.loads(bare)


@given(result=RESULTS)
def test_a_bare_envelope_of_an_older_release_is_a_letter(result: Any) -> None:
    bare = envelope(result)
    letter = read(bare, "result")
    assert envelope_of(letter) == bare
    assert (letter.id, letter.queue, letter.reason, letter.at) == ("an-id", None, None, "2026-01-01T00:00:00.000Z")


@pytest.mark.parametrize("kind", ["poisoned", "unreadable", "result"])
@given(raw=some.binary() | some.sampled_from([b"[]", b"null", b"5", b'"x"', b'{"dead": 5}', b'{"id": []}']))
def test_whatever_lies_there_can_be_shown(kind: Kind, raw: bytes) -> None:
    letter = read(raw, kind)
    assert letter.id
    assert json.loads(json.dumps(letter.details()))["kind"] == kind
    assert letter.raw == raw
