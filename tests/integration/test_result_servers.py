"""Results in groups reach every kind of Redis server that Celery reaches, with Celery's keys, values and times.

In: real `redis-server` processes. Out: what an ordinary client finds there.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, states
from harness import poll
from needs import missing
from ownserver import free_port
from replicas import MASTER, RedisServer, Sentinel

from legit_worker import parking
from legit_worker.results.backend import store_in_groups
from legit_worker.results.writer import Writer


class Around(parking.Host):
    """As if every caller were Celery's code around a task: what would park blocks."""

    def park(self, done: Future[Any], what: str, counts: bool) -> bool:
        futures.wait([done], timeout=60)
        return done.done()

    @property
    def is_around_task(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def around() -> Iterator[None]:
    parking.use(Around())
    yield
    parking.stop()


@pytest.fixture
def at_unix_socket(tmp_path: Path) -> Iterator[tuple[str, Any]]:
    server = RedisServer(tmp_path / "server", ("--unixsocket", str(tmp_path / "socket")))
    server.start()
    yield f"redis+socket://{tmp_path / 'socket'}?virtual_host=0", {}
    server.end()


@pytest.fixture
def with_prefix(tmp_path: Path) -> Iterator[tuple[str, Any]]:
    server = RedisServer(tmp_path / "server")
    server.start()
    yield server.url, {"result_backend_transport_options": {"global_keyprefix": "mine"}}
    server.end()


@pytest.fixture
def by_tls(tmp_path: Path) -> Iterator[tuple[str, Any]]:
    if shutil.which("openssl") is None:
        missing("openssl is not there")
    key, certificate, port = tmp_path / "key", tmp_path / "certificate", free_port()
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*request, *names, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    files = ["--tls-cert-file", str(certificate), "--tls-key-file", str(key), "--tls-ca-cert-file", str(certificate)]
    server = RedisServer(tmp_path / "server", ("--tls-port", str(port), *files, "--tls-auth-clients", "no"))
    server.start()
    yield f"rediss://localhost:{port}/0?ssl_cert_reqs=CERT_REQUIRED&ssl_ca_certs={certificate}", {}
    server.end()


@pytest.fixture
def by_sentinel(tmp_path: Path) -> Iterator[tuple[str, Any]]:
    master, replica, sentinel = (RedisServer(tmp_path / name) for name in ("master", "replica", "sentinel"))
    sentinel = Sentinel(tmp_path / "sentinel")
    try:
        master.start()
        replica.start()
        replica.replicate(master)
        sentinel.watch(master)
        url = f"sentinel://127.0.0.1:{sentinel.port}/0"
        yield url, {"result_backend_transport_options": {"master_name": MASTER}}
    finally:
        for server in (master, replica, sentinel):
            server.end()


def app_of(url: str, conf: Any) -> Celery:
    app = Celery("app", broker="memory://", backend=url, set_as_current=False)
    app.conf.update(conf, result_expires=1000)
    return app


@pytest.mark.parametrize("kind", ["at_unix_socket", "with_prefix", "by_tls", "by_sentinel"])
def test_a_client_finds_what_was_stored_there(request: pytest.FixtureRequest, kind: str) -> None:
    url, conf = request.getfixturevalue(kind)
    ours, stock = app_of(url, conf), app_of(url, conf)
    store_in_groups(ours)
    ours.backend.mark_as_done("good", [1, 2])
    ours.backend.mark_as_failure("bad", ValueError("no"))
    ours.backend.mark_as_failure("good", ValueError("too late"))
    assert isinstance(ours.backend._writer, Writer)
    assert stock.AsyncResult("good").result == [1, 2]
    assert isinstance(stock.AsyncResult("bad").result, ValueError)
    for task_id in ("good", "bad"):
        assert 900 < stock.backend.client.ttl(stock.backend.get_key_for_task(task_id)) <= 1000


def test_results_follow_sentinels_switch(by_sentinel: tuple[str, Any], tmp_path: Path) -> None:
    url, conf = by_sentinel
    ours, stock = app_of(url, conf), app_of(url, conf)
    store_in_groups(ours)
    ours.backend.mark_as_done("before", 1)
    sentinel = url.removeprefix("sentinel://127.0.0.1:").partition("/")[0]
    subprocess.run(["redis-cli", "-p", sentinel, "SENTINEL", "FAILOVER", MASTER], check=True, capture_output=True)
    for number in range(20):
        ours.backend.mark_as_done(f"task{number}", number)
    poll(lambda: all(stock.AsyncResult(f"task{n}").state == states.SUCCESS for n in range(20)), "all results")
