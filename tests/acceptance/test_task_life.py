"""What Celery promises of one task's life, promised by ModelPool: the same project, the same messages, on both sides.

Most tests ask both workers and compare, having said what the stock one must answer: it proves the test itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from celery import chain
from celery.result import AsyncResult
from celery.utils import uuid
from harness import SIDES, Broker, Client, StartWorker, poll
from journal import Life, begin_both, begin_life, names

#: How often a task parks before its end.
PARKS = (0, 1, 3)


@pytest.fixture(scope="module")
def lives(start_module_worker: StartWorker, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Life]:
    """A worker on each side."""
    conf = {"accept_content": ["json", "msgpack", "yaml"]}
    return begin_both(start_module_worker, tmp_path_factory.mktemp("life"), conf=conf)


@pytest.fixture(params=SIDES)
def life(request: pytest.FixtureRequest, lives: dict[str, Life]) -> Life:
    """One of them, and then the other."""
    return lives[request.param]


def on_both(lives: dict[str, Life], ask: Callable[[Life], Any]) -> Any:
    """What both answer alike."""
    answers = {side: ask(life) for side, life in lives.items()}
    assert answers["modelpool"] == answers["stock"]
    return answers["stock"]


# --- how a task ends ---

#: Each end with its messages, its last state, and what happens to the task; `None` where Celery's releases differ.
ONCE = ["accepted", "before_start", "goes on"]
AGAIN = [*ONCE, "on_retry", "request fails", "request retries", "acks"]
FAILED = ["on_failure", "after_return", "request fails", "acks"]
GOOD = ["on_success", "after_return", "acks"]
ENDS: dict[str, tuple[int, str | None, list[str] | None]] = {
    "returns": (1, "SUCCESS", [*ONCE, *GOOD]),
    "raises": (1, "FAILURE", [*ONCE, *FAILED]),
    "raises_expected": (1, "FAILURE", [*ONCE, *FAILED]),
    "retries_twice": (3, "SUCCESS", [*AGAIN, *AGAIN, *ONCE, *GOOD]),
    "retries_in_vain": (2, "FAILURE", [*AGAIN, *ONCE, *FAILED]),
    "retries_without_reason": (2, "FAILURE", [*AGAIN, *ONCE, *FAILED]),
    "retries_with_other_arguments": (2, "SUCCESS", [*AGAIN, *ONCE, *GOOD]),
    "raises_retry": (1, "RETRY", AGAIN),
    "ignores": (1, "STARTED", [*ONCE, "request fails", "acks"]),
    "rejects": (1, None, [*ONCE, "request fails", "rejects"]),
    "requeues_once": (2, "SUCCESS", [*ONCE, "request fails", "rejects", *ONCE, *GOOD]),
    "returns_unserializable": (1, "FAILURE", [*ONCE, *FAILED]),
}


@pytest.mark.parametrize("parks", PARKS)
@pytest.mark.parametrize("end", ENDS)
def test_a_task_ends_as_it_does_under_stock_solo(lives: dict[str, Life], end: str, parks: int) -> None:
    messages, state, happens = ENDS[end]

    def ask(life: Life) -> Any:
        result = life.send("ends", end, parks)
        notes = life.end(result, messages)
        if state is not None:  # that of a retry comes a moment later
            poll(lambda: result.state == state, f"the state {state}")
        return life.anonymous([result.state, type(result.result).__name__, str(result.result), notes], result)

    stock_state, _, _, notes = on_both(lives, ask)
    assert state in (stock_state, None)
    assert names(notes) == happens


def test_tasks_of_all_ends_at_once_end_as_each_does_alone(life: Life) -> None:
    check_all_ends(life)


@pytest.mark.parametrize("side", SIDES)
def test_tasks_end_as_ever_under_rabbitmq_with_results_by_message(
    start_worker: StartWorker, tmp_path: Path, rabbitmq: Broker, side: str
) -> None:
    check_all_ends(begin_life(start_worker, tmp_path, side, broker=replace(rabbitmq, backend="rpc://")))


def check_all_ends(life: Life) -> None:
    """Under ModelPool, all are parked together, and each one's hooks run between those of others."""
    sent = [(end, life.send("ends", end, parks)) for end in ENDS for parks in range(1, 6)]
    for end, result in sent:
        messages, state, happens = ENDS[end]
        assert names(life.end(result, messages)) == happens
        if state in ("SUCCESS", "FAILURE"):
            life.worker.settle([result])
            assert result.state == state


