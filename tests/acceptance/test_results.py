"""Results on Redis: what is stored, in which order, and what happens while the result backend takes nothing.

The broker and the result backend are two servers, so that one goes away without the other. Clients that send have no
result backend: they would wait for it.
"""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import redis
from appqueues import AppQueue, Apps, app_queue, queue_name, routed
from celery import chord
from harness import ANSWER_SECONDS, INSPECT_SECONDS, LATE, SIMULATED, Broker, StartWorker, Worker, poll
from ownserver import Server

ENABLED = {"LEGIT_WORKER_ENABLED": "1"}

#: Tasks whose results wait for the backend.
TASKS = 20


@dataclass
class Stored:
    """A worker, and a result backend of its own."""

    worker: Worker
    backend: Server
    #: The characters of the worker's log that are of tests before this one.
    before: int = 0

    def __post_init__(self) -> None:
        self.client = replace(self.worker.broker, backend="disabled://").client()
        self.client.conf.control_exchange = self.worker.client.conf.control_exchange

    def send(self, task: str, *names: str, **options: Any) -> list[str]:
        """Send one task for each name. Returns their ids."""
        return [self.client.send_task(task, [name], **options).id for name in names]

    def metas(self, ids: list[str]) -> list[Any]:
        """What the backend has of these tasks, None for those that it does not know."""
        with redis.Redis.from_url(self.backend.url) as server:
            return [meta and json.loads(meta) for meta in server.mget([f"celery-task-meta-{one}" for one in ids])]

    def statuses(self, ids: list[str]) -> Counter[str]:
        """How many of these tasks are in which state."""
        return Counter(meta["status"] if meta else "PENDING" for meta in self.metas(ids))

    def wait_for(self, status: str, ids: list[str]) -> None:
        """Until all have this state."""
        poll(lambda: self.statuses(ids)[status] == len(ids), f"{len(ids)} tasks with {status}")

    @property
    def log(self) -> str:
        """What the worker wrote in this test."""
        return self.worker.log[self.before :]

    @property
    def runs(self) -> Counter[str]:
        """How often each task ran."""
        return Counter(re.findall(r"\bran (\S+)$", self.log, re.MULTILINE))

    def wait_for_runs(self, *names: str) -> None:
        """Until all have run."""
        poll(lambda: set(names) <= set(self.runs), f"{len(names)} tasks to run")

    def answers(self) -> bool:
        """Whether the worker answers remote control."""
        return bool(self.worker.client.control.ping([self.worker.name], timeout=INSPECT_SECONDS))

    def unacked(self) -> int:
        """How many messages of its queue the worker holds. Workers of other tests may have left theirs."""
        queue = json.dumps(self.worker.broker.queue).encode()
        with redis.Redis.from_url(self.worker.broker.url) as server:
            return sum(queue in noted for noted in server.hvals("unacked"))


def start(start_worker: StartWorker, broker: Broker, backend: Server, conf: Any = None, **more: str) -> Stored:
    """A worker; `conf` has more of its project's settings. By default, a task stores nothing before it ends."""
    settings = {"task_track_started": False} | (conf or {})
    variables = SIMULATED | ENABLED | {"PROJECT_CONF": json.dumps(settings)} | more
    return Stored(start_worker("counted", broker=replace(broker, backend=backend.url), environment=variables), backend)


@pytest.fixture(autouse=True)
def broker_on_redis(broker: Broker) -> None:
    """What a worker holds is looked up there."""
    if not broker.url.startswith("redis"):
        pytest.skip("the broker is not Redis")


@pytest.fixture
def stored(start_worker: StartWorker, broker: Broker, server: Server) -> Stored:
    """A worker on the common broker, with a result backend that the test may stop."""
    return start(start_worker, broker, server)


@pytest.fixture(scope="module")
def lasting(
    start_module_worker: StartWorker, servers: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stored]:
    """A worker, and a result backend of its own, for tests that leave both as they were."""
    server = Server(tmp_path_factory.mktemp("lasting"))
    server.start()
    yield start(start_module_worker, servers.fresh(), server)
    server.end()


