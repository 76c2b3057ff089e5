"""JSON with kombu's own bytes, and the values that kombu would decode."""

from __future__ import annotations

import base64
import collections
import dataclasses
import datetime
import decimal
import enum
import json
import uuid
from collections.abc import Callable, Iterator
from math import isfinite
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu import serialization
from kombu.utils import json as kombus

from legit_worker import quickjson


class Text(str):
    """A text of a project's own class."""


class Word(str, enum.Enum):
    ONE = "one"


class Number(enum.IntEnum):
    ONE = 1


class Mixed(enum.Enum):
    ONE = "one"


@dataclasses.dataclass
class Data:
    one: int = 1


class Own:
    def __json__(self) -> Any:
        return {"own": [1]}


class Array:
    """Has no truth value, as an array of numpy has none."""

    def __bool__(self) -> bool:
        raise ValueError


Pair = collections.namedtuple("Pair", "one two")

#: Each with all that makes orjson write or read something else than kombu, or refuse it.
texts = st.text(st.characters(), max_size=8) | st.sampled_from(["", "a\x7f\x00", "__type__", "\ud800", "\u2028", "ä"])
numbers = (
    st.integers() | st.integers(-(2**65), 2**65) | st.sampled_from([2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1])
)
strange = st.sampled_from(
    [
        float("nan"),
        float("inf"),
        -0.0,
        5e-324,
        1.7976931348623157e308,
        datetime.datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=datetime.timezone.utc),
        datetime.date(2026, 1, 2),
        datetime.time(1, 2),
        decimal.Decimal("0.1"),
        uuid.UUID(int=5),
        b"bytes",
        b"\xff",
        Text("a"),
        Word.ONE,
        Number.ONE,
        Mixed.ONE,
        Data(),
        Own(),
        Pair(1, [2.0]),
        collections.OrderedDict(a=1),
        {1, 2},
        object(),
    ]
)
keys = texts | st.integers() | st.none() | st.booleans() | st.floats() | st.sampled_from([Text("k"), Word.ONE, (1, 2)])
leaves = st.none() | st.booleans() | numbers | st.floats() | texts | strange
values = st.recursive(
    leaves | st.lists(st.floats(allow_nan=False, allow_infinity=False)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(texts, inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=2)
    ),
    max_leaves=12,
)


def outcome(function: Callable[[], Any]) -> str:
    """What it gives, or the error that it raises; tells 1 from 1.0 and from True, and 0.0 from -0.0."""
    try:
        return repr(function())
    except Exception as error:
        return type(error).__name__


many = st.lists(
    st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([1e-5, 9.9e-5, 1e-4, 1e15, 1e16, -0.0])
)


@given(values | st.dictionaries(texts, st.lists(many.map(lambda some: some * 20), max_size=3)))
def test_its_bytes_are_kombus(value: Any) -> None:
    assert outcome(lambda: quickjson.dumps(value)) == outcome(lambda: kombus.dumps(value))


@given(many)
def test_numbers_are_written_as_python_does(numbers: list[float]) -> None:
    is_kombus = not isfinite(sum(numbers))  # the sum shows whether all are finite, and may itself be too large
    assert quickjson._written(numbers) == (None if is_kombus else json.dumps(numbers))


@pytest.mark.parametrize("odd", [True, 3, 2**70, None, "e", [1.0], Number.ONE, decimal.Decimal("0.1"), Own(), 1e-7])
def test_something_else_behind_floats_is_kombus(odd: Any) -> None:
    value = [0.5] * 20 + [odd] + [1e-7]
    assert outcome(lambda: quickjson.dumps(value)) == outcome(lambda: kombus.dumps(value))


