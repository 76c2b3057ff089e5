"""A server that is full, or takes nothing for another reason, is away: results wait, and all arrive later."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import kombu
import pytest
import redis
from appqueues import AppQueue, app_queue, queue_name, routed
from harness import SIMULATED, Broker, StartWorker, Worker, poll
from ownserver import RabbitServer, RedisServer

ENABLED = {"LEGIT_WORKER_ENABLED": "1"}

#: Tasks of one app.
TASKS = 40

#: What the log says once.
WAITS = "takes nothing now"


@pytest.fixture
def own(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis that this test may fill."""
    one = RedisServer(tmp_path / "own")
    one.start()
    yield one
    one.end()


def url_of(app: str, url: str) -> dict[str, str]:
    return {f"LEGIT_WORKER_APPS__{app.upper()}__URL": url}


def send(worker: Worker, app: str, count: int = TASKS) -> list[str]:
    """Tasks for one app. Returns their ids."""
    sent = [worker.client.send_task("double", [number], headers={"app": app}) for number in range(count)]
    return [result.id for result in sent]


def check_arrived(queue: AppQueue, ids: list[str], twice: int = 0) -> None:
    """Each arrives. `twice` says how many may come twice."""
    queue.wait_for(ids)
    assert queue.duplicates() <= twice


def unacked(url: str) -> int:
    with redis.Redis.from_url(url) as server:
        return int(server.hlen("unacked"))


def letters(url: str, app: str) -> list[dict[str, Any]]:
    with redis.Redis.from_url(url) as server:
        return [json.loads(letter) for letter in server.lrange(f"legit.dead.{app}", 0, -1)]


# The app's own Redis.


def fail_to_save(own: RedisServer) -> None:
    own.ask("CONFIG", "SET", "save", "3600 1000")
    shutil.rmtree(own.folder)
    own.ask("SET", "something", "to save")
    own.ask("BGSAVE")
    poll(lambda: own.ask("INFO", "persistence")["rdb_last_bgsave_status"] == "err", "the failed save")


def save_again(own: RedisServer) -> None:
    own.folder.mkdir()
    own.ask("CONFIG", "SET", "stop-writes-on-bgsave-error", "no")


