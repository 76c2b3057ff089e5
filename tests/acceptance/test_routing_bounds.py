"""An app's queue, and its dead letters, hold no more than their bounds allow, for no longer than they allow."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import kombu
import pytest
import redis
from appqueues import AppQueue, app_queue, queue_name, routed
from harness import SIMULATED, Broker, StartWorker, Worker, poll

ENABLED = {"LEGIT_WORKER_ENABLED": "1"}

TASKS = 20

#: Nobody listens there: what goes to it becomes a dead letter at once.
NOWHERE = {"LEGIT_WORKER_APPS__ALPHA__URL": "redis://127.0.0.1:1/0", "LEGIT_WORKER_RESULT_RETRY_SECONDS": "0"}


def start(start_worker: StartWorker, broker: Broker, **more: str) -> Worker:
    settings = SIMULATED | ENABLED | routed(broker, "alpha", "beta") | more
    return start_worker("routed", broker=broker, environment=settings)


def send(worker: Worker, app: str = "alpha", count: int = TASKS) -> list[str]:
    sent = [worker.client.send_task("double", [number], headers={"app": app}) for number in range(count)]
    return [result.id for result in sent]


def counts(worker: Worker, app: str = "alpha") -> dict[str, int]:
    none = {"sent": 0, "failed": 0, "dead": 0, "waiting": 0}
    return none | worker.pool()["routing"]["apps"].get(app, {})  # before its first result it is not there


@pytest.fixture
def server(broker: Broker) -> Iterator[redis.Redis]:
    """The broker's server, as `redis-cli` sees it."""
    with redis.Redis.from_url(broker.url) as client:
        yield client


@contextmanager
def dead_letters_removed(rabbitmq: Broker) -> Iterator[Any]:
    """RabbitMQ is not this test's own."""
    with kombu.Connection(rabbitmq.url) as connection:
        connection.default_channel.queue_delete("legit.dead.bounded")
        try:
            yield connection.default_channel
        finally:
            connection.default_channel.queue_delete("legit.dead.bounded")


def test_a_full_queue_on_redis_makes_results_wait(
    start_worker: StartWorker, broker: Broker, server: redis.Redis
) -> None:
    """The bound is for all apps, and beta has its own."""
    own = {"LEGIT_WORKER_QUEUE_MAX_LENGTH": "5", "LEGIT_WORKER_APPS__BETA__QUEUE_MAX_LENGTH": "0"}
    worker = start(start_worker, broker, **own)
    ids, others = send(worker), send(worker, "beta")
    poll(lambda: server.llen(queue_name(broker, "beta")) == TASKS, "beta's results")
    app_queue(broker, "beta").wait_for(others)
    poll(lambda: counts(worker)["waiting"] == TASKS - 5, "all others to wait")
    assert server.llen(queue_name(broker, "alpha")) == 5
    alpha = app_queue(broker, "alpha")
    alpha.wait_for(ids)
    assert alpha.duplicates() == 0
    assert counts(worker) == {"sent": TASKS, "failed": 0, "dead": 0, "waiting": 0}


def test_a_result_that_waits_too_long_for_room_is_a_dead_letter(
    start_worker: StartWorker, broker: Broker, server: redis.Redis
) -> None:
    own = {"LEGIT_WORKER_APPS__ALPHA__QUEUE_MAX_LENGTH": "5", "LEGIT_WORKER_RESULT_RETRY_SECONDS": "0"}
    worker = start(start_worker, broker, **own)
    send(worker)
    poll(lambda: counts(worker)["dead"] == TASKS - 5, "the dead letters")
    poll(lambda: server.llen("legit.dead.alpha") == TASKS - 5, "the dead letters on the broker")
    assert "QUEUE_MAX_LENGTH allows 5" in json.loads(server.lindex("legit.dead.alpha", 0))["dead"]["reason"]


def test_under_a_stock_pool_a_full_queue_holds_up_nobody(
    start_worker: StartWorker, broker: Broker, server: redis.Redis
) -> None:
    """Such a pool can run no other task meanwhile, so what has no room becomes a dead letter at once."""
    own = {"LEGIT_WORKER_APPS__ALPHA__QUEUE_MAX_LENGTH": "5", "LEGIT_WORKER_ENABLED": "0"}
    shim = f"legit_worker.routing:RoutingBackend+{broker.backend}"
    worker = start(start_worker, replace(broker, backend=shim), **own)
    ids, others = send(worker), send(worker, "beta")
    app_queue(broker, "beta").wait_for(others)
    letters = [json.loads(letter)["id"] for letter in server.lrange("legit.dead.alpha", 0, -1)]
    assert letters == ids[5:]


