"""While every app's routing is off, the servers hear what stock Celery says to them: the bytes are compared.

A recording proxy stands between the worker and its broker, and another between it and its results. Tasks of every
kind are sent one after the other, so that two runs of stock Celery say the same, which the first test shows.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
from celery import chain, chord
from harness import CUSTOM, SIMULATED, StartWorker, Worker
from wire import Command, Recorder, mask

from legit_worker.results.conditional import SHA1, STORE

#: How a project asks for the backend without `install`.
SHIM = "legit_worker.routing:RoutingBackend+"

#: Two apps that are known and not routed, and the app that the tasks below are for is one of them.
OFF = {
    "LEGIT_WORKER_APPS__ALPHA__RESULT_ROUTING": "off",
    "LEGIT_WORKER_APPS__BETA__QUEUE": "beta.results",
}

#: What a producer would send for one of them.
HEADERS = {"app": "alpha", "meta": {"row": 1}}


@dataclass
class Heard:
    """What both servers heard from one worker, masked."""

    broker: list[list[Command]]
    results: list[list[Command]]
    #: All of it, unmasked.
    raw: bytes


@contextlib.contextmanager
def recorders(*urls: str) -> Iterator[list[Recorder]]:
    with contextlib.ExitStack() as stack:
        started = [Recorder(url) for url in urls]
        for recorder in started:
            stack.callback(recorder.close)
        yield started


def hear(start: StartWorker, servers: Any, *, shim: str = "", **settings: str) -> Heard:
    """Run all tasks on a worker whose servers are listened to."""
    direct = servers.fresh()
    if not all(urlsplit(url).scheme == "redis" for url in (direct.url, direct.backend)):
        pytest.skip("the recorder speaks Redis")
    with redis.Redis.from_url(direct.backend) as connection:
        # Celery sends a script's text to a server that doesn't know it yet: each run does.
        connection.script_flush()
    with recorders(direct.url, direct.backend) as (broker, results):
        ours = {"CELERY_BROKER_URL": broker.url, "CELERY_RESULT_BACKEND": shim + results.url}
        worker = start("routed", broker=direct, environment=SIMULATED | CUSTOM | ours | settings)
        run_all(worker)
        assert worker.stop() == 0
        return Heard(broker.connections(), results.connections(), broker.raw() + results.raw())


def run_all(worker: Worker) -> None:
    """One task after the other, each with an id that every run gives it."""
    for number, (name, args, options) in enumerate(TASKS):
        result = worker.client.send_task(name, args, task_id=f"fixed-{number}", headers=HEADERS, **options)
        if name == "quiet":
            worker.wait_for_log(f"[fixed-{number}] succeeded")
        else:
            worker.settle([result])
    revoke(worker)
    for name, canvas in canvases(worker.client).items():
        worker.settle([canvas.apply_async(task_id=f"fixed-{name}", headers=HEADERS)])


#: Name, arguments, options.
TASKS: list[tuple[str, list[Any], dict[str, Any]]] = [
    ("double", [1], {}),
    ("fails", [], {}),
    ("quiet", [1], {}),
    ("again", [], {}),
    ("gives_up", [], {}),
    ("double", [3], {"expires": -10}),
    ("no_such_task", [], {}),
    ("odd", ["set"], {}),
    ("one", ["text"], {}),
    ("sends", [4], {}),
    ("double", [5], {}),
]


def revoke(worker: Worker) -> None:
    """A task that is revoked before it is sent."""
    worker.client.control.revoke("fixed-revoked")
    worker.wait_for_log("fixed-revoked")
    worker.settle([worker.client.send_task("double", [1], task_id="fixed-revoked", headers=HEADERS)])


def canvases(client: Any) -> dict[str, Any]:
    """By name. Their inner ids are fixed as well, so that their results can be compared."""

    def task(name: str, number: int, *args: Any) -> Any:
        return client.signature(name, args).set(task_id=f"fixed-{name}-{number}", headers=HEADERS)

    return {
        "chain": chain(task("double", 1, 1), task("double", 2), task("double", 3)),
        "broken chain": chain(task("fails", 1), task("double", 5)),
        "chord": chord([task("double", 6, 1), task("double", 7, 2)], client.signature("total"), app=client),
        "broken chord": chord([task("double", 8, 1), task("fails", 2)], client.signature("total"), app=client),
    }


@pytest.fixture(scope="module")
def stock(start_module_worker: StartWorker, servers: Any) -> Heard:
    return hear(start_module_worker, servers)


def test_stock_celery_says_the_same_twice(stock: Heard, start_worker: StartWorker, servers: Any) -> None:
    """Otherwise the other tests compare nothing."""
    second = hear(start_worker, servers)
    difference = first_difference(second.results, stock.results)
    assert not difference, difference
    assert published(second.broker) == published(stock.broker)
    stored = [one for connection in stock.results for one in connection if one[0] == b"SETEX"]
    assert len({one[1] for one in stored}) > len(TASKS)
    assert b"legit" not in stock.raw.replace(b"/legit_worker", b"")


def test_the_backend_with_every_app_off_says_what_stock_says(
    stock: Heard, start_worker: StartWorker, servers: Any
) -> None:
    ours = hear(start_worker, servers, shim=SHIM, **OFF)
    difference = first_difference(ours.results, stock.results)
    assert not difference, difference
    assert published(ours.broker) == published(stock.broker)
    assert b"legit" not in ours.raw.replace(b"/legit_worker", b"")


def test_the_pool_with_every_app_off_says_what_stock_says_of_each_task(start_worker: StartWorker, servers: Any) -> None:
    """Tasks overlap in the pool: the same commands, in an order of their own. Late acks are the pool's default.

    Results are stored in groups: how the backend is asked for what it has, nobody else can see. A state that is no
    SUCCESS is stored by a script.

    Messages are taken and acked by a script; what it leaves there is compared in
    `tests/integration/test_redis_broker.py`.
    """
    stock = hear(start_worker, servers, PROJECT_ACKS_LATE="1")
    ours = hear(start_worker, servers, LEGIT_WORKER_ENABLED="1", **OFF)
    assert changes(ours.results) == changes(stock.results)
    assert sent(ours.broker) == sent(stock.broker)


def first_difference(ours: list[list[Command]], stock: list[list[Command]]) -> Any:
    """Where two lists of connections part, small enough to be read."""
    pairs = itertools.zip_longest(ours, stock, fillvalue=[])
    both = (pair for connections in pairs for pair in itertools.zip_longest(*connections))
    return next((pair for pair in both if pair[0] != pair[1]), None)


def published(connections: list[list[Command]]) -> Counter[Command]:
    """The messages that the worker sent, took and acked. How often it looks for more, or tells of itself, depends on
    the clock."""
    counts = counted(connections)
    return Counter({one: count for one, count in counts.items() if one[0] in MOVES and b"celeryev" not in one[1]})


def sent(connections: list[list[Command]]) -> Counter[Command]:
    """The same without what was taken and acked."""
    counts = published(connections)
    return Counter({one: count for one, count in counts.items() if not one[1].startswith((b"unacked", b"legit."))})


def changes(connections: list[list[Command]]) -> Counter[Command]:
    """What others can see."""
    said = [[one for one in unfolded(connection) if one[0] not in UNSEEN] for connection in connections]
    return counted(said)


def unfolded(connection: list[Command]) -> Iterator[Command]:
    """The commands that a server runs: the script that stores a state, once the server knows it, stands for two.

    `tests/integration/test_result_servers.py` compares on the server itself what the script runs.
    """
    is_known = False
    for command in connection:
        if command[0] == b"SCRIPT" and command[2:] == (mask(STORE.encode()),):
            is_known = True
        elif command[:2] == (b"EVALSHA", SHA1.encode()):
            key, _, expires, value = command[3:]
            yield from [(b"SETEX", key, expires, value), (b"PUBLISH", key, value)] if is_known else []
        else:
            yield command


#: Questions, and what only holds commands together.
UNSEEN = (b"GET", b"MGET", b"MULTI", b"EXEC")

#: The commands by which kombu moves a message.
MOVES = (b"LPUSH", b"RPUSH", b"PUBLISH", b"HSET", b"HDEL", b"ZADD", b"ZREM", b"SETEX")


def counted(connections: list[list[Command]]) -> Counter[Command]:
    return Counter(one for connection in connections for one in connection)