@pytest.fixture
def common(lasting: Stored) -> Stored:
    """The same, as this test finds it."""
    return replace(lasting, before=len(lasting.worker.log))


def command(*words: str) -> Callable[[Server], None]:
    """Send a server a command."""

    def run(server: Server) -> None:
        with redis.Redis.from_url(server.url) as client:
            client.execute_command(*words)

    return run


#: The command that changes the rights of the user that everybody is.
USER = ("ACL", "SETUSER", "default")

#: How a result backend stops taking results, and how it goes on.
OUTAGES: dict[str, tuple[Callable[[Server], None], Callable[[Server], None]]] = {
    "stopped": (Server.stop, Server.start),
    "frozen": (Server.freeze, Server.thaw),
    "full": (command("CONFIG", "SET", "maxmemory", "1"), command("CONFIG", "SET", "maxmemory", "0")),
    "a replica": (command("REPLICAOF", "127.0.0.1", "1"), command("REPLICAOF", "NO", "ONE")),
    "without replicas": (
        command("CONFIG", "SET", "min-replicas-to-write", "1"),
        command("CONFIG", "SET", "min-replicas-to-write", "0"),
    ),
    "paused": (command("CLIENT", "PAUSE", "600000", "WRITE"), command("CLIENT", "UNPAUSE")),
    "no right to store": (command(*USER, "-setex", "-set"), command(*USER, "+setex", "+set")),
    "no right to tell": (command(*USER, "resetchannels"), command(*USER, "allchannels")),
    "no right to look": (command(*USER, "-get", "-mget"), command(*USER, "+get", "+mget")),
}


@pytest.mark.parametrize("outage", OUTAGES)
def test_tasks_wait_for_the_result_backend_and_run_once(common: Stored, outage: str) -> None:
    away, back = OUTAGES[outage]
    away(common.backend)
    names = [f"task{number}" for number in range(TASKS)]
    ids = common.send("counted", *names[::2]) + common.send("computed", *names[1::2])
    common.wait_for_runs(*names)
    poll(lambda: common.worker.pool()["parked"] == TASKS, "all tasks to wait")
    assert all(common.answers() for _ in range(3))
    assert common.unacked() == TASKS, "what is not stored is not acked"
    back(common.backend)
    common.wait_for("SUCCESS", ids)
    poll(lambda: common.unacked() == 0, "all to be acked")
    assert common.runs == Counter(names)
    assert "Connection to broker lost" not in common.log


def test_tasks_whose_start_is_stored_begin_once_the_backend_is_back(
    start_worker: StartWorker, broker: Broker, server: Server
) -> None:
    stored = start(start_worker, broker, server, {"task_track_started": True})
    server.stop()
    names = [f"task{number}" for number in range(TASKS)]
    ids = stored.send("counted", *names)
    poll(lambda: stored.worker.pool()["parked"] == TASKS, "all tasks to wait")
    assert stored.runs == {}
    server.start()
    stored.wait_for("SUCCESS", ids)
    assert stored.runs == Counter(names)


def test_a_result_that_is_too_large_for_the_server_fails_alone(stored: Stored) -> None:
    command("CONFIG", "SET", "proto-max-bulk-len", "1mb")(stored.backend)
    names = [f"task{number}" for number in range(TASKS)]
    ids = stored.send("counted", *names[::2])
    large = stored.send("large", "large")
    ids += stored.send("counted", *names[1::2])
    stored.wait_for("SUCCESS", ids)
    stored.wait_for("FAILURE", large)
    assert stored.metas(large)[0]["result"]["exc_type"] == "BackendStoreError"
    assert stored.runs == Counter([*names, "large"])
    poll(lambda: stored.unacked() == 0, "all to be acked")