@pytest.mark.parametrize("form", ["json", "celery", "laravel"])
def test_results_that_are_too_old_leave_a_queue_on_redis(
    start_worker: StartWorker, broker: Broker, server: redis.Redis, form: str
) -> None:
    job = {"LEGIT_WORKER_APPS__ALPHA__FORMAT": form, "LEGIT_WORKER_APPS__ALPHA__JOB": "job@handle"}
    worker = start(start_worker, broker, LEGIT_WORKER_APPS__ALPHA__QUEUE_MAX_SECONDS="60", **job)
    name = queue_name(broker, "alpha")
    key = f"queues:{name}" if form == "laravel" else name
    push = server.lpush if form == "celery" else server.rpush
    for age in (1000, 500, 30):
        push(key, entry(form, age))
    push(key, b"the app's own")
    for age in (1000, 500):
        push(key, entry(form, age))
    send(worker, count=1)
    poll(lambda: server.llen(key) == 5, "the two oldest to be gone, and the new one to be there")
    assert entry(form, 30)[:40] in [raw[:40] for raw in server.lrange(key, 0, -1)]
    assert b"the app's own" in server.lrange(key, 0, -1), "behind an entry that is not ours nothing is removed"


def entry(form: str, age: float) -> bytes:
    """A result of some seconds ago."""
    at = datetime.now(timezone.utc) - timedelta(seconds=age)
    envelope = {"v": 1, "id": f"{age} s ago", "finished_at": at.isoformat().replace("+00:00", "Z")}
    if form == "laravel":
        return json.dumps({"uuid": "x", "data": envelope}).encode()
    if form == "celery":
        body = base64.b64encode(json.dumps([[envelope], {}, {}]).encode()).decode()
        return json.dumps({"body": body, "properties": {}}).encode()
    return json.dumps(envelope).encode()


def test_of_too_many_dead_letters_on_redis_the_oldest_go(
    start_worker: StartWorker, broker: Broker, server: redis.Redis
) -> None:
    worker = start(
        start_worker, broker, LEGIT_WORKER_DEAD_MAX_LENGTH="3", LEGIT_WORKER_DEAD_MAX_SECONDS="60", **NOWHERE
    )
    server.rpush("legit.dead.alpha", entry("json", 1000))
    for _ in range(5):
        (last,) = send(worker, count=1)
        # The list is empty for a moment: the old letter goes before the new one comes.
        poll(lambda last=last: last.encode() in (server.lindex("legit.dead.alpha", -1) or b""), "the letter")  # type: ignore[misc]
    assert server.llen("legit.dead.alpha") == 3
    assert b"1000 s ago" not in b"".join(server.lrange("legit.dead.alpha", 0, -1))


def test_queues_that_are_declared_on_rabbitmq_have_the_bounds(start_worker: StartWorker, rabbitmq: Broker) -> None:
    own = {"LEGIT_WORKER_APPS__ALPHA__QUEUE_MAX_LENGTH": "5", "LEGIT_WORKER_APPS__BETA__QUEUE_MAX_SECONDS": "0.5"}
    worker = start(start_worker, rabbitmq, **own)
    ids, others = send(worker), send(worker, "beta")
    poll(lambda: counts(worker)["waiting"] == TASKS - 5, "all others to wait")
    alpha = app_queue(rabbitmq, "alpha")
    alpha.wait_for(ids)
    assert alpha.duplicates() == 0
    assert len(others) == TASKS
    poll(lambda: counts(worker, "beta")["sent"] == TASKS, "beta's results")
    poll(lambda: messages(rabbitmq, queue_name(rabbitmq, "beta")) == 0, "beta's results to be too old")


def test_of_too_many_dead_letters_on_rabbitmq_the_oldest_go(start_worker: StartWorker, rabbitmq: Broker) -> None:
    app = "LEGIT_WORKER_APPS__BOUNDED__"
    own = {f"{app}RESULT_ROUTING": "on", f"{app}DEAD_MAX_LENGTH": "3", f"{app}URL": "redis://127.0.0.1:1/0"}
    with dead_letters_removed(rabbitmq):
        worker = start(start_worker, rabbitmq, **NOWHERE | own)
        ids = send(worker, "bounded", 6)
        poll(lambda: counts(worker, "bounded")["dead"] == 6, "all dead letters")
        poll(lambda: counts(worker, "bounded")["waiting"] == 0, "all of them on the broker")
        letters = AppQueue(rabbitmq.url, "legit.dead.bounded").take()
        assert len(letters) == 3
        assert {letter["id"] for letter in letters} < set(ids)


def messages(rabbitmq: Broker, queue: str) -> int | None:
    with kombu.Connection(rabbitmq.url) as connection, suppress(connection.channel_errors):
        return int(connection.default_channel.queue_declare(queue, passive=True).message_count)
    return None