@pytest.mark.parametrize(
    ("good_attempt", "messages", "state"), [(1, 2, "SUCCESS"), (2, 3, "SUCCESS"), (5, 3, "FAILURE")]
)
def test_celery_retries_by_itself_as_under_stock_solo(
    lives: dict[str, Life], good_attempt: int, messages: int, state: str
) -> None:
    def ask(life: Life) -> Any:
        result = life.send("autoretries", good_attempt)
        notes = life.end(result, messages)
        return life.anonymous([result.state, str(result.result), notes], result)

    stock_state, _, notes = on_both(lives, ask)
    assert stock_state == state
    assert names(notes).count("goes on") == messages


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("on_failure", [False, True])
@pytest.mark.parametrize("on_lost", [False, True])
def test_messages_are_acked_and_rejected_when_and_as_they_are_under_stock_solo(
    lives: dict[str, Life], late: bool, on_failure: bool, on_lost: bool
) -> None:
    """acks_late by acks_on_failure_or_timeout by reject_on_worker_lost, each with a success, a failure, and a loss."""

    def ask(life: Life) -> Any:
        task = f"acks.{late:d}{on_failure:d}{on_lost:d}"
        again = late and on_lost
        sent = {end: life.send(task, end, 1) for end in ("returns", "raises", "loses_its_worker")}
        life.worker.settle(list(sent.values()))
        return {
            end: answers(life.end(result, 1 + (again and end == "loses_its_worker"))) for end, result in sent.items()
        }

    answered = on_both(lives, ask)
    failed = ["acks"] if on_failure else ["rejects", False]
    if not late:
        assert list(answered.values()) == [[(1, ["acks"])]] * 3
    else:
        assert [answer for _, answer in answered["returns"]] == [["acks"]]
        assert [answer for _, answer in answered["raises"]] == [failed]
        lost = [["rejects", True], ["acks"]] if on_lost else [failed]
        assert [answer for _, answer in answered["loses_its_worker"]] == lost
        assert all(place > 3 for of_one in answered.values() for place, _ in of_one), "acked before the task was over"


def answers(notes: list[list[Any]]) -> list[tuple[int, list[Any]]]:
    """Acks and rejects, each with its place among the notes."""
    return [(place, note) for place, note in enumerate(notes) if note[0] in ("acks", "rejects")]


# --- when it runs ---


def test_a_task_that_is_due_later_does_not_run_before(life: Life) -> None:
    due = datetime.now(timezone.utc) + timedelta(seconds=0.7)
    results = [life.send("runs_at", eta=due), life.send("runs_at", countdown=0.7)]
    at_once = life.send("runs_at")
    assert life.worker.answer(at_once) < due.timestamp()
    assert all(moment >= due.timestamp() for moment in life.worker.answers(results))


def test_a_task_that_expired_is_revoked_and_one_that_did_not_runs(lives: dict[str, Life]) -> None:
    if not lives["stock"].worker.broker.url.startswith("redis"):
        pytest.skip("RabbitMQ drops an expired message by itself")

    def ask(life: Life) -> Any:
        late = life.send("ends", "returns", 1, expires=datetime.now(timezone.utc) - timedelta(seconds=1))
        early = life.send("ends", "returns", 1, expires=60)
        # Both a time to begin and one after which there is no need: the second comes first.
        never = life.send("ends", "returns", 1, countdown=0.5, expires=0.2)
        life.worker.settle([late, early, never])
        return life.anonymous([[result.state, life.end(result)] for result in (late, early, never)])

    late, early, never = on_both(lives, ask)
    assert late == never == ["REVOKED", [["acks"]]]
    assert early[0] == "SUCCESS"


