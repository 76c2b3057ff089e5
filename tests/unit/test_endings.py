"""Which tasks' ends are told to their app, and under which id."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery, chain, chord, group, signature

from legit_worker.routing.endings import GOES_ON, Status, endings, never_run
from legit_worker.routing.envelope import Ending

ERROR = KeyError("no")

app = Celery("signatures", set_as_current=False)


def told(request: dict[str, Any], status: Status = "SUCCESS") -> list[Ending]:
    value = 1 if status == "SUCCESS" else ERROR
    return list(endings("vod", "own", {"task": "t", **request}, status, value))


def ids(found: list[Ending]) -> list[str]:
    return [ending.id for ending in found]


def last(name: str, **options: Any) -> dict[str, Any]:
    return dict(signature(name, options={"task_id": name, **options}, app=app))


@pytest.mark.parametrize(
    ("request_", "is_told"),
    [
        ({}, True),
        ({"group": "g"}, True),
        ({"callbacks": [last("linked")]}, True),
        ({"route": "never"}, False),
        ({"headers": {"route": "never"}}, False),
        ({"chain": [last("c")]}, False),
        ({"chain": [], GOES_ON: True}, False),
        ({"chord": last("body")}, False),
        ({"chain": [last("c")], "route": "always"}, True),
        ({"chord": last("body"), "route": "always"}, True),
        ({"is_eager": True}, False),
        ({"task": "celery.chord_unlock"}, False),
        ({"task": "celery.map"}, True),
    ],
)
def test_only_what_is_nobodys_inner_step_is_told(request_: dict[str, Any], is_told: bool) -> None:
    assert ids(told(request_)) == (["own"] if is_told else [])


@pytest.mark.parametrize(("retries", "attempt"), [(None, 1), (0, 1), (2, 3), (-1, 1), ("2", 1)])
def test_an_attempt_is_at_least_the_first(retries: Any, attempt: int) -> None:
    (ending,) = told({"retries": retries})
    assert ending.attempt == attempt


@pytest.mark.parametrize("task_id", [None, ""])
def test_a_task_without_an_id_is_not_told(task_id: Any) -> None:
    assert list(endings("vod", task_id, {"task": "t"}, "FAILURE", ERROR)) == []


@pytest.mark.parametrize("status", ["FAILURE", "REVOKED"])
def test_a_chain_that_breaks_ends_under_its_last_tasks_id(status: Status) -> None:
    (ending,) = told({"chain": [last("c"), last("b")], "meta": 7, "hostname": "gpu-1"}, status)
    assert (ending.id, ending.task, ending.status, ending.error, ending.meta) == ("c", "c", status, ERROR, 7)
    assert (ending.attempt, ending.started_at, ending.worker) == (1, None, "gpu-1")


def test_a_broken_chain_tells_its_own_step_too_where_that_asks_for_it() -> None:
    assert ids(told({"chain": [last("c")], "route": "always"}, "FAILURE")) == ["own", "c"]


def test_a_last_task_that_asks_for_silence_is_not_told() -> None:
    assert told({"chain": [last("c", headers={"route": "never"})]}, "FAILURE") == []


def test_a_last_task_has_its_own_meta_where_it_says_so() -> None:
    (ending,) = told({"chain": [last("c", headers={"meta": "own"})], "meta": "parent's"}, "FAILURE")
    assert ending.meta == "own"


def test_a_chain_inside_a_chord_leaves_its_end_to_the_chords_body() -> None:
    assert told({"chain": [last("c", chord=last("body"))]}, "FAILURE") == []


def ends_of(canvas: Any) -> list[str]:
    canvas.freeze()
    return [ending.task for ending in never_run("vod", dict(canvas), {}, "FAILURE", ERROR)]


def test_a_canvas_that_never_runs_ends_where_its_result_would_be() -> None:
    a, b, c, d = (signature(name, app=app) for name in "abcd")
    assert ends_of(a.clone()) == ["a"]
    assert ends_of(chain(a, b, c)) == ["c"]
    assert ends_of(group(a, b)) == ["a", "b"]
    assert ends_of(chord([a, b], c)) == ["c"]
    assert ends_of(chord([a, b], chord([c, d], a))) == ["a"]
    assert ends_of(chord([a, b], chain(c, d))) == ["d"]


def test_a_retry_counts_and_a_nonsense_count_does_not() -> None:
    assert told({"retries": 2})[0].attempt == 3
    assert told({"retries": "many"})[0].attempt == 1
