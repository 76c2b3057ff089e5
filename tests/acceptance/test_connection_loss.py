"""Servers go away while tasks are in flight, and come back: each task is answered, and the worker is the same.

Servers that a worker on either pool outlives: the broker, the result backend, or both. Tasks are acked late, so that
what had no answer is given to a worker again; and `result_backend_always_retry` is on, since Celery makes a failure of
a task whose result it can't store otherwise.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from typing import Any

import kombu.pools
import pytest
from celery.result import AsyncResult
from harness import LATE, SIDES, Broker, Sides, StartWorker, Worker, poll
from ownserver import RabbitServer, Server

#: A dead connection's messages are given to a worker again after so many seconds.
OPTIONS = {"visibility_timeout": 2, "unacked_restore_throttle": 1, "unacked_restore_interval": 1}

#: How a server goes away, and how it comes back.
OUTAGES: dict[str, tuple[Callable[[Any], None], Callable[[Any], None]]] = {
    "restarted": (methodcaller("stop"), methodcaller("start")),
    "paused": (methodcaller("freeze"), methodcaller("thaw")),
    "replaced by an empty one": (methodcaller("stop"), methodcaller("start_empty")),
}

WHICH = ("broker", "backend", "both")

#: One model for each outage, which takes a second to load: its tasks are in flight while a server goes away.
MODELS = {f"late{number}": "0,0,0,1" for number in range(len(OUTAGES) * len(WHICH))}

#: Seconds for which a server stays away once the model has loaded: tasks that were in flight end during the outage.
OUTAGE_SECONDS = 1

#: Tasks in flight, and the window that they fill under ModelPool.
TASKS = 30


@dataclass
class Outlived:
    """A worker and the two servers that it needs."""

    worker: Worker
    broker: Server
    backend: Server
    models: Iterator[str]

    def servers(self, which: str) -> dict[str, Server]:
        """Those that go away."""
        both = {"broker": self.broker, "backend": self.backend}
        return both if which == "both" else {which: both[which]}


def late_models() -> dict[str, str]:
    """Their settings."""
    kinds = {f"LEGIT_WORKER_MODELS__{alias.upper()}__KIND": "simulated" for alias in MODELS}
    return kinds | {f"LEGIT_WORKER_MODELS__{alias.upper()}__PATH": path for alias, path in MODELS.items()}


def own_broker(broker: Server | RabbitServer, backend: Server) -> Broker:
    return Broker(
        url=broker.url,
        backend=backend.url,
        queue="work",
        transport_options=OPTIONS,
        environment={"PROJECT_TRANSPORT_OPTIONS": json.dumps(OPTIONS)},
    )


@pytest.fixture(scope="module", params=SIDES)
def outlived(
    request: pytest.FixtureRequest, start_module_worker: StartWorker, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Outlived]:
    """One worker a side goes through all outages, one after the other."""
    folder = tmp_path_factory.mktemp("servers")
    broker, backend = Server(folder / "broker"), Server(folder / "backend")
    settings = late_models() | {
        "LEGIT_WORKER_WINDOW": str(TASKS),
        "PROJECT_ACKS_LATE": "1",
        "PROJECT_RETRY_RESULTS": "1",
    }
    try:
        broker.start()
        backend.start()
        sides = Sides(start_module_worker, "controlled")
        worker = sides.worker(request.param, broker=own_broker(broker, backend), **settings)
        yield Outlived(worker, broker, backend, iter(MODELS))
        worker.close()  # or it would find the other side's servers, should they get the same ports
    finally:
        broker.end()
        backend.end()


def in_flight(worker: Worker, alias: str) -> list[AsyncResult[Any]]:
    """Tasks that the worker has: all of them where they park, as many as it prefetches where they don't."""
    parks = "window" in worker.pool()
    results = [worker.send("one", f"text {number}", alias) for number in range(TASKS)]
    poll(lambda: len(taken(worker, results)) >= (TASKS if parks else 1), "the worker to take the tasks")
    return results


def reconnect(worker: Worker, results: list[AsyncResult[Any]]) -> list[AsyncResult[Any]]:
    """The same tasks, seen by a client that has no connection from before."""
    kombu.pools.reset()
    worker.renew_client()
    return [worker.client.AsyncResult(result.id) for result in results]


def taken(worker: Worker, results: list[AsyncResult[Any]]) -> set[str]:
    """Which of these tasks the worker has received."""
    return {result.id for result in results} & worker.received


@pytest.mark.parametrize("outage", OUTAGES)
@pytest.mark.parametrize("which", WHICH)
def test_tasks_in_flight_outlive_a_server(
    outlived: Outlived, which: str, outage: str, simulated: Callable[[Any], list[float]]
) -> None:
    worker, servers = outlived.worker, outlived.servers(which)
    away, back = OUTAGES[outage]
    alias = next(outlived.models)
    results = in_flight(worker, alias)
    for server in servers.values():
        away(server)
    had = taken(worker, results)
    worker.wait_for_log(f"model {alias!r} loaded")
    time.sleep(OUTAGE_SECONDS)
    for server in servers.values():
        back(server)
    if "replaced" in outage and "broker" in servers:  # what it had not handed over yet is gone with it
        results = [result for result in results if result.id in had]
    results = reconnect(worker, results)
    new = [worker.send("one", f"new {number}") for number in range(10)]
    numbers = range(len(results))
    assert worker.answers([*results, *new]) == [
        *(simulated(f"text {number}") for number in numbers),
        *(simulated(f"new {number}") for number in range(10)),
    ]
    assert worker.log.count(f"{worker.name} ready.") == 1