def test_a_state_that_the_server_takes_late_leaves_a_success_alone(stored: Stored) -> None:
    """Another worker's SUCCESS comes between this worker's look and its own FAILURE."""
    success = json.dumps({"status": "SUCCESS", "result": "elsewhere", "traceback": None, "children": []})
    command("CLIENT", "PAUSE", "600000", "WRITE")(stored.backend)
    other = threading.Thread(target=command("SETEX", "celery-task-meta-same", "1000", success), args=[stored.backend])
    other.start()
    poll(lambda: held_up(stored.backend) == 1, "the other worker's SUCCESS to wait")
    stored.send("failing", "late", task_id="same")
    poll(lambda: held_up(stored.backend) == 2, "this worker's FAILURE to wait")
    command("CLIENT", "UNPAUSE")(stored.backend)
    other.join()
    poll(lambda: stored.unacked() == 0, "the task to be acked")
    assert stored.metas(["same"])[0]["result"] == "elsewhere"
    assert stored.runs == {"late": 1}


def held_up(server: Server) -> int:
    """How many clients wait because the server pauses them."""
    with redis.Redis.from_url(server.url) as client:
        return sum("b" in one["flags"] for one in client.client_list())


def test_a_user_who_may_store_nothing_is_in_the_log(stored: Stored) -> None:
    command(*USER, "-setex")(stored.backend)
    ids = stored.send("failing", "one") + stored.send("counted", "other")
    stored.worker.wait_for_log("takes no results")
    assert "the 'setex' command" in stored.worker.log
    poll(lambda: stored.worker.pool()["parked"] == 2, "both to wait")
    assert stored.unacked() == 2
    command(*USER, "+setex")(stored.backend)
    poll(lambda: stored.statuses(ids) == {"FAILURE": 1, "SUCCESS": 1}, "both to be stored")
    stored.worker.wait_for_log("takes results again")
    assert "runs no script" not in stored.worker.log


@pytest.mark.parametrize("task", ["counted", "failing"])
def test_a_result_that_its_user_may_not_store_keeps_no_other_from_its_end(stored: Stored, task: str) -> None:
    """It waits until the server takes another one, which tells that this user may store results."""
    command(*USER, "resetkeys", "~celery-task-meta-good*")(stored.backend)
    stored.send(task, "bad", task_id="bad")
    stored.worker.wait_for_log("takes no results")
    good: list[str] = []

    def is_aside() -> bool:
        good.extend(stored.send("counted", f"task{len(good)}", task_id=f"good{len(good)}"))
        poll(lambda: stored.unacked() <= 1, "the good one to be acked")
        return "the message was put into the list" in stored.worker.log

    poll(is_aside, "the message to go whose result can't be stored")
    stored.wait_for("SUCCESS", good)
    assert stored.unacked() == 0
    assert stored.worker.log.count(f"{stored.worker.name} ready.") == 1
    assert stored.worker.stop() == 0


def test_a_part_of_a_chord_that_can_not_be_counted_ends_no_worker(stored: Stored) -> None:
    """Under stock solo it does, and each worker after that."""
    command("SET", "celery-taskset-meta-group.j", "no set")(stored.backend)
    command("SET", "celery-taskset-meta-group.d", "no set")(stored.backend)
    part = {"group_id": "group", "group_index": 0, "chord": stored.client.signature("total")}
    stored.send("counted", "part", **part)
    stored.worker.wait_for_log("the message was put into the list")
    stored.wait_for("SUCCESS", stored.send("counted", "other"))
    assert stored.unacked() == 0
    assert stored.worker.stop() == 0


@pytest.mark.parametrize("acks", [True, False])
def test_a_task_that_took_its_worker_along_leaves_its_queue_once_its_failure_is_stored(
    start_worker: StartWorker, broker: Broker, server: Server, acks: bool
) -> None:
    """Celery acks or rejects its message before that, whose worker may die in between."""
    conf = {"task_acks_on_failure_or_timeout": acks, "task_reject_on_worker_lost": False}
    stored = start(start_worker, broker, server, conf)
    fill, make_room = OUTAGES["full"]  # Celery can look whether a success was stored
    fill(server)
    ids = stored.send("ends_badly", "exit")
    stored.worker.wait_for_log("takes no results")
    stored.send("counted", "other")  # what was acked before would be gone by the time when this one comes
    poll(lambda: stored.worker.pool()["parked"] == 2, "the other one to wait, too")
    assert stored.unacked() == 2
    make_room(server)
    stored.wait_for("FAILURE", ids)
    assert stored.metas(ids)[0]["result"]["exc_type"] == "WorkerLostError"
    poll(lambda: stored.unacked() == 0, "its message to go")


