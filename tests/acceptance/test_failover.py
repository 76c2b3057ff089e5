"""A broker's Redis becomes a replica, and another server takes its place: the worker finds it, and loses nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kombu.pools
import pytest
import redis
from celery.result import AsyncResult
from harness import Broker, Sides, StartWorker, Worker, poll
from ownserver import Server
from replicas import MASTER, RedisServer, Sentinel

#: Tasks in flight, and tasks behind them in the queue.
PARKED, QUEUED = 30, 100


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[RedisServer, RedisServer]]:
    """A master and its replica."""
    master, replica = RedisServer(tmp_path / "master"), RedisServer(tmp_path / "replica")
    try:
        master.start()
        replica.start()
        replica.replicate(master)
        yield master, replica
    finally:
        master.end()
        replica.end()


@pytest.fixture
def sentinel(pair: tuple[RedisServer, RedisServer], tmp_path: Path) -> Iterator[Sentinel]:
    """It watches the pair."""
    one = Sentinel(tmp_path / "sentinel")
    try:
        one.watch(pair[0])
        yield one
    finally:
        one.end()


def broker_at(url: str, backend: Server, **options: Any) -> Broker:
    """A broker whose results are elsewhere, on a server that stays."""
    environment = {"PROJECT_TRANSPORT_OPTIONS": json.dumps(options)}
    return Broker(url=url, backend=backend.url, queue="work", transport_options=options, environment=environment)


def start(start_worker: StartWorker, broker: Broker, gate: Path) -> tuple[Worker, list[AsyncResult[Any]]]:
    """A worker with tasks in flight, and more in the queue."""
    settings = {"PROJECT_GATE": str(gate), "LEGIT_WORKER_WINDOW": str(PARKED)}
    worker = Sides(start_worker, "controlled").worker("modelpool", broker=broker, **settings)
    results = [worker.send("one", f"text {number}", "gated") for number in range(PARKED)]
    poll(lambda: worker.pool()["parked"] == PARKED, "all of them to park")
    results += [worker.send("one", f"text {number}", "gated") for number in range(PARKED, PARKED + QUEUED)]
    return worker, results


def finish(worker: Worker, results: list[AsyncResult[Any]], gate: Path, broker: Broker) -> None:
    """All tasks are answered by the same worker, and nothing is left."""
    kombu.pools.reset()
    worker.client = broker.client()
    gate.touch()
    results = [worker.client.AsyncResult(result.id) for result in results]
    assert worker.answers(results) == [f"TEXT {number}" for number in range(PARKED + QUEUED)]
    assert worker.ask("no_model", 1) == 2
    assert worker.log.count(f"{worker.name} ready.") == 1


def left(server: RedisServer) -> int:
    """Messages that workers hold or that wait, by this server."""
    return int(server.client.hlen("unacked")) + int(server.client.llen("work"))


def test_a_worker_follows_sentinels_switch(
    start_worker: StartWorker,
    pair: tuple[RedisServer, RedisServer],
    sentinel: Sentinel,
    server: Server,
    tmp_path: Path,
) -> None:
    broker = broker_at(f"sentinel://127.0.0.1:{sentinel.port}", server, master_name=MASTER)
    worker, results = start(start_worker, broker, tmp_path / "gate")
    sentinel.fail_over()
    poll(lambda: pair[1].client.role()[0] == "master", "the replica's promotion")
    worker.wait_for_log("Connection to broker lost")
    finish(worker, results, tmp_path / "gate", broker)
    poll(lambda: left(pair[1]) == 0, "all messages to be acked")


def test_a_worker_survives_the_death_of_a_master(
    start_worker: StartWorker,
    pair: tuple[RedisServer, RedisServer],
    sentinel: Sentinel,
    server: Server,
    tmp_path: Path,
) -> None:
    broker = broker_at(f"sentinel://127.0.0.1:{sentinel.port}", server, master_name=MASTER)
    worker, results = start(start_worker, broker, tmp_path / "gate")
    pair[0].end()
    poll(lambda: pair[1].client.role()[0] == "master", "the replica's promotion")
    finish(worker, results, tmp_path / "gate", broker)
    poll(lambda: left(pair[1]) == 0, "all messages to be acked")


def test_a_worker_leaves_a_replica_for_the_next_of_its_urls(
    start_worker: StartWorker, pair: tuple[RedisServer, RedisServer], server: Server, tmp_path: Path
) -> None:
    """No Sentinel: the operator changes the roles, and the worker's configuration names both servers."""
    master, replica = pair
    worker, results = start(start_worker, broker_at(f"{master.url};{replica.url}", server), tmp_path / "gate")
    replica.promote()
    master.replicate(replica)
    (tmp_path / "gate").touch()  # the first ack finds out
    worker.wait_for_log("Connection to broker lost")
    finish(worker, results, tmp_path / "gate", broker_at(replica.url, server))
    poll(lambda: left(replica) == 0, "all messages to be acked")