WAYS: dict[str, tuple[Callable[[RedisServer], Any], Callable[[RedisServer], Any]]] = {
    "OOM": (RedisServer.fill, RedisServer.make_room),
    "READONLY": (
        lambda own: own.ask("REPLICAOF", "127.0.0.1", "1"),
        lambda own: own.ask("REPLICAOF", "NO", "ONE"),
    ),
    "NOREPLICAS": (
        lambda own: own.ask("CONFIG", "SET", "min-replicas-to-write", "1"),
        lambda own: own.ask("CONFIG", "SET", "min-replicas-to-write", "0"),
    ),
    "MISCONF": (fail_to_save, save_again),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_redis_that_takes_no_writes_is_away(
    start_worker: StartWorker, broker: Broker, own: RedisServer, way: str
) -> None:
    variables = SIMULATED | ENABLED | routed(broker, "alpha", "beta") | url_of("alpha", own.url)
    worker = start_worker("routed", broker=broker, environment=variables)
    alpha = AppQueue(own.url, queue_name(broker, "alpha"))
    check_arrived(alpha, send(worker, "alpha"))
    fill, empty = WAYS[way]
    fill(own)
    late, others = send(worker, "alpha"), send(worker, "beta")
    check_arrived(app_queue(broker, "beta"), others)
    worker.wait_for_log(WAITS)
    poll(lambda: worker.pool()["routing"]["apps"]["alpha"]["waiting"] == TASKS, "all to wait")
    empty(own)
    check_arrived(alpha, late)
    assert worker.pool()["routing"]["apps"]["alpha"]["dead"] == 0
    assert not AppQueue(broker.url, "legit.dead.alpha").exists()


# The broker's.


def test_a_full_broker_keeps_its_tasks_until_it_takes_their_results(
    start_worker: StartWorker, broker: Broker, own: RedisServer
) -> None:
    """Longer than an envelope waits for a server: its dead letter would go to the same one."""
    on_it = replace(broker, url=own.url)
    retry = {"LEGIT_WORKER_RESULT_RETRY_SECONDS": "1"}
    worker = start_worker("routed", broker=on_it, environment=SIMULATED | ENABLED | routed(on_it, "alpha") | retry)
    ids = send_for_later(worker, own)
    own.fill()
    worker.wait_for_log(WAITS)
    poll_backend(broker, ids)
    assert unacked(own.url) == TASKS
    own.make_room()
    check_arrived(app_queue(on_it, "alpha"), ids)
    poll(lambda: unacked(own.url) == 0, "all tasks to be acked")
    assert letters(own.url, "alpha") == []


def test_a_full_broker_keeps_tasks_whose_results_it_can_not_take_as_dead_letters(
    start_worker: StartWorker, broker: Broker, own: RedisServer
) -> None:
    on_it = replace(broker, url=own.url)
    away = url_of("alpha", "redis://127.0.0.1:1/0") | {"LEGIT_WORKER_RESULT_RETRY_SECONDS": "0"}
    worker = start_worker("routed", broker=on_it, environment=SIMULATED | ENABLED | routed(on_it, "alpha") | away)
    ids = send_for_later(worker, own)
    own.fill()
    worker.wait_for_log(WAITS)
    poll_backend(broker, ids)
    assert unacked(own.url) == TASKS
    own.make_room()
    poll(lambda: {letter["id"] for letter in letters(own.url, "alpha")} == set(ids), "all dead letters")
    poll(lambda: unacked(own.url) == 0, "all tasks to be acked")


def test_one_full_server_for_all_loses_nothing(
    start_worker: StartWorker, broker: Broker, own: RedisServer, tmp_path: Path
) -> None:
    """Broker, results and the app's queue, with more tasks than the worker holds. Their producer is done by then."""
    on_it = replace(broker, url=own.url, backend=own.url)
    worker = start_worker("routed", broker=on_it, environment=SIMULATED | ENABLED | routed(on_it, "alpha"))
    alpha = app_queue(on_it, "alpha")
    check_arrived(alpha, send(worker, "alpha"))
    ids = send(worker, "alpha", 10 * TASKS)
    own.fill()
    worker.wait_for_log("takes no")
    alpha.take()
    own.make_room()
    check_arrived(alpha, ids)
    poll(lambda: unacked(own.url) == 0, "all tasks to be acked")
    assert letters(own.url, "alpha") == []


def send_for_later(worker: Worker, own: RedisServer) -> list[str]:
    """Tasks that begin a little later. They are all in the worker when this returns."""
    sent = [worker.client.send_task("double", [1], headers={"app": "alpha"}, countdown=5) for _ in range(TASKS)]
    poll(lambda: unacked(own.url) == TASKS, "all tasks to be in the worker")
    return [result.id for result in sent]


def poll_backend(broker: Broker, ids: list[str]) -> None:
    """All have their stock results, on another server."""
    with redis.Redis.from_url(broker.backend) as backend:
        poll(lambda: all(backend.mget([f"celery-task-meta-{one}" for one in ids])), "all stock results")


# RabbitMQ.


def test_a_rabbitmq_without_memory_is_away(start_worker: StartWorker, broker: Broker, rabbit: RabbitServer) -> None:
    variables = SIMULATED | ENABLED | routed(broker, "alpha", "beta") | url_of("alpha", rabbit.url)
    worker = start_worker("routed", broker=broker, environment=variables)
    alpha = AppQueue(rabbit.url, queue_name(broker, "alpha"))
    check_arrived(alpha, send(worker, "alpha"))
    rabbit.control("set_vm_memory_high_watermark", "0.0000001")
    late, others = send(worker, "alpha"), send(worker, "beta")
    check_arrived(app_queue(broker, "beta"), others)
    worker.wait_for_log(WAITS)
    poll(lambda: worker.pool()["routing"]["apps"]["alpha"]["waiting"] == TASKS, "all to wait")
    poll(lambda: "its memory or disk is full" in worker.log, "the reason")
    rabbit.control("set_vm_memory_high_watermark", "0.6")
    # RabbitMQ keeps what it was sent when it became full, and takes it later.
    check_arrived(alpha, late, twice=1)
    assert worker.pool()["routing"]["apps"]["alpha"]["dead"] == 0


def test_a_full_queue_of_rabbitmq_takes_all_in_time_and_holds_up_no_other(
    start_worker: StartWorker, rabbitmq: Broker
) -> None:
    with kombu.Connection(rabbitmq.url) as connection:
        name = queue_name(rabbitmq, "alpha")
        arguments = {"x-max-length": 5, "x-overflow": "reject-publish"}
        kombu.Queue(name, queue_arguments=arguments)(connection.default_channel).queue_declare()
    worker = start_worker(
        "routed", broker=rabbitmq, environment=SIMULATED | ENABLED | routed(rabbitmq, "alpha", "beta")
    )
    ids, others = send(worker, "alpha"), send(worker, "beta")
    check_arrived(app_queue(rabbitmq, "beta"), others)
    worker.wait_for_log(WAITS)
    poll(lambda: worker.pool()["routing"]["apps"]["alpha"]["waiting"] == TASKS - 5, "all others to wait")
    check_arrived(app_queue(rabbitmq, "alpha"), ids)
    assert worker.pool()["routing"]["apps"]["alpha"] == {"sent": TASKS, "failed": 0, "dead": 0, "waiting": 0}
