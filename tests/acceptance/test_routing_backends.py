"""Whatever backend a project has, it works as it did, and its apps are told."""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections import Counter
from dataclasses import replace
from typing import Any

import kombu
import pytest
import redis
from appqueues import Apps, app_queue, queue_name, routed
from celery import chord, group
from celery.exceptions import TimeoutError as CeleryTimeoutError
from celery.result import GroupResult
from commands import celery
from harness import SIMULATED, Broker, StartWorker, poll

ENABLED = {"LEGIT_WORKER_ENABLED": "1"}


def start_apps(start: StartWorker, broker: Broker, **more: str) -> Apps:
    worker = start("routed", broker=broker, environment=SIMULATED | ENABLED | routed(broker, "alpha") | more)
    return Apps(worker, {"alpha": app_queue(broker, "alpha")})


@pytest.fixture(scope="module", params=["redis", "database"])
def apps(
    request: pytest.FixtureRequest,
    start_module_worker: StartWorker,
    servers: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Apps:
    """A worker whose results are in Redis, and one whose are in a SQL database."""
    broker = servers.fresh()
    if request.param == "database":
        broker = replace(broker, backend=f"db+sqlite:///{tmp_path_factory.mktemp('database')}/results.sqlite")
    return start_apps(start_module_worker, broker)


def test_a_backend_does_what_it_did_and_the_app_is_told(apps: Apps) -> None:
    good, bad = apps.send("work", 21), apps.send("fails")
    assert good.get(timeout=20) == 42
    with pytest.raises(ValueError, match="it failed"):
        bad.get(timeout=20)
    assert bad.traceback
    told = {envelope["id"]: envelope["status"] for envelope in apps.told("alpha", good.id, bad.id)}
    assert told == {good.id: "SUCCESS", bad.id: "FAILURE"}
    good.forget()
    assert apps.client.AsyncResult(good.id).status == "PENDING"


def test_the_children_of_a_task_are_known(apps: Apps) -> None:
    sent = apps.send("delays", 4)
    assert sent.get(timeout=20)
    (child,) = apps.client.AsyncResult(sent.id).children
    assert child.get(timeout=20) == 8
    assert {envelope["id"] for envelope in apps.told("alpha", sent.id, child.id)} == {sent.id, child.id}


def test_a_group_is_saved_and_restored(apps: Apps) -> None:
    result = group(apps.task("work", number) for number in range(6)).apply_async()
    result.save()
    assert result.get(timeout=20) == [2 * number for number in range(6)]
    restored = GroupResult.restore(result.id, app=apps.client)
    assert restored.get(timeout=20) == [2 * number for number in range(6)]
    ids = {part.id for part in result.results}
    assert {envelope["id"] for envelope in apps.told("alpha", *ids)} == ids
    result.delete()
    assert GroupResult.restore(result.id, app=apps.client) is None


def test_of_a_chord_the_app_is_told_the_end(apps: Apps) -> None:
    result = chord((apps.task("work", number) for number in range(5)), apps.task("total")).apply_async()
    assert result.get(timeout=30) == 20
    assert [envelope["result"] for envelope in apps.told("alpha", result.id)] == [20]


def test_a_task_that_is_rejected_for_good_has_failed(apps: Apps) -> None:
    rejected = apps.send("rejects")
    apps.worker.settle([rejected])
    assert rejected.status == "FAILURE"
    (envelope,) = apps.told("alpha", rejected.id)
    assert (envelope["id"], envelope["status"]) == (rejected.id, "FAILURE")
    assert envelope["started_at"] <= envelope["finished_at"]


@pytest.mark.parametrize("kind", ["broker", "rabbitmq"])
def test_results_by_rpc_reach_the_client_and_the_app(
    request: pytest.FixtureRequest, start_worker: StartWorker, kind: str
) -> None:
    apps = start_apps(start_worker, replace(request.getfixturevalue(kind), backend="rpc://"))
    sent = [apps.send("work", number) for number in range(5)]
    assert [result.get(timeout=20) for result in sent] == [2 * number for number in range(5)]
    queue = apps.queues["alpha"]
    queue.wait_for([result.id for result in sent])
    assert len(queue.seen) == 5
    bad = apps.send("fails")
    with pytest.raises(ValueError, match="it failed"):
        bad.get(timeout=20)
    queue.wait_for([bad.id])


def test_without_a_backend_the_app_is_told_nevertheless(start_worker: StartWorker, broker: Broker) -> None:
    apps = start_apps(start_worker, replace(broker, backend="disabled://"))
    sent = apps.send("work", 3)
    apps.queues["alpha"].wait_for([sent.id])
    with pytest.raises((NotImplementedError, CeleryTimeoutError, AttributeError)):
        sent.get(timeout=0.1)


# Dead letters on RabbitMQ.


def test_dead_letters_on_rabbitmq_are_listed_replayed_and_dropped(
    start_worker: StartWorker, rabbitmq: Broker, servers: Any
) -> None:
    nowhere = "amqp://guest:guest@localhost:1//"
    away = {"LEGIT_WORKER_APPS__ALPHA__URL": nowhere, "LEGIT_WORKER_RESULT_RETRY_SECONDS": "1"}
    apps = start_apps(start_worker, rabbitmq, **away)
    sent = [apps.send("double", number) for number in range(10)]
    ids = {result.id for result in sent}
    poll(lambda: apps.counts()["apps"]["alpha"]["dead"] == 10, "ten dead letters", 60)

    def command(*arguments: str, **more: str) -> str:
        variables = SIMULATED | ENABLED | routed(rabbitmq, "alpha") | more
        finished = celery("routed", "legit", "results", *arguments, broker=rabbitmq, settings=variables, columns=200)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout

    try:
        assert {letter["id"] for letter in json.loads(command("list", "alpha", "--json"))} == ids
        assert command("replay", "alpha").strip() == "10 sent again"
        apps.queues["alpha"].wait_for(ids)
        assert json.loads(command("list", "alpha", "--json")) == []
        late = apps.send("double", 1)
        poll(lambda: late.id in command("list", "alpha"), "one more")
        assert command("drop", "alpha").strip() == "1 dropped"
        assert json.loads(command("list", "alpha", "--json")) == []
    finally:
        with kombu.Connection(rabbitmq.url) as connection:
            connection.default_channel.queue_delete("legit.dead.alpha")


# Kills, in the formats of other consumers.


@pytest.mark.parametrize("form", ["celery", "laravel"])
def test_no_job_is_missing_after_kills(start_worker: StartWorker, servers: Any, form: str) -> None:
    options = {"visibility_timeout": 1, "unacked_restore_throttle": 1, "unacked_restore_interval": 1}
    broker = replace(
        servers.fresh(), transport_options=options, environment={"PROJECT_TRANSPORT_OPTIONS": json.dumps(options)}
    )
    job = {"LEGIT_WORKER_APPS__ALPHA__FORMAT": form, "LEGIT_WORKER_APPS__ALPHA__JOB": r"App\Jobs\Ready@handle"}
    slow = {"LEGIT_WORKER_WINDOW": "50", "LEGIT_WORKER_MODELS__SIM__PATH": "0.01,0.002"}
    variables = SIMULATED | ENABLED | routed(broker, "alpha") | job | slow
    client = broker.client()
    ids = {str(uuid.uuid4()): number for number in range(300)}
    for task_id, number in ids.items():
        client.send_task("work", [number], task_id=task_id, headers={"app": "alpha"})
    name = queue_name(broker, "alpha")
    key = f"queues:{name}" if form == "laravel" else name
    with redis.Redis.from_url(broker.url) as server:
        for moment in (20, 100, 200):
            worker = start_worker("routed", broker=broker, environment=variables, wait=False)
            poll(lambda moment=moment: server.llen(key) > moment, f"{moment} jobs")
            time.sleep(0.05)
            worker.kill()
        start_worker("routed", broker=broker, environment=variables, wait=False)
        poll(lambda: {task for task, _ in jobs(server, key, form)} >= set(ids), "every task's job")
        found = jobs(server, key, form)
    assert {task for task, _ in found} == set(ids)
    names = Counter(task for task, _ in set(found))
    assert set(names.values()) == {1}, "a task's job has one name, however often it was pushed"


def jobs(server: redis.Redis, key: str, form: str) -> list[tuple[str, str]]:
    """Task id and the job's own id, of all that lie on a queue."""
    found = []
    for raw in server.lrange(key, 0, -1):
        job = json.loads(raw)
        if form == "laravel":
            found.append((job["data"]["id"], job["uuid"]))
        else:
            (envelope,), *_ = json.loads(base64.b64decode(job["body"]))
            found.append((envelope["id"], job["headers"]["id"]))
    return found