def test_no_more_tasks_begin_in_a_second_than_the_rate_limit_lets(life: Life) -> None:
    """Ten a second; some of Celery's releases let the first two begin together."""
    results = [life.send("slowly") for _ in range(8)]
    moments = life.worker.answers(results)
    assert max(moments) - min(moments) > 0.1 * 6 * 0.9


@pytest.mark.parametrize("side", SIDES)
def test_tasks_of_high_priority_come_first(
    start_worker: StartWorker, tmp_path: Path, broker: Broker, side: str
) -> None:
    """To Redis, 0 is the highest."""
    if not broker.url.startswith("redis"):
        pytest.skip("RabbitMQ has a test of its own")
    results = fill_queue(broker, ordinary=6, urgent=0)
    check_order(begin_life(start_worker, tmp_path, side, broker=broker), *results)


@pytest.mark.parametrize("side", SIDES)
def test_tasks_of_high_priority_come_first_under_rabbitmq(
    start_worker: StartWorker, tmp_path: Path, rabbitmq: Broker, side: str
) -> None:
    """To RabbitMQ, a queue's highest number is the highest."""
    conf = {"task_queue_max_priority": 9}
    results = fill_queue(rabbitmq, ordinary=1, urgent=8, **conf)
    check_order(begin_life(start_worker, tmp_path, side, broker=rabbitmq, conf=conf), *results)


def fill_queue(broker: Broker, ordinary: int, urgent: int, **conf: Any) -> tuple[list[Any], list[Any]]:
    """What the worker will find: tasks that were sent first, and those that are to go first."""
    client = broker.client()
    client.conf.update(conf)
    priorities = [ordinary] * 30 + [urgent] * 10
    results = [client.send_task("ends", ["returns", 1], priority=priority) for priority in priorities]
    return results[:30], results[30:]


def check_order(life: Life, ordinary: list[Any], urgent: list[Any]) -> None:
    life.worker.settle(ordinary + urgent)
    assert set(life.journal.happened("accepted")[: len(urgent)]) == {result.id for result in urgent}


# --- what a task sees, sends and keeps ---

#: Options of one message, as many as there are.
OPTIONS: dict[str, Any] = {
    "kwargs": {"word": "ä"},
    "headers": {"own": "header", "app": "shop", "meta": {"deep": [1, None]}},
    "priority": 3,
    "shadow": "another name",
    "expires": 600,
    "time_limit": 300,
    "soft_time_limit": 200,
    "argsrepr": "(secret)",
    "ignore_result": False,
}


@pytest.mark.parametrize("protocol", [1, 2])
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "with all options"])
def test_a_task_sees_the_same_request_as_under_stock_solo(
    lives: dict[str, Life], options: dict[str, Any], protocol: int
) -> None:
    """All of its fields, before and after a model call."""

    def ask(life: Life) -> Any:
        result = client_of(life, task_protocol=protocol).send_task("sees", [1, "two"], **options)
        seen = life.worker.answer(result)
        assert seen["reply_to"] == seen["properties"].pop("reply_to")
        assert seen.pop("reply_to")
        seen["properties"].pop("delivery_tag", None)
        for fields in (seen, seen["properties"].get("application_headers", {})):
            fields["expires"] = bool(fields.get("expires"))
        return life.anonymous(seen, result)

    seen = on_both(lives, ask)
    assert seen["id"] == seen["correlation_id"] == "id 0"
    assert seen["args"] == [1, "two"]
    assert seen["kwargs"] == options.get("kwargs", {})
    assert seen["hostname"] == "worker"
    assert (seen["root_id"] == "id 0") is (protocol == 2)
    if protocol == 2:
        assert options.get("headers", {}).items() <= (seen["headers"] or {}).items()


def client_of(life: Life, **conf: Any) -> Client:
    """One more client, with settings of its own."""
    client = life.worker.broker.client()
    client.conf.update(conf)
    return client


