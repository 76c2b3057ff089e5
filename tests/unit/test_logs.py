"""`LEGIT_WORKER_LOG=json`: a line for each record, and an object on each line, whatever a record has."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from legit_worker.logs import JsonFormatter
from legit_worker.settings import Settings


class Unprintable:
    """Something whose `repr` has a fault of its own."""

    def __repr__(self) -> str:
        raise LookupError


def written(name: str = "a.library", msg: Any = "hello", args: Any = (), exc: Any = None, **extra: Any) -> Any:
    record = logging.getLogger(name).makeRecord(name, logging.INFO, "file", 1, msg, args, exc, extra=extra)
    line = JsonFormatter(Settings()).format(record)
    line.encode()
    assert "\n" not in line

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(line, parse_constant=refuse)


def circle() -> dict[str, Any]:
    whole: dict[str, Any] = {}
    whole["self"] = whole
    return whole


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({(1, 2): 3}, "{(1, 2): 3}"),
        (circle(), "{'self': {...}}"),
        (float("nan"), "nan"),
        ([float("inf")], "[inf]"),
        (Unprintable(), "<Unprintable: LookupError as it was written>"),
        ({"deep": {(1, 2): 3}}, "{'deep': {(1, 2): 3}}"),
        (b"bytes", "b'bytes'"),
        ({"a": [1, None, "é"]}, {"a": [1, None, "é"]}),
    ],
)
def test_what_json_lacks_is_written_as_text_beside_the_rest(value: Any, text: Any) -> None:
    found = written(odd=value, fine={"a": 1})
    assert (found["odd"], found["fine"], found["message"]) == (text, {"a": 1}, "hello")


def test_half_of_a_surrogate_pair_loses_no_line() -> None:
    error = ValueError("a bad text \udc80")
    found = written(msg="failed: %s", args=("\udc80 é",), exc=(ValueError, error, None), name_="\ud800")
    assert found["message"] == "failed: \udc80 é"
    assert found["exception"]["message"] == "a bad text \udc80"


def test_a_message_that_fits_no_arguments_is_written_beside_them() -> None:
    assert written(msg="%d of %d", args=("many",))["message"] == "%d of %d ('many',)"
    assert written(msg=Unprintable())["message"] == "<Unprintable: LookupError as it was written> ()"


def test_celerys_own_data_is_left_out_and_that_of_others_is_not() -> None:
    data = {"id": "8b1f", "name": "embed", "args": "[secret]"}
    found = written("celery.app.trace", data=data)
    assert (found["task_id"], found["task"], found.get("data")) == ("8b1f", "embed", None)
    found = written("celerys.neighbour", data=data)
    assert (found.get("task_id"), found["data"]) == (None, data)
