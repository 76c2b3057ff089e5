"""`celery legit dead …`: whatever was given up is listed, shown, sent again and dropped by one command."""

from __future__ import annotations

import base64
import json
import subprocess
import uuid
from typing import Any

import kombu
import pytest
import redis
from appqueues import AppQueue, queue_name, routed
from commands import celery
from harness import ANSWER_SECONDS, SIMULATED, Broker, StartWorker, Worker, WorkerDiedError, poll

ENABLED = {"LEGIT_WORKER_ENABLED": "1"}

ENVELOPE = {
    "v": 1, "id": "an-old-one", "task": "double", "app": "alpha", "status": "SUCCESS", "result": {"dead": {"x": 1}},
    "error": None, "attempt": 1, "model": None, "meta": None, "queued_at": None, "started_at": None,
    "finished_at": "2026-01-01T00:00:00.000Z", "worker": "gpu-1",
}  # fmt: skip


def dead(broker: Broker, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command, as an operator types it in a narrow terminal."""
    return celery("routed", "legit", "dead", *words, broker=broker, settings=SIMULATED | ENABLED | variables)


def good(broker: Broker, *words: str, **variables: str) -> str:
    finished = dead(broker, *words, **variables)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def listed(broker: Broker, *words: str, **variables: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(good(broker, "list", "--json", *words, **variables))
    return found


def record(task_id: str, queue: str, message: dict[str, Any], **more: str) -> dict[str, Any]:
    """What a worker keeps of a message that was delivered too often."""
    message["headers"]["legit_deliveries"] = 5
    whence = {"queue": queue, "exchange": queue, "routing_key": queue}
    why = {"reason": "delivered 5 times and never done", "deliveries": 5, "at": "2026-01-02T03:04:05.678Z"}
    return {"v": 1, "id": task_id, "task": "double", **whence, **why, "message": message, **more}


def poisoned(broker: Broker, server: redis.Redis, **options: Any) -> str:
    """A message that was taken from its queue, and its record. Returns the task's id."""
    task_id = broker.client().send_task("double", [21], **options).id
    (key,) = [key for key in server.keys(f"{broker.queue}*") if server.type(key) == b"list"]
    raw = server.lpop(key)
    server.rpush("legit.dead", json.dumps(record(task_id, broker.queue, json.loads(raw))))
    return str(task_id)


@pytest.fixture
def server(broker: Broker) -> Any:
    """The broker's server, as `redis-cli` sees it."""
    if not broker.url.startswith("redis"):
        pytest.skip("needs Redis as the broker")
    with redis.Redis.from_url(broker.url) as client:
        yield client


def test_all_kinds_are_listed_and_shown(broker: Broker, server: redis.Redis) -> None:
    poison = poisoned(broker, server)
    server.rpush("legit.unreadable", b"\xff\x00 garbage")
    server.rpush("legit.dead.alpha", json.dumps(ENVELOPE))
    server.rpush("legit.dead.nobodys", json.dumps(ENVELOPE | {"app": "nobodys", "id": "nobodys-own"}))
    settings = routed(broker, "alpha")
    letters = {letter["kind"]: letter for letter in listed(broker, **settings) if letter["app"] != "nobodys"}
    assert letters["poisoned"] == {
        "kind": "poisoned", "id": poison, "task": "double", "app": None, "queue": broker.queue, "status": None,
        "reason": "delivered 5 times and never done", "deliveries": 5, "at": "2026-01-02T03:04:05.678Z",
    }  # fmt: skip
    assert letters["result"]["id"] == "an-old-one"
    assert [letter["id"] for letter in listed(broker, "ALPHA", **settings)] == ["an-old-one"]
    assert [letter["id"] for letter in listed(broker, "nobodys", "poisoned", **settings)] == [poison, "nobodys-own"]
    assert len(listed(broker, "--limit", "2", **settings)) == 2
    table = good(broker, "list", **settings)
    assert all(letter["id"] in table for letter in letters.values())
    assert "in all: 1 poisoned, 1 unreadable, 1 results of alpha, 1 results of nobodys" in table
    assert all(len(line) <= 80 for line in table.splitlines())
    shown = json.loads(good(broker, "show", poison, "--json", **settings))
    assert json.loads(base64.b64decode(shown["content"]["message"]["body"]))[0] == [21]
    assert "reason: delivered 5 times and never done" in good(broker, "show", poison, **settings)
    unreadable = good(broker, "show", letters["unreadable"]["id"], **settings)
    assert r"\xff\x00 garbage" in unreadable


def test_what_a_stranger_wrote_is_shown_as_it_is(broker: Broker, server: redis.Redis) -> None:
    """No markup, and nothing that moves a terminal's cursor."""
    odd = "[red]\x1b[2J[/]"
    server.rpush("legit.dead", json.dumps({"id": odd, "task": odd, "reason": odd, "message": {"body": "\x9b2J"}}))
    server.rpush("legit.dead", "no JSON \x1b[2J")
    server.rpush("legit.dead.alpha", json.dumps(ENVELOPE | {"id": odd}))
    settings = routed(broker, "alpha")
    for words in (["list"], ["show", "poisoned", "alpha"]):
        shown = good(broker, *words, **settings)
        assert r"[red]\x1b[2J[/]" in shown
        assert not {"\x1b", "\x9b"}.intersection(shown)


def test_the_doctor_counts_them(broker: Broker, server: redis.Redis) -> None:
    def seen() -> list[dict[str, Any]]:
        finished = celery("routed", "legit", "doctor", "--json", broker=broker, settings=SIMULATED | ENABLED)
        return [one for one in json.loads(finished.stdout) if "dead letters" in one["seen"]]

    assert [one["level"] for one in seen()] == ["ok"]
    server.rpush("legit.unreadable", b"garbage", b"more of it")
    (finding,) = seen()
    assert (finding["level"], finding["seen"]) == ("warning", "dead letters: 2 unreadable")
    assert "celery legit dead list" in finding["fix"]


def test_a_task_that_killed_its_worker_is_found_and_given_another_chance(
    start_worker: StartWorker, broker: Broker, server: redis.Redis
) -> None:
    """Replayed, its message counts from zero: it kills one more worker before it is a dead letter again."""
    limits = {"LEGIT_WORKER_MAX_DELIVERIES": "1", "LEGIT_WORKER_LEASE_SECONDS": "2"}
    environment = SIMULATED | ENABLED | limits
    killer = broker.client().send_task("dies", ["killer"])
    first = start_worker("held", broker=broker, environment=environment, wait=False)
    wait_for_death(first)
    second = start_worker("held", broker=broker, environment=environment)
    poll(lambda: server.llen("legit.dead") == 1, "the dead letter")
    (letter,) = listed(broker)
    assert (letter["id"], letter["task"], letter["queue"], letter["deliveries"]) == (
        killer.id, "dies", broker.queue, 1,
    )  # fmt: skip
    good(broker, "replay", killer.id)
    wait_for_death(second)
    start_worker("held", broker=broker, environment=environment)
    poll(lambda: [one["id"] for one in listed(broker)] == [killer.id], "the dead letter again")


def wait_for_death(worker: Worker) -> None:
    with pytest.raises(WorkerDiedError, match="exit code 9"):
        worker.wait_for_log("what it never says")


@pytest.mark.parametrize("priority", [None, 6])
def test_a_poisoned_message_that_is_replayed_runs(
    start_worker: StartWorker, broker: Broker, server: redis.Redis, priority: int | None
) -> None:
    task_id = poisoned(broker, server, priority=priority)
    other = poisoned(broker, server)
    assert good(broker, "replay", task_id).strip() == "1 sent again"
    assert [letter["id"] for letter in listed(broker)] == [other]
    (key,) = [key for key in server.keys(f"{broker.queue}*") if server.type(key) == b"list"]
    assert b"legit_deliveries" not in server.lindex(key, 0)
    worker = start_worker("routed", broker=broker, environment=SIMULATED | ENABLED)
    assert worker.client.AsyncResult(task_id).get(timeout=ANSWER_SECONDS) == 42
    assert good(broker, "drop", other).strip() == "1 dropped"
    assert good(broker, "list").strip() == "no dead letters"


def test_an_unreadable_one_is_replayed_to_a_queue_that_is_named(broker: Broker, server: redis.Redis) -> None:
    server.rpush("legit.unreadable", b"garbage")
    refused = dead(broker, "replay", "unreadable")
    assert refused.returncode != 0
    assert "--queue" in refused.stderr
    assert server.llen("legit.unreadable") == 1
    replayed = dead(broker, "replay", "unreadable", "--queue", "elsewhere")
    assert (replayed.returncode, replayed.stdout.strip()) == (0, "1 sent again")
    assert "no worker that answers takes tasks from elsewhere: " in replayed.stderr
    assert server.lrange("elsewhere", 0, -1) == [b"garbage"]
    assert not server.exists("legit.unreadable")


def test_keys_have_the_brokers_prefix(broker: Broker, server: redis.Redis) -> None:
    options = {"PROJECT_TRANSPORT_OPTIONS": json.dumps({"global_keyprefix": "here."})}
    message = {"body": "", "headers": {}, "properties": {"delivery_info": {}}}
    server.rpush("here.legit.dead", json.dumps(record("the-id", "a-queue", message)))
    good(broker, "replay", "the-id", **options)
    assert server.llen("here.a-queue") == 1
    assert not server.exists("here.legit.dead")


def test_nothing_is_taken_without_a_word(broker: Broker, server: redis.Redis) -> None:
    server.rpush("legit.unreadable", b"garbage")
    for command in ("drop", "replay"):
        assert "--all" in dead(broker, command).stderr
        unknown = dead(broker, command, "nosuch")
        assert unknown.returncode != 0
        assert "'nosuch'" in unknown.stderr
        assert len(unknown.stderr.splitlines()) == 1
    assert server.llen("legit.unreadable") == 1
    assert good(broker, "drop", "--all").strip() == "1 dropped"


def test_a_replayed_result_goes_where_its_message_asked_for_and_holds_up_no_other(
    start_worker: StartWorker, broker: Broker, server: redis.Redis
) -> None:
    prefix = f"{broker.queue}.answers."
    named = {"LEGIT_WORKER_APPS__ALPHA__REPLY_TO_PREFIX": prefix, "LEGIT_WORKER_APP_FROM": "reply_to,header:app"}
    settings = routed(broker, "alpha") | named
    away = {"LEGIT_WORKER_APPS__ALPHA__URL": "redis://127.0.0.1:1/0", "LEGIT_WORKER_RESULT_RETRY_SECONDS": "0"}
    worker = start_worker("routed", broker=broker, environment=SIMULATED | ENABLED | settings | away)
    bad = worker.client.send_task("double", [1], reply_to=f"{prefix}bad")
    poll(lambda: server.llen("legit.dead.alpha") == 1, "the first letter")
    asked = worker.client.send_task("double", [2], reply_to=f"{prefix}mine")
    usual = worker.client.send_task("double", [3], headers={"app": "alpha"})
    poll(lambda: server.llen("legit.dead.alpha") == 3, "all letters")
    server.rpush("legit.dead.alpha", json.dumps(ENVELOPE))
    letters = {letter["id"]: letter for letter in listed(broker, "results", **settings)}
    assert letters[asked.id]["queue"] == f"{prefix}mine"
    assert letters[usual.id]["queue"] is None
    assert "did not take it in time" in letters[usual.id]["reason"]

    server.set(f"{prefix}bad", "no list")
    refused = dead(broker, "replay", "alpha", **settings)
    assert refused.returncode != 0
    assert "3 sent again, 1 kept" in refused.stderr
    mine, own = AppQueue(broker.url, f"{prefix}mine"), AppQueue(broker.url, queue_name(broker, "alpha"))
    mine.wait_for([asked.id])
    own.wait_for([usual.id, "an-old-one"])
    assert {"dead"}.isdisjoint(mine.seen[0]), "the app gets the envelope as it was"
    assert next(one for one in own.seen if one["id"] == "an-old-one") == ENVELOPE
    assert [letter["id"] for letter in listed(broker, **settings)] == [bad.id]

    server.delete(f"{prefix}bad")
    changed = settings | {"LEGIT_WORKER_APPS__ALPHA__REPLY_TO_PREFIX": "other."}
    assert "REPLY_TO_PREFIX" in dead(broker, "replay", "--all", **changed).stderr
    good(broker, "replay", "--all", **settings)
    AppQueue(broker.url, f"{prefix}bad").wait_for([bad.id])


def test_a_server_that_is_away_keeps_only_its_own_letters(broker: Broker, server: redis.Redis) -> None:
    away = {"LEGIT_WORKER_APPS__BETA__URL": "redis://127.0.0.1:1/0"}
    settings = routed(broker, "alpha", "beta") | away
    for app in ("beta", "alpha"):
        server.rpush(f"legit.dead.{app}", *(json.dumps(ENVELOPE | {"app": app, "id": f"{app}{n}"}) for n in range(40)))
    finished = dead(broker, "replay", "--all", **settings)
    assert finished.returncode != 0
    assert "40 sent again, 40 kept: the server went away" in finished.stderr
    assert server.llen("legit.dead.beta") == 40
    assert not server.exists("legit.dead.alpha")


def test_poisoned_messages_on_rabbitmq_are_listed_replayed_and_dropped(
    start_worker: StartWorker, rabbitmq: Broker
) -> None:
    ids = [str(uuid.uuid4()) for _ in range(3)]
    body = base64.b64encode(json.dumps([[21], {}, {}]).encode()).decode()
    with kombu.Connection(rabbitmq.url) as connection:
        channel = connection.default_channel
        kombu.Queue("legit.dead", durable=True)(channel).queue_declare()
        for task_id in ids:
            message = {
                "body": body, "content-type": "application/json", "content-encoding": "utf-8",
                "headers": {"id": task_id, "task": "double", "x-delivery-count": 5},
                "properties": {"correlation_id": task_id, "body_encoding": "base64", "delivery_info": {}},
            }  # fmt: skip
            kombu.Producer(channel, routing_key="legit.dead").publish(record(task_id, rabbitmq.queue, message))
    mine = {letter["id"]: letter for letter in listed(rabbitmq, "poisoned") if letter["id"] in ids}
    assert list(mine) == ids
    worker = start_worker("routed", broker=rabbitmq, environment=SIMULATED | ENABLED)
    assert good(rabbitmq, "replay", ids[1]).strip() == "1 sent again"
    assert worker.client.AsyncResult(ids[1]).get(timeout=ANSWER_SECONDS) == 42
    assert good(rabbitmq, "drop", ids[0], ids[2]).strip() == "2 dropped"
    assert not {letter["id"] for letter in listed(rabbitmq)}.intersection(ids)