@pytest.mark.parametrize("is_busy", [False, True], ids=["idle", "busy"])
def test_a_worker_waits_for_a_server_that_is_a_replica_for_a_while(
    start_worker: StartWorker, pair: tuple[RedisServer, RedisServer], server: Server, tmp_path: Path, is_busy: bool
) -> None:
    """An idle worker waits for messages: Redis answers `UNBLOCKED`. A busy one asks, or acks: `READONLY`."""
    master, replica = pair
    gate = tmp_path / "gate"
    broker = broker_at(master.url, server)
    if is_busy:
        worker, results = start(start_worker, broker, gate)
    else:
        worker = Sides(start_worker, "controlled").worker("modelpool", broker=broker, PROJECT_GATE=str(gate))
        assert worker.ask("no_model", 1) == 2
    replica.promote()
    master.replicate(replica)
    if is_busy:
        gate.touch()
    worker.wait_for_log("Connection to broker lost")
    worker.wait_for_log("READONLY")
    master.promote()
    if not is_busy:
        kombu.pools.reset()
        worker.client = broker.client()
        results = [worker.send("one", f"text {number}", "gated") for number in range(PARKED + QUEUED)]
    finish(worker, results, gate, broker)
    poll(lambda: left(master) == 0, "all messages to be acked")


def test_a_worker_waits_for_a_server_that_can_not_save(
    start_worker: StartWorker, pair: tuple[RedisServer, RedisServer], server: Server, tmp_path: Path
) -> None:
    """`MISCONF`: Redis can't write to its disk, and refuses all that changes something."""
    master, _ = pair
    broker = broker_at(master.url, server)
    worker, results = start(start_worker, broker, tmp_path / "gate")
    (master.folder / "dump.rdb").mkdir()
    master.client.config_set("save", "1 1")
    poll(lambda: refuses(master), "the server to refuse")
    (tmp_path / "gate").touch()
    worker.wait_for_log("MISCONF")
    (master.folder / "dump.rdb").rmdir()
    master.client.config_set("save", "")
    finish(worker, results, tmp_path / "gate", broker)
    poll(lambda: left(master) == 0, "all messages to be acked")


def test_a_worker_waits_for_a_server_that_runs_a_long_script(
    start_worker: StartWorker, pair: tuple[RedisServer, RedisServer], server: Server, tmp_path: Path
) -> None:
    """`BUSY`: anybody's script on a shared Redis."""
    master, _ = pair
    broker = broker_at(master.url, server)
    worker, results = start(start_worker, broker, tmp_path / "gate")
    master.client.config_set("lua-time-limit", 50)
    master.client.connection_pool.make_connection().send_command("EVAL", "while true do end", 0)
    (tmp_path / "gate").touch()
    worker.wait_for_log("BUSY")
    master.client.script_kill()
    finish(worker, results, tmp_path / "gate", broker)
    poll(lambda: left(master) == 0, "all messages to be acked")


def refuses(server: RedisServer) -> bool:
    """Try to make it save, and see whether it refuses a change then."""
    try:
        server.client.set("any", 1)
        server.client.bgsave()
    except redis.ResponseError as error:
        return "MISCONF" in str(error)
    return False


def test_a_worker_empties_a_server_without_memory_and_goes_on_afterwards(
    start_worker: StartWorker, pair: tuple[RedisServer, RedisServer], server: Server, tmp_path: Path
) -> None:
    """`OOM`: a worker takes what is queued, waits, and hears of new tasks as soon as there is room for them."""
    master, _ = pair
    broker = broker_at(master.url, server)
    worker, results = start(start_worker, broker, tmp_path / "gate")
    master.client.config_set("maxmemory", "1mb")
    (tmp_path / "gate").touch()
    assert worker.answers(results) == [f"TEXT {number}" for number in range(PARKED + QUEUED)]
    poll(lambda: left(master) == 0, "all messages to be acked")
    with pytest.raises(Exception, match="maxmemory"):
        worker.client.connection_for_write().default_channel.client.set("any", 1)
    assert "Connection to broker lost" not in worker.log
    master.client.config_set("maxmemory", "0")
    assert worker.ask("no_model", 1) == 2
