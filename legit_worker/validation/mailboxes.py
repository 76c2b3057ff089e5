"""The private queues of one comparison: one for its tasks, and one per format for its results.

In: the project's app. Out: the content that each format's consumer would find. Afterwards the queues are deleted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from celery import Celery
from kombu import Queue
from kombu.exceptions import OperationalError

from legit_worker.routing.letters import dead_queue
from legit_worker.routing.wires import connect, is_redis, reach
from legit_worker.validation.paths import ROUTES, Route
from legit_worker.validation.reference import ValidationError


@contextmanager
def usable(what: str) -> Iterator[None]:
    """Turn a client library's error about a missing server into one sentence."""
    try:
        yield
    except ValidationError:
        raise
    except Exception as error:
        raise ValidationError(
            f"{what} can't be used: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


class Mailboxes:
    """A context that owns one connection to the broker. One thread uses it. Entering raises `ValidationError`."""

    def __init__(self, app: Celery, run: str) -> None:
        self._app = app
        self._run = run
        with usable("the broker"):
            self._connect()

    def _connect(self) -> None:
        # As the worker's routing connects: without the prefix of the project's own queues.
        self._connection = connect(self._app, None)
        self._is_redis = is_redis(self._connection)
        if self._connection.transport.driver_type == "memory":
            raise ValidationError("the broker memory:// reaches no other process, and the worker is one: name another")
        #: The errors that tell that the server is away.
        self.away = (OSError, OperationalError, *self._connection.connection_errors)

    @property
    def tasks(self) -> str:
        """The queue of the tasks."""
        return f"{self._run}.tasks"

    def __enter__(self) -> Mailboxes:
        with usable("the broker"):
            reach(self._connection)
            self._channel = self._connection.channel()
            if not self._is_redis:
                for route in ROUTES:
                    self._queue(route.queue(self._run)).queue_declare()
        return self

    def __exit__(self, *_: object) -> None:
        self._delete_results()
        self._connection.release()
        with suppress(Exception), self._app.connection_for_write() as connection:
            queue = self._app.amqp.queues[self.tasks](connection.default_channel)
            queue.declare()  # kombu deletes on Redis only what this process has declared
            queue.delete()
            queue.exchange.delete()

    def read(self) -> Iterator[tuple[Route, Any]]:
        """Take what has come since the last call: bytes, or the value that kombu decoded."""
        for route in ROUTES:
            while (content := self._next(route)) is not None:
                yield route, content

    def _next(self, route: Route) -> Any:
        """Read Redis lists as phpredis and `redis-cli` do, and other queues by kombu, as Celery does."""
        queue = route.queue(self._run)
        if self._is_redis and route.format == "laravel":
            return self._channel.client.lpop(f"queues:{queue}")
        if self._is_redis and route.format == "json":
            return self._channel.client.lpop(queue)
        message = self._queue(queue).get(no_ack=True, accept=["json"])
        if message is None:
            return None
        return message.payload if route.format == "celery" else message.body

    def _queue(self, name: str) -> Any:
        return Queue(name, channel=self._channel, durable=True)

    def _delete_results(self) -> None:
        names = [name for route in ROUTES for name in (route.queue(self._run), dead_queue(route.app))]
        if self._is_redis:
            laravel = [f"queues:{name}{end}" for name in names for end in ("", ":notify")]
            with suppress(Exception):
                self._channel.client.delete(*names, *laravel)
            return
        for name in names:
            with suppress(Exception):
                self._queue(name).delete()
