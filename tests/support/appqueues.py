"""An app's side of result routing: its queue, read as the app would.

In: a worker's broker and a queue's name. Out: envelopes, each checked against the schema.
"""

from __future__ import annotations

import itertools
import json
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import kombu
import redis
from celery.result import AsyncResult
from envelopes import check
from harness import ANSWER_SECONDS, Broker, Worker, poll

Envelope = dict[str, Any]


@dataclass
class AppQueue:
    """The queue of one app, in format `json`."""

    url: str
    name: str
    #: All that was taken so far.
    seen: list[Envelope] = field(default_factory=list)

    def take(self) -> list[Envelope]:
        """What lies there now, which then lies there no more."""
        read = _read_redis if self.url.startswith("redis") else _read_amqp
        taken = [json.loads(body, parse_constant=_refuse) for body in read(self.url, self.name)]
        for envelope in taken:
            check(envelope)
        self.seen += taken
        return taken

    def exists(self) -> bool:
        """Whether the server has such a queue."""
        if self.url.startswith("redis"):
            with redis.Redis.from_url(self.url) as server:
                return bool(server.exists(self.name))
        with kombu.Connection(self.url) as connection, suppress(connection.channel_errors):
            connection.default_channel.queue_declare(self.name, passive=True)
            return True
        return False

    def wait_for(self, ids: Iterable[str], seconds: float = ANSWER_SECONDS) -> None:
        """Until each of these ids was seen."""
        missing = set(ids)

        def nothing_is_missing() -> bool:
            self.take()
            missing.difference_update(envelope["id"] for envelope in self.seen)
            return not missing

        try:
            poll(nothing_is_missing, f"envelopes on {self.name}", seconds)
        except AssertionError:
            raise AssertionError(
                f"{len(missing)} envelopes are missing on {self.name}: {sorted(missing)[:5]}"
            ) from None

    def duplicates(self) -> int:
        """How many were seen again: the same id and attempt."""
        return len(self.seen) - len({(envelope["id"], envelope["attempt"]) for envelope in self.seen})


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def _read_redis(url: str, name: str) -> list[bytes]:
    with redis.Redis.from_url(url) as server:
        bodies = []
        while (body := server.lpop(name)) is not None:
            bodies.append(body)
    return bodies


def _read_amqp(url: str, name: str) -> list[bytes]:
    bodies = []
    with kombu.Connection(url) as connection, suppress(connection.channel_errors):
        channel = connection.default_channel
        while (message := channel.basic_get(name, no_ack=True)) is not None:
            assert message.properties["delivery_mode"] == 2
            assert message.properties["content_type"] == "application/json"
            body = message.body
            bodies.append(body if isinstance(body, bytes) else body.encode())
    return bodies


def routed(broker: Broker, *apps: str, **more: str) -> dict[str, str]:
    """The variables that switch these apps on, each with a queue that no other test has. `more` goes to each app."""
    settings = {}
    for app in apps:
        each = {"RESULT_ROUTING": "on", "QUEUE": queue_name(broker, app)} | more
        settings |= {f"LEGIT_WORKER_APPS__{app.upper()}__{name}": text for name, text in each.items()}
    return settings


def queue_name(broker: Broker, app: str) -> str:
    """What `routed` calls it."""
    return f"{broker.queue}.{app}.results"


def app_queue(broker: Broker, app: str) -> AppQueue:
    """The queue that `routed` gave to an app."""
    return AppQueue(broker.url, queue_name(broker, app))


_sentinels = itertools.count()


@dataclass
class Apps:
    """A worker, and the apps that wait for its results."""

    worker: Worker
    queues: Mapping[str, AppQueue]
    #: By app, how many envelopes were seen when it was last asked.
    _asked: dict[str, int] = field(default_factory=dict)

    @property
    def client(self) -> Any:
        return self.worker.client

    def send(
        self, task: str, *args: Any, app: str | None = "alpha", headers: Any = None, **options: Any
    ) -> AsyncResult[Any]:
        """One task for an app, named in the header."""
        named = {"app": app} if app else {}
        return self.client.send_task(task, args, headers=named | (headers or {}), **options)

    def told(self, app: str = "alpha", *ids: str) -> list[Envelope]:
        """What an app was told since it was last asked: of these tasks, and of all up to one that is sent now."""
        queue = self.queues[app]
        start = self._asked.get(app, 0)
        queue.wait_for(ids)
        last = self.send("double", 0, app=app, task_id=f"sentinel-{next(_sentinels)}")
        queue.wait_for([last.id])
        self._asked[app] = len(queue.seen)
        return [envelope for envelope in queue.seen[start:] if not envelope["id"].startswith("sentinel-")]

    def forget(self) -> None:
        """What was told so far is not told again."""
        for app, queue in self.queues.items():
            queue.take()
            self._asked[app] = len(queue.seen)

    def only(self, result: AsyncResult[Any], app: str = "alpha", *, settle: bool = True) -> Envelope:
        """The one envelope there is, and it is for this task."""
        if settle:
            self.worker.settle([result])
        (envelope,) = self.told(app, result.id)
        assert envelope["id"] == result.id
        assert envelope["app"] == app
        return envelope

    def task(self, name: str, *args: Any, headers: Any = None, app: str | None = "alpha") -> Any:
        """A part of a canvas, for an app."""
        named = {"app": app} if app else {}
        options = {"headers": named | (headers or {}), "task_id": str(uuid.uuid4())}
        return self.client.signature(name, args).set(**options)

    def counts(self) -> Any:
        """What `celery inspect stats` says of routing. An app is there from its first result on."""
        found = self.worker.pool()["routing"]
        none = {"sent": 0, "failed": 0, "dead": 0, "waiting": 0}
        return found | {"apps": defaultdict(lambda: none, found["apps"])}