@pytest.mark.parametrize("compression", [None, "gzip", "zlib"])
@pytest.mark.parametrize(
    ("serializer", "value"), [("json", "Ünïcödé"), ("msgpack", b"\xff\x00"), ("yaml", date(2026, 1, 2))]
)
def test_messages_are_read_whatever_their_serializer_and_compression(
    life: Life, serializer: str, value: Any, compression: str | None
) -> None:
    text = "a long text " * 1000
    answer = life.ask("says", value, text, serializer=serializer, compression=compression)
    assert answer == [repr(value), repr(text)]


def test_pickle_is_refused_unless_the_project_accepts_it(life: Life) -> None:
    result = life.send("says", {1, 2}, serializer="pickle")
    life.worker.wait_for_log("Refusing to deserialize")
    assert life.ask("says", 1) == ["1"]
    assert (result.state, life.journal.of(result.id)) == ("PENDING", [])


def test_results_and_messages_are_pickled_where_the_project_says_so(start_worker: StartWorker, tmp_path: Path) -> None:
    conf = {"accept_content": ["json", "pickle"], "result_serializer": "pickle", "task_compression": "zlib"}
    # Which Celery lets nobody do as root, unless told to.
    for life in begin_both(start_worker, tmp_path, conf=conf, C_FORCE_ROOT="1").values():
        client = client_of(life, accept_content=["pickle"], result_serializer="pickle", task_serializer="pickle")
        result = client.send_task("gather", [{1, 2}, b"bytes"])
        assert life.worker.answer(result) == [{1, 2}, b"bytes"]


def test_stamps_are_there_after_a_park_and_reach_what_the_task_sends(lives: dict[str, Life]) -> None:
    lives["stock"].worker.broker.needs_stored_results()

    def ask(life: Life) -> Any:
        signature = life.worker.client.signature("sees", [1])
        link = life.worker.client.signature("sees", task_id=uuid())
        signature.link(link)
        signature.stamp(customer="shop")
        results = [signature.apply_async(), AsyncResult(link.id, app=life.worker.client)]
        return [[seen["stamps"], seen["stamped_headers"]] for seen in life.worker.answers(results)]

    assert on_both(lives, ask) == [[{"customer": "shop"}, ["customer"]]] * 2


def test_a_result_that_is_ignored_is_kept_no_more_than_under_stock_solo(lives: dict[str, Life]) -> None:
    """Celery's releases differ in what they keep of a task that says so itself, and a client that does not."""

    def ask(life: Life) -> Any:
        by_task, by_option = life.send("quiet", 1), life.send("ends", "returns", 1, ignore_result=True)
        notes = [life.end(by_task), life.end(by_option)]
        return life.anonymous([by_task.state, by_option.state, by_option.result, *notes], by_task, by_option)

    _, state, kept, by_task, by_option = on_both(lives, ask)
    assert state in ("PENDING", "STARTED")
    assert kept != "after 0 retries"
    assert ["on_success", 1] in by_task
    assert ["on_success", "after 0 retries"] in by_option


def test_a_start_is_announced_where_the_task_says_so(life: Life, tmp_path: Path) -> None:
    """Neither is over before there is the file, so neither look comes too late."""
    for task, state in (("waits_for", "STARTED"), ("untracked", "PENDING")):
        result = life.send(task, str(tmp_path / task))
        life.journal.wait_for(result.id, "waits")
        assert result.state == state
        (tmp_path / task).touch()
        assert life.worker.answer(result) == "it came"


def test_a_task_run_inside_another_keeps_its_result_where_it_says_so(life: Life) -> None:
    life.worker.broker.needs_stored_results()
    (kept, first), (unkept, second) = life.ask("runs_here", 4)
    assert first == second == 8
    assert [AsyncResult(task, app=life.worker.client).state for task in (kept, unkept)] == ["SUCCESS", "PENDING"]


def test_a_project_may_have_its_tasks_subtasks_run_at_once(start_worker: StartWorker, tmp_path: Path) -> None:
    for life in begin_both(start_worker, tmp_path, conf={"task_always_eager": True}).values():
        results = [life.send("eager_parent", number) for number in range(20)]
        assert life.worker.answers(results) == [[False, True, True, True, number] for number in range(20)]


