"""Results in groups reach every kind of Redis server that Celery reaches, with Celery's keys, values and times.

In: real `redis-server` processes. Out: what an ordinary client finds there.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import celery
import kombu
import pytest
from celery import Celery, states
from celery.app.task import Context
from harness import poll
from needs import missing
from ownserver import free_port
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError
from replicas import MASTER, RedisServer, Sentinel

from legit_worker import parking
from legit_worker.results import writer
from legit_worker.results.backend import store_in_groups
from legit_worker.results.writer import Group, Writer
from legit_worker.results.writes import Write


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


@pytest.mark.skipif(celery.VERSION < (5, 7), reason="a script counts from Celery 5.7 on")
@pytest.mark.parametrize("is_counted", [False, True], ids=["refused", "no answer"])
def test_a_chord_goes_on_though_a_part_could_not_be_counted_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_counted: bool
) -> None:
    server = RedisServer(tmp_path / "server")
    server.start()
    app = app_of(server.url, {"task_default_queue": "bodies"})
    store_in_groups(app)
    sent = kombu.Connection("memory://").SimpleQueue("bodies")
    backend = app.backend
    failures = [OutOfMemoryError("command not allowed"), RedisConnectionError("gone")]

    try:
        backend.set_chord_size("group", 1)
        part = Context(id="part", group="group", group_index=0, chord=app.signature("body"), delivery_info={})
        script = backend._chord_part_return_script

        def run(**options: Any) -> Any:
            answer = script(**options) if is_counted or not failures else None
            if failures:
                raise failures.pop()
            return answer

        monkeypatch.setattr(backend, "_chord_part_return_script", run)
        backend.mark_as_done("part", 1, part)
        assert sent.get(timeout=20).payload[0] == [[1]]
        assert backend.get_state("part") == states.SUCCESS
    finally:
        server.end()


@pytest.mark.parametrize("conf", [{}, {"result_serializer": "pickle"}, {"result_compression": "zlib"}], ids=str)
@pytest.mark.parametrize("state", [states.RETRY, states.FAILURE, states.STARTED])
def test_a_success_that_another_worker_stored_after_the_look_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conf: Any, state: str
) -> None:
    server = RedisServer(tmp_path / "server")
    server.start()
    conf |= {"accept_content": ["json", "pickle"]}
    ours, stock = app_of(server.url, conf), app_of(server.url, conf)
    store_in_groups(ours)
    look = writer.check

    def look_and_lose(*args: Any, **options: Any) -> None:
        look(*args, **options)
        monkeypatch.setattr(writer, "check", look)
        stock.backend.mark_as_done("task", "elsewhere")

    try:
        ours.backend.store_result("task", ValueError("early"), states.RETRY)
        poll(lambda: stock.AsyncResult("task").state == states.RETRY, "the first state")
        monkeypatch.setattr(writer, "check", look_and_lose)
        ours.backend.store_result("task", {} if state == states.STARTED else ValueError("late"), state)
        poll(lambda: stock.AsyncResult("task").state == states.SUCCESS, "the other worker's result")
        ours.backend.store_result("other", "after it", states.SUCCESS)  # writes keep their order
        assert stock.AsyncResult("task").result == "elsewhere"
    finally:
        server.end()


def test_a_user_who_may_run_no_script_stores_all_states(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = RedisServer(tmp_path / "server")
    server.start()
    try:
        server.client.execute_command("ACL SETUSER", "plain", "on", ">secret", "~*", "&*", "+@all", "-@scripting")
        url = server.url.replace("redis://", "redis://plain:secret@")
        ours, stock = app_of(url, {}), app_of(url, {})
        store_in_groups(ours)
        for number in range(3):
            ours.backend.mark_as_failure(f"bad{number}", ValueError("no"))
        assert all(isinstance(stock.AsyncResult(f"bad{number}").result, ValueError) for number in range(3))
        assert caplog.text.count("runs no script") == 1
        assert len(server.client.execute_command("ACL LOG")) <= 2, "the server is not asked again and again"
    finally:
        server.end()


def test_a_user_who_may_not_store_all_results_has_the_others_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "MOST_WRITES", 2)
    server = RedisServer(tmp_path / "server")
    server.start()
    try:
        server.client.execute_command("ACL SETUSER", "some", "on", ">secret", "%R~*", "~*good*", "&*", "+@all")
        ours, stock = app_of(server.url.replace("redis://", "redis://some:secret@"), {}), app_of(server.url, {})
        store_in_groups(ours)
        backend, to = ours.backend, ours.backend._writer

        def write(task_id: str, state: str) -> Write:
            meta = backend._get_result_meta(result=None, state=state, traceback=None, request=None)
            value = backend.encode(meta | {"task_id": task_id})
            return Write(key=backend.get_key_for_task(task_id), value=value, is_success=state == states.SUCCESS)

        group = Group()
        bad = [write(f"bad{number}", states.SUCCESS) for number in range(2)]
        group.writes += [*bad, write("good", states.RETRY), write("good too", states.SUCCESS)]
        to._groups.put(group)
        to.store(write("good", states.FAILURE))
        found = {name: stock.AsyncResult(name).state for name in ("bad0", "bad1", "good", "good too")}
        assert found == {"bad0": "PENDING", "bad1": "PENDING", "good": "FAILURE", "good too": "SUCCESS"}
        assert all("permissions" in str(one.error) for one in bad)
    finally:
        server.end()


def test_the_script_says_what_celery_says(tmp_path: Path) -> None:
    server = RedisServer(tmp_path / "server")
    server.start()
    try:
        ours, stock = app_of(server.url, {}), app_of(server.url, {})
        store_in_groups(ours)
        heard = [changes_of(server, app.backend, ValueError("no")) for app in (ours, stock)]
        assert heard[0] == heard[1]
        assert len(heard[0]) == 2
    finally:
        server.end()


def changes_of(server: RedisServer, backend: Any, error: Exception) -> list[str]:
    """The writes that a server runs as a failure is stored, without its time."""
    with server.client.monitor() as monitor:
        backend.mark_as_failure("bad", error)
        server.client.delete("bad-is-stored")
        heard = []
        for one in monitor.listen():
            if one["command"].startswith("DEL bad-is-stored"):
                return heard
            if one["command"].startswith(("SET", "PUBLISH")):
                heard.append(re.sub(r"\d{4}-\d\d-\d\dT[\d:.+]+", "TIME", one["command"]))
    return heard