# Chords, and tasks without results.


def test_chords_and_ignored_results_are_as_under_stock(common: Stored) -> None:
    ignored = common.send("quiet", "quiet")
    failed = common.send("quietly_failing", "failing")
    client = common.worker.client
    result = chord([client.signature("counted", [name]) for name in "abc"], client.signature("total")).apply_async()
    assert common.worker.answer(result) == "a+b+c"
    common.wait_for("FAILURE", failed)
    common.wait_for_runs("quiet")
    assert common.metas(ignored) == [None]


# A worker that ends meanwhile.


def test_a_cold_shutdown_gives_back_what_could_not_be_stored(
    stored: Stored, start_worker: StartWorker, broker: Broker
) -> None:
    stored.backend.stop()
    names = [f"task{number}" for number in range(TASKS)]
    ids = stored.send("counted", *names)
    stored.wait_for_runs(*names)
    stored.worker.signal(signal.SIGQUIT)
    stored.worker.wait()
    stored.backend.start()
    again = start(start_worker, broker, stored.backend)
    again.wait_for("SUCCESS", ids)
    assert again.runs == Counter(names)


def test_a_cold_shutdown_does_not_wait_for_the_backend(
    start_worker: StartWorker, broker: Broker, server: Server
) -> None:
    """Celery stores that tasks which are acked early are retried."""
    never = LATE | {"LEGIT_WORKER_MODELS__LATE__PATH": "0,0,0,600"}
    stored = start(start_worker, broker, server, {"task_acks_late": False}, **never)
    names = [f"task{number}" for number in range(5)]
    stored.send("parked", *names)
    stored.wait_for_runs(*names)
    server.stop()
    stored.worker.signal(signal.SIGQUIT)
    stored.worker.wait(ANSWER_SECONDS / 2)


def test_time_limits_hold_meanwhile(stored: Stored) -> None:
    stored.backend.stop()
    ids = stored.send("limited", "limited")
    stored.worker.wait_for_log("Soft time limit")
    stored.backend.start()
    stored.wait_for("FAILURE", ids)
    assert stored.metas(ids)[0]["result"]["exc_type"] == "SoftTimeLimitExceeded"


def test_a_warm_shutdown_waits_for_the_backend(stored: Stored) -> None:
    stored.backend.stop()
    names = [f"task{number}" for number in range(TASKS)]
    ids = stored.send("counted", *names)
    stored.wait_for_runs(*names)
    stored.worker.signal(signal.SIGTERM)
    stored.worker.wait_for_log("waiting for its result to be stored")
    stored.backend.start()
    assert stored.worker.wait() == 0
    assert stored.statuses(ids) == {"SUCCESS": TASKS}
    assert stored.unacked() == 0


def test_a_warm_shutdown_does_not_wait_for_ever(stored: Stored, start_worker: StartWorker, broker: Broker) -> None:
    stored.backend.stop()
    names = [f"task{number}" for number in range(TASKS)]
    ids = stored.send("counted", *names)
    stored.wait_for_runs(*names)
    assert stored.worker.stop() == 0
    assert "the results of 20 tasks are not stored" in stored.worker.log
    stored.backend.start()
    again = start(start_worker, broker, stored.backend)
    again.wait_for("SUCCESS", ids)
    assert again.runs == Counter(names)


# Results with envelopes on the same server.


def start_routed(start_worker: StartWorker, broker: Broker, **conf: Any) -> Apps:
    """A worker whose broker, result backend and app's queue are one database."""
    variables = SIMULATED | ENABLED | routed(broker, "alpha") | {"PROJECT_CONF": json.dumps(conf)}
    worker = start_worker("counted", broker=replace(broker, backend=broker.url), environment=variables)
    return Apps(worker, {"alpha": app_queue(broker, "alpha")})


