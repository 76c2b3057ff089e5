"""A connection to the server of an app's queue.

In: deliveries, a group at a time. Out: for each, whether the server has it, refuses it, or may take it later. One
thread uses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain, islice
from typing import Any

from amqp.exceptions import MessageNacked
from cachetools import LRUCache
from celery import Celery
from kombu import Connection, Producer, Queue
from kombu.exceptions import ChannelError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from legit_worker.redis_errors import NOT_THIS_KEY, TAKES_NOTHING, code_of
from legit_worker.routing.bounds import Ages, Room, cuts
from legit_worker.routing.delivery import UNBOUND, AwayError, Bound, Delivery, NotNowError, Outcome
from legit_worker.routing.formats import Message, Push

#: Seconds that a server has to answer, before the lane tries it again.
PATIENCE = 5

#: Why RabbitMQ blocks a connection.
FULL = "its memory or disk is full, and it reads nothing from publishers"

#: No queue has this name.
NOWHERE = "legit.nowhere"

#: The most queues that a wire remembers: more than there are apps. Tasks may name any number of queues.
KNOWN_QUEUES = 1000


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
        # kombu counts KeyError to Redis' connection errors. Here it would be this package's own mistake.
        away = {OSError, *connection.connection_errors} - {KeyError}
        self._away: tuple[type[Exception], ...] = tuple(away)

    @property
    def channel(self) -> Any:
        """An open channel. Raises `AwayError` at once."""
        if self._channel is None:
            try:
                reach(self._connection)
                self._channel = self._opened()
            except AwayError:
                raise
            except Exception as error:  # a wrong password, a missing virtual host: no delivery is at fault
                raise AwayError(self._reason(error)) from error
        return self._channel

    def _opened(self) -> Any:
        return self._connection.channel()

    def send(self, deliveries: list[Delivery]) -> Iterator[Outcome]:
        """Send, and yield what became of each. Raises `AwayError`: then those not yielded yet may not have arrived."""
        try:
            yield from self._send(deliveries)
        except self._away as error:
            raise AwayError(self._reason(error)) from error

    def _reason(self, error: Exception) -> str:
        """Say why the server is away."""
        return f"{type(error).__name__}: {error}"

    def _send(self, deliveries: list[Delivery]) -> Iterator[Outcome]:
        """As `send`, and may raise the connection's errors."""
        raise NotImplementedError

    def close(self) -> None:
        """Forget the connection; `send` makes another."""
        self._channel = None
        with suppress(Exception):
            self._connection.collect()


class RedisWire(Wire):
    """The wire to Redis or Valkey."""

    group_size = 128

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._ages = Ages()

    def _send(self, deliveries: list[Delivery]) -> Iterator[Outcome]:
        """Push all in one transaction that their queues have room for."""
        self._ages.trim(self.channel.client, deliveries)
        room = Room(self.channel.client, deliveries)
        refusals = {delivery: room.refuses(delivery) for delivery in deliveries}
        fitting = [delivery for delivery in deliveries if not refusals[delivery]]
        if fitting:
            yield from self._push(fitting)
        yield from ((delivery, NotNowError(reason)) for delivery, reason in refusals.items() if reason)

    def _push(self, deliveries: list[Delivery]) -> Iterator[Outcome]:
        pushes = [delivery.pushes() for delivery in deliveries]
        try:
            replies = iter(self._transaction([*commands(chain(*pushes)), *cuts(deliveries)]))
        except ResponseError as error:  # one command was refused, so the server did nothing
            refusal = judged(error)
            if len(deliveries) == 1:
                yield deliveries[0], refusal
            else:
                for delivery in deliveries:
                    yield from self._push([delivery])
            return
        for delivery, own in zip(deliveries, pushes, strict=True):
            errors = [reply for reply in islice(replies, len(own)) if isinstance(reply, Exception)]
            yield delivery, judged(errors[0]) if errors else None

    def _transaction(self, wanted: Iterable[tuple[Any, ...]]) -> list[Any]:
        with self.channel.client.pipeline() as pipeline:
            for command in wanted:
                pipeline.execute_command(*command)
            replies: list[Any] = pipeline.execute(raise_on_error=False)
            return replies


