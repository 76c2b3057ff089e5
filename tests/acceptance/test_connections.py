"""The ways to a Redis broker that a project may have, and what an operator does to its connections."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import kombu.pools
import pytest
from harness import Broker, Sides, StartWorker, Worker, poll
from ownserver import Server, free_port
from replicas import RedisServer

TASKS = 200


@pytest.fixture
def start_redis(tmp_path: Path) -> Iterator[Callable[..., RedisServer]]:
    """Starts a `redis-server` with options of its command line."""
    servers: list[RedisServer] = []

    def start(*arguments: str) -> RedisServer:
        servers.append(RedisServer(tmp_path / f"redis{len(servers)}", arguments))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.end()


def broker_at(url: str, backend: Server, **options: Any) -> Broker:
    """A broker whose results are elsewhere, so that all keys on its server are a broker's."""
    environment = {"PROJECT_TRANSPORT_OPTIONS": json.dumps(options)}
    return Broker(url=url, backend=backend.url, queue="work", transport_options=options, environment=environment)


def work(worker: Worker, server: RedisServer, prefix: str = "") -> None:
    """Two hundred tasks are done, nothing is left, and the worker ends well."""
    results = [worker.send("one", f"text {number}", "upper") for number in range(TASKS)]
    assert worker.answers(results) == [f"TEXT {number}" for number in range(TASKS)]
    assert worker.log.count(f"{worker.name} ready.") == 1
    poll(lambda: not server.client.hlen(f"{prefix}unacked"), "all messages to be acked")
    assert worker.stop() == 0
    assert "Traceback" not in worker.log


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate that vouches for itself, and its key."""
    key, pem = folder / "key.pem", folder / "cert.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext"
    subprocess.run(
        [*command.split(), "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(pem)],
        check=True,
        capture_output=True,
    )
    return pem, key


def test_by_tls(
    start_worker: StartWorker, start_redis: Callable[..., RedisServer], server: Server, tmp_path: Path
) -> None:
    pem, key = certificate(tmp_path)
    port = free_port()
    files = ["--tls-cert-file", str(pem), "--tls-key-file", str(key), "--tls-ca-cert-file", str(pem)]
    redis_server = start_redis("--tls-port", str(port), *files, "--tls-auth-clients", "no")
    url = f"rediss://localhost:{port}/0?ssl_cert_reqs=required&ssl_ca_certs={pem}"
    worker = Sides(start_worker).worker("modelpool", broker=broker_at(url, server))
    assert worker.pool()["messages"] == "reserved in groups"
    work(worker, redis_server)


def test_by_a_unix_socket(
    start_worker: StartWorker, start_redis: Callable[..., RedisServer], server: Server, tmp_path: Path
) -> None:
    path = tmp_path / "redis.sock"
    redis_server = start_redis("--unixsocket", str(path))
    worker = Sides(start_worker).worker("modelpool", broker=broker_at(f"redis+socket://{path}?virtual_host=0", server))
    assert worker.pool()["messages"] == "reserved in groups"
    work(worker, redis_server)


def test_with_a_prefix_of_all_keys(
    start_worker: StartWorker, start_redis: Callable[..., RedisServer], server: Server
) -> None:
    redis_server = start_redis()
    broker = broker_at(redis_server.url, server, global_keyprefix="mine:")
    worker = Sides(start_worker).worker("modelpool", broker=broker)
    assert worker.pool()["messages"] == "reserved in groups"
    keys = set(redis_server.client.keys())
    work(worker, redis_server, "mine:")
    keys |= set(redis_server.client.keys())
    assert keys
    assert all(key.startswith("mine:") for key in keys), keys


@pytest.mark.parametrize("rights", ["-eval", "-blmove"])
def test_by_a_user_who_may_not_run_all_commands(
    start_worker: StartWorker, start_redis: Callable[..., RedisServer], server: Server, rights: str
) -> None:
    """Without `EVAL`, all is as ever. Without `BLMOVE`, the worker fetches messages as kombu does, and says so once.

    Bytes that are no message end no worker in either way, as they end a stock one.
    kombu itself needs `EVALSHA` and `SCRIPT LOAD`.
    """
    redis_server = start_redis()
    redis_server.client.execute_command(f"ACL SETUSER limited on >secret ~* &* +@all {rights}")
    url = f"redis://limited:secret@127.0.0.1:{redis_server.port}/0"
    worker = Sides(start_worker).worker("modelpool", broker=broker_at(url, server))
    poll(lambda: ("fetched" in worker.pool()["messages"]) == (rights == "-blmove"), "the worker's way")
    garbage = ["garbage", "3", "[]"]
    redis_server.client.lpush("work", *garbage)
    work(worker, redis_server)
    assert worker.log.count("does not let this worker reserve messages") == (rights == "-blmove")
    assert redis_server.client.lrange("legit.unreadable", 0, -1) == garbage


def runs(worker: Worker) -> Counter[str]:
    """How often each item was computed."""
    return Counter(re.findall(r"(text \d+) was computed$", worker.log, re.MULTILINE))


#: What an operator does, some times, a moment apart.
DISTURBANCES: dict[str, Callable[[RedisServer], Any]] = {
    "killed": lambda server: server.client.execute_command("CLIENT KILL TYPE normal"),
    "paused": lambda server: server.client.execute_command("CLIENT PAUSE 700 ALL"),
    "paused for writes": lambda server: server.client.execute_command("CLIENT PAUSE 700 WRITE"),
}


@pytest.mark.parametrize("disturbance", DISTURBANCES)
def test_connections_are_disturbed_in_the_middle_of_batches(
    start_worker: StartWorker, start_redis: Callable[..., RedisServer], server: Server, disturbance: str
) -> None:
    """Each task runs once: those that began go on, and those that did not are given back."""
    redis_server = start_redis()
    broker = broker_at(redis_server.url, server)
    settings = {"LEGIT_WORKER_MODELS__SIM__PATH": "0.02,0.01"}
    worker = Sides(start_worker, "controlled").worker("modelpool", broker=broker, **settings)
    results = [worker.send("tidies", f"text {number}", "sim") for number in range(400)]
    for number in range(10):
        poll(lambda: len(runs(worker)) >= 30 * (number + 1), "some more to be done")  # noqa: B023
        DISTURBANCES[disturbance](redis_server)
    kombu.pools.reset()
    worker.renew_client()
    worker.answers([worker.client.AsyncResult(result.id) for result in results])
    assert runs(worker) == Counter(f"text {number}" for number in range(400))
    poll(lambda: not redis_server.client.hlen("unacked"), "all messages to be acked")
    assert worker.log.count(f"{worker.name} ready.") == 1
    assert worker.stop() == 0
    assert not redis_server.client.llen("work")


def test_at_a_node_of_a_cluster(
    start_worker: StartWorker, start_redis: Callable[..., RedisServer], server: Server
) -> None:
    """kombu has no transport for clusters, and the worker says so as it ends."""
    redis_server = start_redis("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    redis_server.client.execute_command("CLUSTER ADDSLOTSRANGE 0 16383")
    poll(lambda: redis_server.client.execute_command("CLUSTER INFO")["cluster_state"] == "ok", "the cluster")
    settings = {"LEGIT_WORKER_ENABLED": "1"}
    worker = start_worker(broker=broker_at(redis_server.url, server), environment=settings, wait=False)
    assert worker.wait() != 0
    assert "kombu has no transport for clusters" in worker.log


def test_another_apps_shorter_visibility_timeout_makes_no_task_run_twice(
    start_worker: StartWorker, start_redis: Callable[..., RedisServer], server: Server, tmp_path: Path
) -> None:
    """Both apps keep their unacked messages under one key, and each worker gives back what is too old for itself."""
    url, looks = start_redis().url, {"unacked_restore_throttle": 1, "unacked_restore_interval": 1}
    broker = broker_at(url, server)
    gate = {"PROJECT_GATE": str(tmp_path / "gate")}
    worker = Sides(start_worker, "controlled").worker("modelpool", broker=broker, **gate)
    other_broker = replace(broker_at(url, server, visibility_timeout=3, **looks), queue="other")
    other = Sides(start_worker, "controlled").worker("modelpool", broker=other_broker, **gate)
    results = [worker.send("tidies", f"text {number}", "gated") for number in range(20)]
    poll(lambda: worker.pool()["parked"] == 20, "all of them to park")
    begin = time.monotonic()
    poll(lambda: time.monotonic() - begin > 10 and other.ask("no_model", 1) == 2, "three times the shorter timeout")
    (tmp_path / "gate").touch()
    worker.answers(results)
    assert runs(worker) == Counter(f"text {number}" for number in range(20))
    assert len(worker.received) == len(re.findall(r"Task tidies\S+ received", worker.log)) == 20