@pytest.mark.parametrize(("away", "back"), [("stop", "start"), ("freeze", "thaw")])
def test_a_queue_longer_than_the_window_outlives_its_server(
    start_worker: StartWorker, server: Server, away: str, back: str
) -> None:
    slow = {"LEGIT_WORKER_MODELS__SIM__PATH": "0.02,0.005", "LEGIT_WORKER_WINDOW": "64"}
    worker = Sides(start_worker).worker("modelpool", broker=own_broker(server, server), **slow)
    results = [worker.send("one", f"text {number}") for number in range(300)]
    poll(lambda: results[30].ready(), "the first answers")
    getattr(server, away)()
    time.sleep(3)
    getattr(server, back)()
    worker.answers(results)
    assert all(result.successful() for result in results)
    assert worker.ask("one", "last")
    assert worker.log.count(f"{worker.name} ready.") == 1
    stats = worker.stats()
    assert (stats["prefetch_count"], stats["pool"]["window"]) == (64, 64)


@pytest.fixture
def other_server(tmp_path: Path) -> Iterator[Server]:
    """One that stays."""
    other = Server(tmp_path / "other")
    other.start()
    yield other
    other.end()


def test_tasks_in_flight_are_cancelled_with_their_connection_where_the_project_wants_it(
    start_worker: StartWorker, server: Server, other_server: Server, simulated: Callable[[Any], list[float]]
) -> None:
    """Celery's `worker_cancel_long_running_tasks_on_connection_loss`: their code is unwound, and they begin anew.

    That is told to the backend, without which Celery before 5.7 ends: so it is not on the server that goes away.
    """
    broker = own_broker(server, other_server)
    worker = Sides(start_worker, "controlled").worker("modelpool", broker=broker, PROJECT_CANCEL="1", **LATE)
    results = [worker.send("tidies", f"text {number}", "late") for number in range(TASKS)]
    poll(lambda: worker.pool()["parked"] == TASKS, "all of them to park")
    server.stop()
    server.start()
    poll(lambda: worker.log.count("tidied up") == TASKS, "all of them to be unwound")
    assert "was computed" not in worker.log
    results = reconnect(worker, results)
    assert worker.answers(results) == [simulated(f"text {number}") for number in range(TASKS)]
    assert worker.log.count("was computed") == TASKS, "each was computed once"
    assert worker.pool()["in_flight"] == 0


# RabbitMQ.


@pytest.mark.parametrize("side", SIDES)
def test_tasks_in_flight_outlive_their_connections_to_rabbitmq(
    start_worker: StartWorker, rabbit: RabbitServer, server: Server, side: str, simulated: Callable[[Any], list[float]]
) -> None:
    worker = Sides(start_worker, "controlled").worker(
        side,
        broker=Broker(url=rabbit.url, backend=server.url, queue=f"work-of-{side}"),
        PROJECT_ACKS_LATE="1",
        LEGIT_WORKER_WINDOW=str(TASKS),
        **LATE,
    )
    results = in_flight(worker, "late")
    for _ in range(2):
        rabbit.close_connections()
        kombu.pools.reset()
    results = reconnect(worker, results)
    new = [worker.send("one", f"new {number}") for number in range(TASKS)]
    assert worker.answers([*results, *new]) == [
        *(simulated(f"text {number}") for number in range(TASKS)),
        *(simulated(f"new {number}") for number in range(TASKS)),
    ]
    assert "Connection to broker lost" in worker.log
    assert worker.log.count(f"{worker.name} ready.") == 1
    if side == "modelpool":  # stock solo reconnects with a smaller one
        poll(lambda: worker.stats()["prefetch_count"] == TASKS, "the whole window")


def test_tasks_in_flight_outlive_rabbitmq_itself(
    start_worker: StartWorker, rabbit: RabbitServer, server: Server, simulated: Callable[[Any], list[float]]
) -> None:
    """Paused, restarted, and replaced by an empty one, one after the other, under the same worker."""
    broker = Broker(url=rabbit.url, backend=server.url, queue="work")
    settings = {"LEGIT_WORKER_WINDOW": str(TASKS)} | late_models()
    worker = Sides(start_worker, "controlled").worker("modelpool", broker=broker, **settings)
    for alias, outage in zip(MODELS, ("paused", "restarted", "replaced by an empty one"), strict=False):
        away, back = OUTAGES[outage]
        results = in_flight(worker, alias)
        away(rabbit)
        worker.wait_for_log(f"model {alias!r} loaded")
        back(rabbit)
        results = reconnect(worker, results)
        new = [worker.send("one", f"new {number}") for number in range(TASKS)]
        assert worker.answers([*results, *new]) == [
            *(simulated(f"text {number}") for number in range(TASKS)),
            *(simulated(f"new {number}") for number in range(TASKS)),
        ], outage
    assert worker.log.count(f"{worker.name} ready.") == 1
    poll(lambda: worker.stats()["prefetch_count"] == TASKS, "the whole window")
