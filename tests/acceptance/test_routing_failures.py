"""No routed result is lost: by a worker that is killed, by an app's server that is away, by one that never comes.

Two apps are on, one is known and off, one is unknown; of a thousand tasks one in twenty fails. `scripts/chaos` does the
same for longer, and to more than workers.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis
from appqueues import AppQueue, Apps, Envelope, app_queue, queue_name, routed
from commands import celery
from harness import SIMULATED, Broker, StartWorker, poll
from ownserver import Server

ENABLED = {"LEGIT_WORKER_ENABLED": "1"}

#: Two that are told, one that is known and off, one that nobody knows.
APPS = ("alpha", "beta", "gamma", "stranger")
TOLD = APPS[:2]

TASKS = 1000
KILLS = 4

#: Seconds until all are answered, with time for each restart and for Redis to give tasks back.
ALL_SECONDS = 110


def settings(broker: Broker, **more: str) -> dict[str, str]:
    """The variables of a worker for the four."""
    known = {"LEGIT_WORKER_APPS__GAMMA__QUEUE": queue_name(broker, "gamma")}
    return SIMULATED | ENABLED | routed(broker, *TOLD) | known | more


def start_apps(start: StartWorker, broker: Broker, **more: str) -> Apps:
    """A worker, and the queues of all four apps."""
    worker = start("routed", "--loglevel=WARNING", broker=broker, environment=settings(broker, **more), wait=False)
    worker.wait_until_it_hears()
    return Apps(worker, {app: app_queue(broker, app) for app in APPS})


@dataclass
class Sent:
    """So many tasks, for the four apps in turn."""

    client: Any
    #: Task id to its number, by app.
    ids: dict[str, dict[str, int]] = field(default_factory=lambda: {app: {} for app in APPS})

    def send(self, count: int = TASKS) -> None:
        """All at once, as a producer with much to do would."""
        with self.client.pool.acquire() as connection, self.client.amqp.Producer(connection) as producer:
            for number in range(count):
                self.send_one(number, producer=producer)

    def send_one(self, number: int, **options: Any) -> None:
        """One, with its number in `meta`."""
        app = APPS[number % len(APPS)]
        task_id = f"{self.client.conf.task_default_queue}-{number}"
        headers = {"app": app, "meta": number}
        self.client.send_task("work", [number], task_id=task_id, headers=headers, **options)
        self.ids[app][task_id] = number

    @property
    def all(self) -> dict[str, int]:
        """Of all apps."""
        return {task_id: number for ids in self.ids.values() for task_id, number in ids.items()}


def fails(number: int) -> bool:
    """What the task `work` does."""
    return number % 20 == 7


def check_told(queue: AppQueue, ids: dict[str, int]) -> None:
    """Nothing but this app's own, and each says what its task did."""
    assert {envelope["id"] for envelope in queue.seen} == set(ids)
    for envelope in queue.seen:
        number = ids[envelope["id"]]
        assert envelope["meta"] == number
        if fails(number):
            assert (envelope["status"], envelope["error"]["type"]) == ("FAILURE", "ValueError")
        else:
            assert (envelope["status"], envelope["result"]) == ("SUCCESS", 2 * number)


class Results:
    """What stock Celery stores of tasks, looked up many at a time."""

    def __init__(self, broker: Broker) -> None:
        if not broker.backend.startswith("redis"):
            pytest.skip("results are read from Redis")
        self._server = redis.Redis.from_url(broker.backend)
        self._finished: set[str] = set()

    def of(self, ids: list[str]) -> dict[str, tuple[str, Any]]:
        """Status and result of each task that has one."""
        stored = self._server.mget([f"celery-task-meta-{task_id}" for task_id in ids])
        metas = (json.loads(meta) for meta in stored if meta)
        return {meta["task_id"]: (meta["status"], meta["result"]) for meta in metas}

    def finished(self, ids: list[str]) -> set[str]:
        """Those that have come to an end. It is asked often, and looks up each end once."""
        found = self.of([task_id for task_id in ids if task_id not in self._finished])
        self._finished |= {task_id for task_id, (status, _) in found.items() if status in ("SUCCESS", "FAILURE")}
        return self._finished & set(ids)