def test_tasks_sent_after_a_park_are_the_children_of_the_one_that_sent_them(life: Life) -> None:
    life.worker.broker.needs_stored_results()
    parents = [life.send("sends_children", 3) for _ in range(10)]
    for parent, children in zip(parents, life.worker.answers(parents), strict=True):
        assert len(set(children)) == 3
        for child in children:
            seen = life.worker.answer(AsyncResult(child, app=life.worker.client))
            assert (seen["parent_id"], seen["root_id"]) == (parent.id, parent.id)


def test_a_task_may_become_another_after_a_park(life: Life) -> None:
    client = life.worker.client
    after = client.signature("add", [1])
    results = [
        chain(client.signature("replaces", [client.signature("add", [number, 10])]), after).apply_async()
        for number in range(20)
    ]
    assert life.worker.answers(results) == [number + 11 for number in range(20)]


def test_links_are_called_with_the_result_and_errbacks_with_the_error(lives: dict[str, Life]) -> None:
    """Of the two kinds of errback, one runs within the failing task, and may park there; the other is a message."""

    def ask(life: Life) -> Any:
        client = life.worker.client
        link = client.signature("gather", ["linked"], task_id=uuid())
        good = life.send("ends", "returns", 1, link=link)
        bad = life.send("ends", "raises", 1, link=link, link_error=client.signature("errback"))
        old = life.send("ends", "raises", 1, link_error=client.signature("old_errback"))
        retried = life.send("ends", "retries_in_vain", 1, link_error=client.signature("errback"))
        life.journal.wait_for(old.id, "old errback")
        linked = life.end(AsyncResult(link.id, app=client))
        notes = [life.end(good), life.end(bad), life.end(retried, 2)]
        return life.anonymous([linked, *notes, sorted(life.journal.of(old.id))], good, bad, old, retried)

    linked, good, bad, retried, old = on_both(lives, ask)
    assert ["gathers", "after 0 retries", "linked"] in linked
    assert names(good) == [*ONCE, *GOOD]
    error = ["errback", "ValueError", "an error of its own", True]
    assert names(bad) == [*ONCE, "errback", *FAILED]
    assert error in bad
    assert names(retried).count("errback") == 1
    assert ["old errback", True] in old


# --- results inside tasks ---


def test_joining_within_a_task_is_refused_before_and_after_a_park(life: Life) -> None:
    life.worker.broker.needs_stored_results()
    done = life.send("unkept", 1)
    life.worker.answer(done)
    results = [life.send("joins", done.id) for _ in range(20)]
    for refused in life.worker.answers(results):
        assert [text.splitlines()[0] for text in refused] == ["Never call result.get() within a task!"] * 2


def test_joining_is_allowed_where_the_task_says_so_and_refused_again_after_it(life: Life, tmp_path: Path) -> None:
    life.worker.broker.needs_stored_results()
    done = life.send("unkept", 1)
    life.worker.answer(done)
    (tmp_path / "is there").touch()
    results = [
        life.send(task, done.id, *more) for task, *more in (["joins_allowed", str(tmp_path / "is there")], ["joins"])
    ]
    allowed, refused = life.worker.answers(results)
    assert (allowed, len(refused)) == ([2, 2], 2)


def test_joining_is_refused_to_others_while_tasks_that_may_are_parked(lives: dict[str, Life], tmp_path: Path) -> None:
    """Celery has one flag for the whole process, and here its blocks overlap, and are left in any order."""
    lives["modelpool"].worker.broker.needs_stored_results()
    life = lives["modelpool"]
    done = life.send("unkept", 1)
    life.worker.answer(done)
    paths = [tmp_path / name for name in ("first", "second")]
    allowed = [life.send("joins_allowed", done.id, str(path)) for path in paths]
    for result, path in zip(allowed, paths, strict=True):
        life.journal.wait_for(allowed[1].id, "waits")
        assert len(life.ask("joins", done.id)) == 2
        path.touch()
        assert life.worker.answer(result) == [2, 2]
    assert len(life.ask("joins", done.id)) == 2