def dead_letters(broker: Broker) -> list[Any]:
    with redis.Redis.from_url(broker.url) as server:
        return [json.loads(letter) for letter in server.lrange("legit.dead.alpha", 0, -1)]


def test_an_envelope_that_is_refused_leaves_the_result_alone(start_worker: StartWorker, broker: Broker) -> None:
    apps = start_routed(start_worker, broker)
    with redis.Redis.from_url(broker.url) as server:
        server.set(queue_name(broker, "alpha"), "no list")
    results = [apps.send("counted", f"task{number}") for number in range(TASKS)]
    others = [apps.send("counted", f"other{number}", app=None) for number in range(TASKS)]
    apps.worker.settle(results + others)
    assert {result.status for result in results + others} == {"SUCCESS"}
    poll(lambda: len(dead_letters(broker)) == TASKS, "the dead letters")
    assert {(one["id"], one["status"]) for one in dead_letters(broker)} == {(one.id, "SUCCESS") for one in results}
    assert apps.counts()["apps"]["alpha"] == {"sent": TASKS, "failed": 0, "dead": TASKS, "waiting": 0}


@pytest.mark.parametrize("deduplicates", [False, True])
def test_an_app_hears_one_end_of_a_result_that_only_the_envelope_takes(
    start_worker: StartWorker, broker: Broker, deduplicates: bool
) -> None:
    apps = start_routed(start_worker, broker, worker_deduplicate_successful_tasks=deduplicates)
    odd = apps.send("odd", "task")
    apps.worker.settle([odd])
    assert odd.status == "FAILURE"
    assert [(one["id"], one["status"]) for one in apps.told("alpha", odd.id)] == [(odd.id, "FAILURE")]


def test_a_success_that_is_stored_stays(start_worker: StartWorker, broker: Broker) -> None:
    apps = start_routed(start_worker, broker)
    first = apps.send("counted", "task", task_id="same")
    assert apps.worker.answer(first) == "task"
    again = apps.send("failing", "again", task_id="same")
    apps.worker.wait_for_log("ran again")
    apps.told("alpha", again.id)
    assert (again.status, again.result) == ("SUCCESS", "task")


# Tasks that end without running.


def test_tasks_that_never_run_wait_for_their_apps_server_and_hold_up_nobody(
    start_worker: StartWorker, broker: Broker, server: Server
) -> None:
    own = {"LEGIT_WORKER_APPS__ALPHA__URL": server.url, "PROJECT_CONF": json.dumps({"task_track_started": False})}
    variables = SIMULATED | ENABLED | routed(broker, "alpha", "beta") | own
    worker = start_worker("counted", broker=broker, environment=variables)
    apps = Apps(worker, {"alpha": AppQueue(server.url, queue_name(broker, "alpha")), "beta": app_queue(broker, "beta")})
    server.stop()
    poll(lambda: apps.client.control.revoke(["revoked"], reply=True), "the worker to hear of it")
    sent = {
        apps.send("counted", "expired", expires=datetime(2020, 1, 1, tzinfo=timezone.utc)).id: "REVOKED",
        apps.send("counted", "revoked", task_id="revoked").id: "REVOKED",
        apps.send("nobody_has_this").id: "FAILURE",
    }
    other = apps.send("counted", "other", app="beta")
    apps.queues["beta"].wait_for([other.id], INSPECT_SECONDS / 4)
    poll(lambda: apps.counts()["apps"]["alpha"]["waiting"] == len(sent), "the envelopes to wait")
    with redis.Redis.from_url(broker.url) as client:
        assert client.hlen("unacked") == len(sent), "what its app was not told is not acked"
    server.start()
    apps.queues["alpha"].wait_for(sent)
    assert {one["id"]: one["status"] for one in apps.queues["alpha"].seen} == sent
    with redis.Redis.from_url(broker.url) as client:
        poll(lambda: client.hlen("unacked") == 0, "all to be acked")
    assert "ran expired" not in worker.log
    assert "ran revoked" not in worker.log


