"""A connection to the server of an app's queue.

In: deliveries, a group at a time. Out: the server's word that it has them, or an error. Used by one thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from cachetools import LRUCache
from celery import Celery
from kombu import Connection, Producer, Queue
from kombu.exceptions import ChannelError

from legit_worker.routing.formats import Message, Push, message, pushes
from legit_worker.settings import AppSettings

#: Seconds that a server may take to answer. It is tried again after that.
PATIENCE = 5

#: Queues that are known to be there: more than there are apps. Tasks may name queues of their own without end.
KNOWN_QUEUES = 1000


@dataclass(eq=False, kw_only=True)
class Delivery:
    """One envelope on its way."""

    app: str
    chosen: AppSettings
    queue: str
    task_id: str
    envelope: bytes
    #: Done once a server has it: the app's own, or the one that keeps dead letters.
    done: Future[None] = field(default_factory=Future)
    #: Seconds on the monotonic clock after which it goes to the dead letters; None keeps trying for ever.
    deadline: float | None = None

    def pushes(self) -> list[Push]:
        """For Redis."""
        return pushes(self.chosen, self.queue, self.task_id, self.envelope)

    def message(self) -> Message:
        """For any other broker."""
        return message(self.chosen, self.task_id, self.envelope)


class Wire(Protocol):
    """What a lane sends through."""

    #: Its server's, without a password.
    name: str
    #: Deliveries that `send` takes at once.
    group_size: int
    #: What it raises where the server is away, and not the delivery at fault.
    away: tuple[type[Exception], ...]

    def send(self, deliveries: list[Delivery]) -> None:
        """Returns once the server has them all. Raises `away`, or what the server said."""

    def close(self) -> None:
        """Forget the connection; `send` makes another."""


def connect(app: Celery, url: str | None) -> Connection:
    """To the server at `url`, or to the app's broker. Does not connect yet."""
    # Somebody else's server is not reached by the broker's TLS and login.
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
    """Whether queues are lists there."""
    return bool(connection.transport.driver_type == "redis")


def open_wire(app: Celery, url: str | None) -> Wire:
    """The wire for the server at `url`, or for the app's broker."""
    connection = connect(app, url)
    return RedisWire(connection) if is_redis(connection) else BrokerWire(connection)


class _KombuWire:
    """What both wires share: a channel that is made when it is needed, and made again after a failure."""

    def __init__(self, connection: Connection) -> None:
        self.name = connection.as_uri()
        self._connection = connection
        self._channel: Any = None
        self.away = (OSError, *connection.connection_errors)

    @property
    def channel(self) -> Any:
        """An open channel. Raises what the server's absence raises, at once."""
        if self._channel is None:
            self._connection.ensure_connection(max_retries=1, interval_start=0, reraise_as_library_errors=False)
            self._channel = self._connection.channel()
        return self._channel

    def close(self) -> None:
        """As `Wire`."""
        self._channel = None
        with suppress(Exception):
            self._connection.collect()


class RedisWire(_KombuWire):
    """To Redis or Valkey."""

    group_size = 128

    def send(self, deliveries: list[Delivery]) -> None:
        """All in one transaction."""
        with self.channel.client.pipeline() as pipeline:
            push_all(pipeline, (push for delivery in deliveries for push in delivery.pushes()))
            pipeline.execute()


def push_all(pipeline: Any, values: Iterable[Push]) -> None:
    """Queue pushes in a Redis pipeline."""
    for value in values:
        (pipeline.lpush if value.left else pipeline.rpush)(value.key, value.value)


class BrokerWire(_KombuWire):
    """To RabbitMQ, or to whatever else kombu speaks to."""

    #: What was sent before a failure would be sent again with the rest of its group.
    group_size = 1

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._is_amqp = connection.transport.driver_type == "amqp"
        self._known: LRUCache[str, bool] = LRUCache(KNOWN_QUEUES)

    def send(self, deliveries: list[Delivery]) -> None:
        """Each confirmed by the broker."""
        for delivery in deliveries:
            self._confirmed(delivery.queue, delivery.message())

    def close(self) -> None:
        """As `Wire`."""
        self._known.clear()
        super().close()

    def _confirmed(self, queue: str, parcel: Message) -> None:
        try:
            self._publish(queue, parcel)
        except ChannelError:
            # Somebody may have deleted a queue that was known: the next look will tell.
            self.close()
            self._publish(queue, parcel)

    def _publish(self, queue: str, parcel: Message) -> None:
        self._declare(queue)
        # Mandatory: a queue that is gone makes an error, and not a confirmed nothing.
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
        """Once per connection. One that its owner made with other arguments stays as it is."""
        if self._known.get(queue):
            return
        try:
            Queue(queue, channel=self.channel).queue_declare(passive=True)
        except ChannelError:  # which closed the channel
            self.close()
            Queue(queue, channel=self.channel, durable=True).queue_declare()
        self._known[queue] = True