#: JSON as other clients write it: other spaces, other forms of numbers and of letters.
MARKS = ["[", "]", "{", "}", ",", ":", " ", "\n", "\ufeff"]
NUMBERS = ["0", "-0", "1e400", "-1E5", "1.", "01", "NaN", "-Infinity", "9" * 18, "9" * 19, "0." + "1" * 30]
LARGE = [str(2**64), str(-(2**63) - 1), "1" + "0" * 40, "null", "true"]
STRINGS = [
    '"\\u00e9"',
    '"\\ud800"',
    '"é"',
    '"\\u0000"',
    '"\x00"',
    '"uuid"',
    '"__type__"',
    '"\\u005f_type__"',
    '"__value__"',
]
pieces = st.sampled_from([*MARKS, *NUMBERS, *LARGE, *STRINGS])


@given(st.lists(pieces, max_size=9).map("".join) | values.map(lambda value: outcome(lambda: json.dumps(value))[1:-1]))
def test_json_is_decoded_as_by_kombu(text: str) -> None:
    assert outcome(lambda: quickjson.loads(text)) == outcome(lambda: kombus.loads(text))
    raw = text.encode(errors="surrogatepass")
    for data in (raw, bytearray(raw), memoryview(raw)):
        assert outcome(lambda data=data: quickjson.loads(data)) == outcome(lambda data=data: kombus.loads(data))


@given(values)
def test_what_kombu_writes_comes_back_as_kombu_reads_it(value: Any) -> None:
    try:
        text = kombus.dumps(value)
    except (TypeError, ValueError):
        return
    assert outcome(lambda: quickjson.loads(text)) == outcome(lambda: kombus.loads(text))


@pytest.mark.parametrize("text", ["\xff", "[" * 100_000, "[" * 950 + "]" * 950, "", "{"])
def test_what_is_no_json_is_refused_as_by_kombu(text: str) -> None:
    raw = text.encode("latin-1")
    assert outcome(lambda: quickjson.loads(raw)) == outcome(lambda: kombus.loads(raw))


def test_a_list_of_floats_goes_through_orjson(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kombus, "dumps", lambda value: json.dumps(value) if "0.1" not in repr(value) else None)
    monkeypatch.setattr(kombus, "loads", None)
    meta = {"status": "SUCCESS", "result": [[0.1, -2.5e-7] * 8], "children": [], "traceback": None}
    assert quickjson.loads(quickjson.dumps(meta)) == meta


def test_an_object_without_a_truth_value_is_kombus() -> None:
    """A backend that is not Redis encodes a result by itself."""
    assert outcome(lambda: quickjson.dumps(Array())) == outcome(lambda: kombus.dumps(Array())) == "TypeError"


def test_a_value_that_contains_itself_is_kombus() -> None:
    value: list[Any] = [1.0]
    value.append(value)
    assert outcome(lambda: quickjson.dumps(value)) == outcome(lambda: kombus.dumps(value)) == "ValueError"


@pytest.fixture
def _restored() -> Iterator[None]:
    encoders, decoders = dict(serialization.registry._encoders), dict(serialization.registry._decoders)
    yield
    serialization.registry._encoders.update(encoders)
    serialization.registry._decoders.update(decoders)


@pytest.mark.usefixtures("_restored")
def test_celery_uses_it_until_that_is_undone() -> None:
    kombus_own = serialization.registry._encoders["json"].encoder
    undo = quickjson.use()
    assert serialization.registry._encoders["json"].encoder is quickjson.dumps
    assert serialization.dumps([0.5, 1.5], "json") == ("application/json", "utf-8", "[0.5, 1.5]")
    assert serialization.loads(b"[0.5]", "application/json", "utf-8") == [0.5]
    undo()
    assert serialization.registry._encoders["json"].encoder is kombus_own


@pytest.mark.usefixtures("_restored")
def test_a_projects_own_json_stays() -> None:
    serialization.register("json", lambda value: "own", lambda text: base64, "application/json", "utf-8")
    quickjson.use()()
    assert serialization.dumps([0.5], "json")[2] == "own"
    assert serialization.loads(b"[0.5]", "application/json", "utf-8") is base64