def test_tasks_that_never_run_wait_for_the_result_backend(stored: Stored) -> None:
    poll(lambda: stored.client.control.revoke(["revoked"], reply=True), "the worker to hear of it")
    stored.backend.stop()
    ids = stored.send("counted", "expired", expires=datetime(2020, 1, 1, tzinfo=timezone.utc))
    ids += stored.send("counted", "revoked", task_id="revoked")
    unknown = stored.send("nobody_has_this", "unknown")
    poll(lambda: stored.worker.pool()["parked"] == 3, "all to wait")
    assert stored.answers()
    assert stored.unacked() == 3
    stored.backend.start()
    stored.wait_for("REVOKED", ids)
    stored.wait_for("FAILURE", unknown)
    poll(lambda: stored.unacked() == 0, "all to be acked")
    assert stored.runs == {}


@pytest.mark.parametrize("is_due_later", [False, True], ids=["at once", "due later"])
def test_a_revoked_task_waits_for_a_result_backend_that_is_not_redis(
    start_worker: StartWorker, broker: Broker, tmp_path: Path, is_due_later: bool
) -> None:
    """Under stock solo it ends the worker, or leaves its message unacked if it was due later."""
    results, elsewhere = tmp_path / "results", tmp_path / "elsewhere"
    results.mkdir()
    worker = start_worker(
        "counted", broker=replace(broker, backend=f"file://{results}"), environment=SIMULATED | ENABLED
    )
    stored = Stored(worker, Server(results))
    results.rename(elsewhere)
    if is_due_later:
        stored.send("counted", "revoked", task_id="revoked", countdown=2)
        poll(lambda: "revoked" in worker.received, "the task to come")
    poll(lambda: stored.client.control.revoke(["revoked"], reply=True), "the worker to hear of it")
    if not is_due_later:
        stored.send("counted", "revoked", task_id="revoked")
    worker.wait_for_log("FilesystemBackend takes no results")
    assert stored.answers()
    assert stored.unacked() == 1
    elsewhere.rename(results)
    poll((results / "celery-task-meta-revoked").exists, "its end to be stored")
    assert json.loads((results / "celery-task-meta-revoked").read_text())["status"] == "REVOKED"
    poll(lambda: stored.unacked() == 0, "its message to be acked")
    assert stored.runs == {}
    assert worker.log.count(f"{worker.name} ready.") == 1
    assert worker.stop() == 0


@pytest.mark.parametrize("why", ["due later", "a rate limit"])
def test_a_task_that_a_timer_starts_waits_for_a_result_backend_that_is_not_redis(
    start_worker: StartWorker, broker: Broker, tmp_path: Path, why: str
) -> None:
    """Under stock solo its message stays unacked."""
    database = tmp_path / "results"
    worker = start_worker(
        "counted", broker=replace(broker, backend=f"db+sqlite:///{database}"), environment=SIMULATED | ENABLED
    )
    stored = Stored(worker, Server(database))
    if why == "a rate limit":
        poll(lambda: stored.client.control.rate_limit("counted", "20/m", reply=True), "the worker to hear of it")
    stored.send("counted", "first")
    stored.send("counted", "one", "other", **({"countdown": 3} if why == "due later" else {}))
    poll(lambda: len(worker.received) == 3 and stored.unacked() == 2, "the tables to be made by the first one")
    with sqlite3.connect(database) as tables:
        tables.execute("ALTER TABLE celery_taskmeta RENAME TO elsewhere")
    worker.wait_for_log("DatabaseBackend takes no results")
    poll(lambda: worker.pool()["parked"] == 2, "both to wait")
    assert stored.unacked() == 2
    with sqlite3.connect(database) as tables:
        tables.execute("ALTER TABLE elsewhere RENAME TO celery_taskmeta")
    poll(lambda: stored.unacked() == 0, "both to be acked")
    assert stored.runs == {"first": 1, "one": 1, "other": 1}
    with sqlite3.connect(database) as tables:
        assert tables.execute("SELECT status, count(*) FROM celery_taskmeta GROUP BY status").fetchall() == [
            ("SUCCESS", 3)
        ]
    assert worker.log.count(f"{worker.name} ready.") == 1