def judged(error: Exception) -> Exception:
    """Return what a Redis error says of its delivery: `NotNowError` if the key takes nothing now, or else the error.

    Raises `AwayError` if the server is away.
    """
    code = code_of(error)
    if code in TAKES_NOTHING or isinstance(error, RedisConnectionError):
        raise AwayError(f"{type(error).__name__}: {error}") from error
    return NotNowError(f"{type(error).__name__}: {error}") if code in NOT_THIS_KEY else error


def commands(values: Iterable[Push]) -> list[tuple[str, str, bytes]]:
    """Return the Redis commands that push these values."""
    return [("LPUSH" if value.left else "RPUSH", value.key, value.value) for value in values]


class BrokerWire(Wire):
    """The wire to RabbitMQ, or to any other broker that kombu knows."""

    #: Each waits for its own confirm.
    group_size = 1

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._is_amqp = connection.transport.driver_type == "amqp"
        self._known: LRUCache[str, bool] = LRUCache(KNOWN_QUEUES)
        #: Whether RabbitMQ has said that it reads nothing more from this connection: its memory or disk is full.
        self._is_blocked = False
        if self._is_amqp:
            connection.transport_options |= {"on_blocked": self._block, "on_unblocked": self._unblock}

    def _send(self, deliveries: list[Delivery]) -> Iterator[Outcome]:
        """Publish each, and wait for the broker to confirm it."""
        for delivery in deliveries:
            yield delivery, self._outcome(delivery.queue, delivery.message(), "", delivery.bound)

    def publish(self, key: str, parcel: Message, exchange: str) -> Exception | None:
        """Publish one message. Returns why the broker refuses it. Raises `AwayError`."""
        try:
            return self._outcome(key, parcel, exchange, UNBOUND)
        except self._away as error:
            raise AwayError(self._reason(error)) from error

    def _outcome(self, key: str, parcel: Message, exchange: str, bound: Bound) -> Exception | None:
        refusal: Exception | None = None
        try:
            self._confirmed(key, parcel, exchange, bound)
        except MessageNacked:
            refusal = NotNowError("the broker does not take it (nack): the queue may be full")
        except ChannelError as error:  # the broker has closed the channel
            self.close()
            refusal = error
        return refusal

    def close(self) -> None:
        """Forget the connection, and the queues that it has declared."""
        self._known.clear()
        super().close()

    def _opened(self) -> Any:
        """Open a channel, and publish nothing to nobody: RabbitMQ tells only a publisher that it is full.

        It keeps what a full one was sent, and takes it later. So each try would leave one more copy of an envelope.
        """
        self._is_blocked = False
        channel = super()._opened()
        if self._is_amqp:
            Producer(channel).publish(b"", routing_key=NOWHERE, exchange="", timeout=PATIENCE, confirm_timeout=PATIENCE)
        return channel

    def _reason(self, error: Exception) -> str:
        return FULL if self._is_blocked else super()._reason(error)

    def _block(self, reason: str) -> None:
        self._is_blocked = True

    def _unblock(self) -> None:
        self._is_blocked = False

    def _confirmed(self, key: str, parcel: Message, exchange: str, bound: Bound) -> None:
        try:
            self._publish(key, parcel, exchange, bound)
        except ChannelError:
            # Somebody may have deleted a known queue. Declare it again.
            self.close()
            self._publish(key, parcel, exchange, bound)

    def _publish(self, key: str, parcel: Message, exchange: str, bound: Bound) -> None:
        if not exchange:
            self._declare(key, bound)
        channel = self.channel
        if self._is_blocked:
            raise AwayError(FULL)
        # Without `mandatory`, the broker confirms a message for a deleted queue, and drops it.
        amqp_only = {"mandatory": True, "timeout": PATIENCE, "confirm_timeout": PATIENCE} if self._is_amqp else {}
        Producer(channel).publish(
            parcel.body,
            routing_key=key,
            exchange=exchange,
            content_type=parcel.content_type,
            content_encoding=parcel.content_encoding,
            delivery_mode=2,
            headers=parcel.headers,
            **parcel.properties,
            **amqp_only,
        )

    def _declare(self, queue: str, bound: Bound) -> None:
        """Declare a queue, once per connection. A queue that its owner made with other arguments stays as it is."""
        if self._known.get(queue):
            return
        try:
            Queue(queue, channel=self.channel).queue_declare(passive=True)
        except ChannelError:  # the queue is missing, and the broker has closed the channel
            self.close()
            arguments = bound.arguments() if self._is_amqp else {}
            Queue(queue, channel=self.channel, durable=True, queue_arguments=arguments).queue_declare()
        self._known[queue] = True