def check_stock(broker: Broker, ids: dict[str, int]) -> None:
    """Celery's own results are those that it would have stored without routing."""
    stored = Results(broker).of(list(ids))
    assert stored.keys() == ids.keys()
    for task_id, (status, result) in stored.items():
        number = ids[task_id]
        if fails(number):
            assert (status, result["exc_type"]) == ("FAILURE", "ValueError")
        else:
            assert (status, result) == ("SUCCESS", 2 * number)


# A calm day.


def test_every_app_gets_exactly_its_own_results(start_worker: StartWorker, broker: Broker) -> None:
    check_calm(start_worker, broker)


def test_every_app_gets_exactly_its_own_results_from_rabbitmq(start_worker: StartWorker, rabbitmq: Broker) -> None:
    check_calm(start_worker, rabbitmq)


def check_calm(start: StartWorker, broker: Broker) -> None:
    sent = Sent(broker.client())
    sent.send()
    apps = start_apps(start, broker)
    for app in TOLD:
        apps.queues[app].wait_for(sent.ids[app], ALL_SECONDS)
    results, every = Results(broker), list(sent.all)
    poll(lambda: len(results.finished(every)) == TASKS, "all results", ALL_SECONDS)
    for app in TOLD:
        assert apps.told(app)[TASKS // len(APPS) :] == []
        queue = apps.queues[app]
        queue.seen[:] = [envelope for envelope in queue.seen if not envelope["id"].startswith("sentinel")]
        check_told(queue, sent.ids[app])
        assert queue.duplicates() == 0
    check_stock(broker, sent.all)
    assert not apps.queues["gamma"].exists()
    assert not apps.queues["stranger"].exists()
    assert not AppQueue(broker.url, "gamma.results").exists()
    assert not AppQueue(broker.url, "stranger.results").exists()
    counts = apps.counts()
    assert counts["unknown"] == TASKS // len(APPS)
    for app in TOLD:
        failed = sum(fails(number) for number in sent.ids[app].values())
        assert counts["apps"][app] == {"sent": TASKS // len(APPS) + 1, "failed": failed, "dead": 0, "waiting": 0}


# Killed workers.


def test_no_routed_result_is_missing_after_kills(
    start_worker: StartWorker, servers: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    broker = servers.fresh(redelivery_seconds=1)
    check_kills(start_worker, broker, capsys)


def test_no_routed_result_is_missing_after_kills_under_rabbitmq(
    start_worker: StartWorker, rabbitmq: Broker, capsys: pytest.CaptureFixture[str]
) -> None:
    check_kills(start_worker, rabbitmq, capsys)


def check_kills(start: StartWorker, broker: Broker, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed when so many results are there, at points drawn with a fixed seed, and a little after."""
    draw = random.Random(4)
    moments = sorted(draw.sample(range(TASKS // 40, TASKS * 9 // 10), KILLS))
    sent, results = Sent(broker.client()), Results(broker)
    sent.send()
    every = list(sent.all)
    more = {"LEGIT_WORKER_WINDOW": "100", "LEGIT_WORKER_MODELS__SIM__PATH": "0.005,0.001"}
    workers = [start("routed", broker=broker, environment=settings(broker, **more), wait=False)]
    queues = {app: app_queue(broker, app) for app in APPS}
    for moment in moments:
        poll(lambda moment=moment: len(results.finished(every)) >= moment, f"{moment} results", ALL_SECONDS)  # type: ignore[misc]
        time.sleep(draw.uniform(0, 0.1))
        workers[-1].kill()
        workers.append(start("routed", broker=broker, environment=settings(broker, **more), wait=False))
    poll(lambda: len(results.finished(every)) == TASKS, "all results", ALL_SECONDS)
    for app in TOLD:
        queues[app].wait_for(sent.ids[app])
        check_told(queues[app], sent.ids[app])
    check_stock(broker, sent.all)
    duplicates = {app: queues[app].duplicates() for app in TOLD}
    with capsys.disabled():
        print(f"\n{KILLS} kills during {TASKS} tasks: duplicates {duplicates}")
    assert not queues["gamma"].exists()
    assert not queues["stranger"].exists()


# An app's server that is away.


#: Seconds for which an app's server is away.
OUTAGE = 20

#: Tasks in a second, for each of the two apps.
RATE = 20


@pytest.mark.parametrize(("away", "back"), [("freeze", "thaw"), ("stop", "start")])
def test_an_app_whose_server_is_away_loses_nothing_and_holds_up_nobody(
    start_worker: StartWorker, broker: Broker, server: Server, away: str, back: str
) -> None:
    """For longer than the worker tries again: what came early in the outage is with the dead letters."""
    own = {"LEGIT_WORKER_APPS__ALPHA__URL": server.url, "LEGIT_WORKER_RESULT_RETRY_SECONDS": "8"}
    apps = start_apps(start_worker, broker, **own)
    alpha, beta = AppQueue(server.url, queue_name(broker, "alpha")), apps.queues["beta"]
    sent = {app: {} for app in TOLD}  # type: dict[str, dict[str, int]]
    with feeding(apps.client, sent), arriving(beta) as arrivals:
        poll(lambda: len(arrivals) > 5 * RATE, "the first results")
        begin = time.monotonic()
        getattr(server, away)()
        time.sleep(OUTAGE)
        getattr(server, back)()
        end = time.monotonic()
        count = len(arrivals)
        poll(lambda: len(arrivals) > count + RATE, "results after the outage")
    beta.wait_for(sent["beta"])
    check_told(beta, sent["beta"])
    assert beta.duplicates() == 0
    check_gaps(arrivals, begin, end)
    dead = AppQueue(broker.url, "legit.dead.alpha")

    def all_of_alpha() -> bool:
        alpha.take()
        dead_ids = {letter["id"] for letter in letters(broker)}
        return {envelope["id"] for envelope in alpha.seen} | dead_ids >= set(sent["alpha"])

    poll(all_of_alpha, "alpha's results, on its queue or with the dead letters")
    assert dead.exists(), "the outage outlasted the retries"
    replay(broker, server)
    alpha.wait_for(sent["alpha"])
    check_told(alpha, sent["alpha"])
    assert not dead.exists()
    check_stock(broker, sent["alpha"] | sent["beta"])


@contextlib.contextmanager
def feeding(client: Any, sent: dict[str, dict[str, int]]) -> Iterator[None]:
    """A producer that sends for both apps at an even rate, for as long as the block runs."""
    over = threading.Event()

    def run() -> None:
        for number in itertools.count():
            for app in TOLD:
                task_id = f"{client.conf.task_default_queue}-{app}-{number}"
                client.send_task("work", [number], task_id=task_id, headers={"app": app, "meta": number})
                sent[app][task_id] = number
            if over.wait(1 / RATE):
                return

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def arriving(queue: AppQueue) -> Iterator[list[float]]:
    """When envelopes came, seconds on the monotonic clock."""
    over, arrivals = threading.Event(), []  # type: ignore[var-annotated]

    def run() -> None:
        while not over.wait(0.02):
            taken = queue.take()
            arrivals.extend([time.monotonic()] * len(taken))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield arrivals
    finally:
        over.set()
        thread.join()


def check_gaps(arrivals: list[float], begin: float, end: float) -> None:
    """The other app's results come during the outage as before it: no gap is of another kind."""
    gaps = [(later - earlier, later) for earlier, later in itertools.pairwise(arrivals)]
    before = max(gap for gap, at in gaps if at < begin)
    during = max(gap for gap, at in gaps if begin <= at and at - gap <= end)
    print(f"largest gap between beta's results: {before:.2f} s before the outage, {during:.2f} s during it")
    # A tenth of the outage is the floor: on a busy machine a gap of a second is nobody's fault.
    assert during <= max(10 * before, OUTAGE / 10)


def letters(broker: Broker) -> list[Envelope]:
    """The dead letters of alpha, as they lie there."""
    with redis.Redis.from_url(broker.url) as connection:
        return [json.loads(letter) for letter in connection.lrange("legit.dead.alpha", 0, -1)]


def results_command(broker: Broker, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """`celery legit results …`, as an operator types it."""
    return celery(
        "routed", "legit", "results", *arguments, broker=broker, settings=settings(broker, **more), columns=200
    )


def replay(broker: Broker, server: Server) -> None:
    finished = results_command(broker, "replay", "alpha", LEGIT_WORKER_APPS__ALPHA__URL=server.url)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_a_task_whose_result_only_waits_for_its_app_can_not_be_revoked_any_more(
    start_worker: StartWorker, broker: Broker, server: Server
) -> None:
    server.stop()
    apps = start_apps(start_worker, broker, LEGIT_WORKER_APPS__ALPHA__URL=server.url)
    late, other = apps.send("double", 1), apps.send("double", 2)
    poll(lambda: Results(broker).finished([late.id, other.id]) == {late.id, other.id}, "the results' own place")
    poll(lambda: apps.worker.pool()["parked"] == 2, "both to wait for the server")
    apps.worker.client.control.revoke(late.id, terminate=True, reply=True)
    poll(lambda: "is over but for its delivery" in apps.worker.log, "the word that it is too late")
    server.start()
    alpha = AppQueue(server.url, queue_name(broker, "alpha"))
    alpha.wait_for({late.id, other.id})
    assert [(one["status"], one["result"]) for one in alpha.seen] == [("SUCCESS", 2), ("SUCCESS", 4)]
    assert Results(broker).of([late.id]) == {late.id: ("SUCCESS", 2)}


# An app's server that never comes.


def test_dead_letters_are_listed_replayed_and_dropped(
    start_worker: StartWorker, broker: Broker, server: Server
) -> None:
    server.stop()
    own = {"LEGIT_WORKER_APPS__ALPHA__URL": server.url}
    apps = start_apps(start_worker, broker, LEGIT_WORKER_RESULT_RETRY_SECONDS="1", **own)
    sent = [apps.send("double", number) for number in range(20)]
    apps.worker.settle(sent)
    ids = {result.id for result in sent}
    poll(lambda: {letter["id"] for letter in letters(broker)} == ids, "all of them with the dead letters")
    assert apps.counts()["apps"]["alpha"]["dead"] == 20

    listed = results_command(broker, "list", "alpha", **own)
    assert listed.returncode == 0, listed.stderr
    assert all(task_id in listed.stdout for task_id in ids)
    listed = results_command(broker, "list", "alpha", "--json", **own)
    assert {letter["id"] for letter in json.loads(listed.stdout)} == ids

    refused = results_command(broker, "replay", "alpha", **own)
    assert refused.returncode != 0
    assert {letter["id"] for letter in letters(broker)} == ids, "none is lost by a replay that fails"

    server.start()
    replay(broker, server)
    alpha = AppQueue(server.url, queue_name(broker, "alpha"))
    alpha.wait_for(ids)
    assert len(alpha.seen) == len(ids)
    assert letters(broker) == []

    server.stop()
    late = apps.send("double", 1)
    poll(lambda: [letter["id"] for letter in letters(broker)] == [late.id], "one more dead letter")
    dropped = results_command(broker, "drop", "alpha", **own)
    assert dropped.returncode == 0, dropped.stdout + dropped.stderr
    assert letters(broker) == []
