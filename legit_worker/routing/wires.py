"""A connection to the server of an app's queue.

In: deliveries, a group at a time. Out: a return once the server has them, or an error. One thread uses it.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from cachetools import LRUCache
from celery import Celery
from kombu import Connection, Producer, Queue
from kombu.exceptions import ChannelError

from legit_worker.routing.formats import Message, Push, message, pushes
from legit_worker.settings import AppSettings

#: Seconds that a server has to answer, before the lane tries it again.
PATIENCE = 5

#: The most queues that a wire remembers: more than there are apps. Tasks may name any number of queues.
KNOWN_QUEUES = 1000


@dataclass(eq=False, kw_only=True)
class Delivery:
    """One envelope on its way."""

    app: str
    chosen: AppSettings
    queue: str
    task_id: str
    envelope: bytes
    #: Done as soon as the app's server has it, or the server of the dead letters.
    done: Future[None] = field(default_factory=Future)
    #: The time on the monotonic clock at which it becomes a dead letter; None keeps trying for ever.
    deadline: float | None = None

    def pushes(self) -> list[Push]:
        """Return the values for Redis."""
        return pushes(self.chosen, self.queue, self.task_id, self.envelope)

    def message(self) -> Message:
        """Return the message for any other broker."""
        return message(self.chosen, self.task_id, self.envelope)


def connect(app: Celery, url: str | None) -> Connection:
    """Return a connection to the server at `url`, or to the app's broker. It is not open yet."""
    # The broker's TLS and login are not for another server.
    connection = Connection(url) if url else app.connection_for_write()
    # The app's setting names the whole key.
    connection.transport_options.pop("global_keyprefix", None)
    if is_redis(connection):
        for name in ("socket_timeout", "socket_connect_timeout"):
            connection.transport_options.setdefault(name, PATIENCE)
    else:
        connection.connect_timeout = PATIENCE
        if connection.transport.driver_type == "amqp":
            connection.transport_options |= {
                "confirm_publish": True,
                "read_timeout": PATIENCE,
                "write_timeout": PATIENCE,
            }
    return connection


def is_redis(connection: Connection) -> bool:
    """Tell whether the server keeps queues as Redis lists."""
    return bool(connection.transport.driver_type == "redis")


def reach(connection: Connection) -> None:
    """Open a connection. If the server is away, raise its library's error at once: kombu would try for long."""
    connection.ensure_connection(max_retries=1, timeout=PATIENCE, interval_start=0, reraise_as_library_errors=False)


def open_wire(app: Celery, url: str | None) -> Wire:
    """Return the wire for the server at `url`, or for the app's broker."""
    connection = connect(app, url)
    return RedisWire(connection) if is_redis(connection) else BrokerWire(connection)


class Wire:
    """A lane's connection. It opens a channel at the first use, and again after a failure."""

    #: The most deliveries that `send` takes.
    group_size: int

    def __init__(self, connection: Connection) -> None:
        #: The server's URL, without a password.
        self.name = connection.as_uri()
        self._connection = connection
        self._channel: Any = None
        #: The errors that tell that the server is away, and the delivery is not at fault.
        self.away: tuple[type[Exception], ...] = (OSError, *connection.connection_errors)

    @property
    def channel(self) -> Any:
        """An open channel. Raises an error of `away` at once."""
        if self._channel is None:
            reach(self._connection)
            self._channel = self._connection.channel()
        return self._channel

    def send(self, deliveries: list[Delivery]) -> None:
        """Return when the server has them all. Raises an error of `away`, or the server's own."""
        raise NotImplementedError

    def close(self) -> None:
        """Forget the connection; `send` makes another."""
        self._channel = None
        with suppress(Exception):
            self._connection.collect()


class RedisWire(Wire):
    """The wire to Redis or Valkey."""

    group_size = 128

    def send(self, deliveries: list[Delivery]) -> None:
        """Push all in one transaction."""
        with self.channel.client.pipeline() as pipeline:
            for command in commands(push for delivery in deliveries for push in delivery.pushes()):
                pipeline.execute_command(*command)
            pipeline.execute()


def commands(values: Iterable[Push]) -> list[tuple[str, str, bytes]]:
    """Return the Redis commands that push these values."""
    return [("LPUSH" if value.left else "RPUSH", value.key, value.value) for value in values]


class BrokerWire(Wire):
    """The wire to RabbitMQ, or to any other broker that kombu knows."""

    #: After a failure a whole group is sent again.
    group_size = 1

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._is_amqp = connection.transport.driver_type == "amqp"
        self._known: LRUCache[str, bool] = LRUCache(KNOWN_QUEUES)

    def send(self, deliveries: list[Delivery]) -> None:
        """Publish each, and wait for the broker to confirm it."""
        for delivery in deliveries:
            self._confirmed(delivery.queue, delivery.message())

    def close(self) -> None:
        """Forget the connection, and the queues that it has declared."""
        self._known.clear()
        super().close()

    def _confirmed(self, queue: str, parcel: Message) -> None:
        try:
            self._publish(queue, parcel)
        except ChannelError:
            # Somebody may have deleted a known queue. Declare it again.
            self.close()
            self._publish(queue, parcel)

    def _publish(self, queue: str, parcel: Message) -> None:
        self._declare(queue)
        # Without `mandatory`, the broker confirms a message for a deleted queue, and drops it.
        amqp_only = {"mandatory": True, "timeout": PATIENCE, "confirm_timeout": PATIENCE} if self._is_amqp else {}
        Producer(self.channel).publish(
            parcel.body,
            routing_key=queue,
            exchange="",
            content_type="application/json",
            content_encoding="utf-8",
            delivery_mode=2,
            headers=parcel.headers,
            **parcel.properties,
            **amqp_only,
        )

    def _declare(self, queue: str) -> None:
        """Declare a queue, once per connection. A queue that its owner made with other arguments stays as it is."""
        if self._known.get(queue):
            return
        try:
            Queue(queue, channel=self.channel).queue_declare(passive=True)
        except ChannelError:  # the queue is missing, and the broker has closed the channel
            self.close()
            Queue(queue, channel=self.channel, durable=True).queue_declare()
        self._known[queue] = True