# Result backends that are not Redis.


def start_with(start_worker: StartWorker, broker: Broker, backend: str, folder: Path) -> Stored:
    """A worker whose backend has no server; a task stores nothing before it ends."""
    variables = SIMULATED | ENABLED | {"PROJECT_CONF": json.dumps({"task_track_started": False})}
    worker = start_worker("counted", broker=replace(broker, backend=backend), environment=variables)
    return Stored(worker, Server(folder))


def test_tasks_wait_for_a_result_backend_that_is_not_redis_and_run_once(
    start_worker: StartWorker, broker: Broker, tmp_path: Path
) -> None:
    """Under stock solo, its error is a lost connection to the broker: a task that is acked late runs again."""
    results, elsewhere = tmp_path / "results", tmp_path / "elsewhere"
    results.mkdir()
    stored = start_with(start_worker, broker, f"file://{results}", results)
    results.rename(elsewhere)
    names = [f"task{number}" for number in range(TASKS)]
    ids = stored.send("counted", *names) + stored.send("failing", "fails") + stored.send("nobody_has_this", "unknown")
    stored.wait_for_runs(*names, "fails")
    poll(lambda: stored.worker.pool()["parked"] == len(ids), "all to wait")
    assert stored.answers()
    assert stored.unacked() == len(ids)
    elsewhere.rename(results)
    files = [results / f"celery-task-meta-{one}" for one in ids]
    poll(lambda: all(file.exists() for file in files) and not stored.unacked(), "all to be stored, and acked")
    assert Counter(json.loads(file.read_text())["status"] for file in files) == {"SUCCESS": TASKS, "FAILURE": 2}
    assert stored.runs == Counter([*names, "fails"])
    assert "onnection to broker lost" not in stored.worker.log
    assert stored.worker.log.count(f"{stored.worker.name} ready.") == 1


def test_a_warm_shutdown_does_not_wait_for_ever_for_a_backend_that_is_not_redis(
    start_worker: StartWorker, broker: Broker, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    stored = start_with(start_worker, broker, f"file://{results}", results)
    results.rename(tmp_path / "elsewhere")
    stored.send("counted", "task")
    stored.worker.wait_for_log("FilesystemBackend takes no results")
    assert stored.worker.stop() == 0
    assert "the results of 1 tasks are not stored" in stored.worker.log


def test_what_a_backend_refuses_is_one_tasks_end(start_worker: StartWorker, broker: Broker, tmp_path: Path) -> None:
    """Stock solo stores a failure, too. If that is refused as well, it ends the worker."""
    stored = start_with(start_worker, broker, f"refusing:Refusing+file://{tmp_path}", tmp_path)
    kept = {"value-SUCCESS": "FAILURE", "runtime-SUCCESS": "FAILURE"}
    lost = ("value-SUCCESS-FAILURE", "runtime-SUCCESS-FAILURE")
    others = stored.send("counted", "one")
    for task_id in (*kept, *lost):
        stored.send("counted", task_id, task_id=task_id)
        others += stored.send("counted", f"after-{task_id}")

    def files(ids: Iterable[str]) -> list[Path]:
        return [tmp_path / f"celery-task-meta-{one}" for one in ids]

    poll(lambda: all(file.exists() for file in files(others)) and not stored.unacked(), "all to be over")
    assert [json.loads(file.read_text())["status"] for file in files(kept)] == list(kept.values())
    assert not any(file.exists() for file in files(lost))
    assert set(stored.runs.values()) == {1}
    assert len(stored.runs) == len(others) + len(kept) + len(lost)
    assert stored.worker.log.count(f"{stored.worker.name} ready.") == 1
    assert stored.worker.stop() == 0
