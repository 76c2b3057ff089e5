"""kombu's Redis transport, which loses no message between its queue and the worker.

kombu pops a message and notes it among the unacked ones in a second step. A worker that is killed between the two
steps loses the message, and while a worker computes, one message stays between them. Here a script on the server does
both steps at once, for as many messages as the prefetch count allows. Keys, values and everything else are kombu's:
stock workers share the queues, and each kind of worker restores the messages of the other.

In: kombu's calls on a channel that consumes. Out: deliveries, as kombu would make them. If a server refuses the script
(Redis before 6.2, or a user who may not run scripts), messages come as kombu fetches them.
"""

from __future__ import annotations

import functools
import logging
from collections import deque
from contextlib import suppress
from queue import Empty
from typing import Any

import kombu
from celery import Celery
from kombu.transport import redis as stock
from kombu.utils.json import dumps
from redis.exceptions import ResponseError

from legit_worker.broker import owners, poison
from legit_worker.broker.acks import ReservingQoS, send
from legit_worker.broker.asking import AskingChannel
from legit_worker.broker.bells import BellPoller
from legit_worker.broker.failover import enduring
from legit_worker.broker.ledger import missing
from legit_worker.broker.outbox import BURY
from legit_worker.broker.reserve import Reserved
from legit_worker.broker.returning import DELIVERIES, count
from legit_worker.broker.tally import tally

logger = logging.getLogger(__name__)

#: The list that keeps bytes which are no message, and messages that can't become a task.
UNREADABLE_KEY = "legit.unreadable"

#: With this many entries, that list takes no copies of messages that Celery discards: a client that goes on sending
#: them would fill the server.
MOST_COPIES = 10_000

#: The first kombu that goes on polling after a connection is closed. Earlier ones stop for good, also if the connection
#: was never used and is closed as garbage: one of an attempt that failed. The hub is made anew after a lost connection.
KEEPS_POLLING = (5, 7)


def taking(channel: Any) -> str:
    """Say how messages come by this channel, for the log and the statistics."""
    if not isinstance(channel, ReservingChannel):
        return "as the broker delivers them"
    return "reserved in groups" if channel.refusal is None else f"fetched one at a time: {channel.refusal}"


def held_by_workers(channel: Any) -> tuple[int, float]:
    """Count the messages of a Redis broker that workers hold, and return the broker's visibility timeout in seconds.

    The count includes dead workers. Returns zeros for other brokers.
    """
    if not isinstance(channel, stock.Channel) or not channel.ack_emulation:
        return 0, 0.0
    with channel.conn_or_acquire() as client:
        return int(client.zcard(channel.unacked_index_key)), float(channel.visibility_timeout)


def gave_up(message: Any) -> bool:
    """Whether another worker has a message by now, or this one gets it again: then its task must not begin.

    Takes the message out of kombu's accounts if no newer delivery has its place there. A closed channel has given back
    all that had not begun: Celery 5.6 begins tasks with an ETA nevertheless.
    """
    channel, tag = message.channel, message.delivery_tag
    if not isinstance(channel, ReservingChannel) or message.acknowledged:
        return False
    if channel.closed:
        return True
    latest = channel.qos._delivered.get(tag, message)
    if latest is message and tag in channel.ledger.held:
        return False
    if latest is message:
        message.ack()
    return True


def reserve_messages(app: Celery) -> None:
    """Let consumers of this app reserve messages if the broker is Redis. Other brokers stay as they were."""
    connection = app.amqp.Connection
    if not issubclass(connection, ReservingConnection):
        app.amqp.Connection = type(connection.__name__, (ReservingConnection, connection), {})


class ReservingConnection(kombu.Connection):
    """A connection to any broker, which may fail over to a broker of another kind."""

    def get_transport_cls(self) -> type:
        """Return kombu's transport for the URL; if it is the Redis transport or a subclass, one that reserves."""
        chosen = enduring(super().get_transport_cls())
        return reserving(chosen) if issubclass(chosen, stock.Transport) else chosen


@functools.cache
def reserving(transport: type[stock.Transport]) -> type[stock.Transport]:
    """Return a subclass of a transport (plain, Sentinel, or a project's own) whose channels reserve."""
    channel = type(transport.Channel.__name__, (ReservingChannel, transport.Channel), {})
    return type(transport.__name__, (ReservingTransport, transport), {"Channel": channel})


class NoMessageError(ValueError):
    """The bytes are no message that kombu could deliver."""


class ReservingTransport:
    """Mixed into a Redis transport."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = BellPoller()

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Let the poller know the worker's event loop."""
        self.cycle.hub = loop
        super().register_with_event_loop(connection, loop)  # type: ignore[misc]
        if kombu.VERSION < KEEPS_POLLING:
            self.cycle._on_connection_disconnect = lambda connection: None


class ReservingChannel(AskingChannel):
    """A Redis channel that reserves messages. It overrides kombu's `BRPOP` handlers to run the script.

    It has three states. Looking: the channel awaits the script's answer (`_in_poll`). Waiting: the lists were empty,
    and each has a bell. Full: the prefetch count is used up, and kombu doesn't call.
    """

    QoS = ReservingQoS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._reserved: deque[Reserved] = deque()
        #: The tag of the message that is being delivered, if the script has noted it.
        self.noted: str | None = None
        super().__init__(*args, **kwargs)

    def _brpop_start(self, timeout: float | None = None) -> None:
        """Ask for messages: kombu has room for more and awaits no answer. Only BRPOP uses `timeout`."""
        if self._reserved:  # not all of the last answer is delivered
            return
        if self.refusal is not None or self._no_ack_queues.issuperset(self.active_queues):
            self._asked = []
            super()._brpop_start(timeout or self.patience())
        elif self._suspect is not None and not self._has_room_for_suspect():
            return
        elif not self._looking and not self.ledger.outbox.unsent:
            self._hang_bells()
        elif self._script_is_there():
            self._ask()

    def _brpop_read(self, **options: Any) -> bool:
        """Read the server's answer and deliver its messages. Raises `Empty` if there were none."""
        self._reserved.extend(self._read_answer(options) if self._asked else self._read_popped(options))
        if not self._reserved:
            raise Empty
        if not self._closing:
            self._deliver_reserved()
        return True

    def _deliver_reserved(self) -> None:
        """Deliver in order. If a consumer raises, the rest is delivered next time, or given back."""
        while self._reserved:
            reserved = self._reserved.popleft()
            payload = reserved.payload()
            try:
                if payload is None:
                    raise NoMessageError
                self._deliver_payload(payload, reserved)
            except NoMessageError:
                logger.error(
                    "%d bytes in queue %s are no message, and go into the list %s: %.100r",
                    *(len(reserved.raw), reserved.source.queue, UNREADABLE_KEY, reserved.raw),
                )
                self._move_aside(reserved.raw, reserved.tag)
            if self._reserved and self._is_hurried():
                return

    def _is_hurried(self) -> bool:
        """Tell whether a task waits that should not wait for the rest: the hub goes round first."""
        worker = self.ledger.worker
        return worker is not None and self.connection.cycle.hub is not None and worker.is_hurried()

    def deliver_rest(self) -> None:
        """Go on with what was left for a task that waited. The hub has gone round since."""
        if self._reserved and not self._closing:
            self._deliver_reserved()

    def _deliver_payload(self, payload: dict[str, Any], reserved: Reserved) -> None:
        lacked = reserved.complete(payload)
        headers = payload["headers"]
        # Celery copies headers to a task's retries, which have killed nobody yet.
        deliveries = count(headers.pop(DELIVERIES, 0))
        if deliveries:
            payload["properties"]["delivery_info"][DELIVERIES] = deliveries
        if self.ledger.max_deliveries and deliveries > self.ledger.max_deliveries + 1 and reserved.source.acks:
            self._bury(payload, reserved, deliveries)
            return
        if reserved.source.acks:
            self.ledger.special.add(reserved.tag, deliveries, headers.get("eta"))
        self._queue_cycle.rotate(reserved.source.queue)
        # kombu can't restore a message that lacked a part. So kombu notes the completed message again.
        self.noted = reserved.tag if reserved.source.acks and not lacked else None
        try:
            self.connection._deliver(payload, reserved.source.queue)
        finally:
            self.noted = None

    def _bury(self, payload: dict[str, Any], reserved: Reserved, deliveries: int) -> None:
        """Bury a message that killed workers even as they refused it."""
        reason = f"killed {deliveries} workers, the last ones before they could tell its failure"
        logger.error("a message in queue %s %s: it is moved to legit.dead", reserved.source.queue, reason)
        self.ledger.bury(reserved.tag, poison.record_of(payload, reserved.source.queue, reason, deliveries))
        self.ledger.ack(reserved.tag)

    def decode_body(self, body: Any, encoding: Any = None) -> Any:
        """Decode a message's body. Raises `NoMessageError` before any consumer sees the message."""
        try:
            return super().decode_body(body, encoding)
        except Exception as error:  # the base64 is wrong, or the encoding is a list
            raise NoMessageError(f"the body can't be decoded: {error}") from error

    def put_aside(self, message: kombu.Message) -> None:
        """Move a message that can't become a task to the list `UNREADABLE_KEY`, if the server lets it."""
        self._move_aside(dumps(message._raw), message.delivery_tag)
        message.reject()  # for kombu's own accounts: the server has forgotten the message by now

    def keep_copy(self, message: kombu.Message) -> None:
        """Put a message that Celery is about to discard into the list `UNREADABLE_KEY`, if there is room."""
        key, client = self.ledger.keys.unreadable, self.plain_client
        tally["unreadable"] += 1
        try:
            if client.llen(key) >= MOST_COPIES:
                logger.error("the list %s has %d entries: the message is not kept there", UNREADABLE_KEY, MOST_COPIES)
                return
            client.rpush(key, dumps(message._raw))
        except ResponseError as error:  # the server is full, or takes no more for another reason
            logger.error("the message can't be put into the list %s: %s", UNREADABLE_KEY, error)
        else:
            logger.error("the message was put into the list %s", UNREADABLE_KEY)

    def _move_aside(self, raw: bytes | str, tag: str) -> None:
        keys, client = self.ledger.keys, self.plain_client
        tally["unreadable"] += 1
        try:
            if self.ledger.forget(tag) is missing:  # its consumer does not ack
                client.rpush(keys.unreadable, raw)
            else:
                BURY.run(client, [keys.unacked, keys.index, keys.held(self.ledger.owner), keys.unreadable], tag, raw)
        except self.connection_errors:
            raise
        except ResponseError as error:  # it stays noted, and comes again
            logger.error("the bytes can't be put into the list %s: %s", UNREADABLE_KEY, error)

    def close(self) -> None:
        """Give back what was not delivered, and what no task goes on with. What can't be sent now, the ledger keeps."""
        if self.closed:
            return
        self._closing = True
        self._drop_all()
        try:
            if self._in_poll:
                with suppress(Empty):
                    self._brpop_read()
            self._give_back_reserved()
        except self.connection_errors as error:
            logger.warning("the connection broke before %d messages were delivered: %r", len(self._reserved), error)
        if self.ledger.is_left:
            send(self.ledger, self)
        super().close()
        owners.closed(self)

    def _give_back_reserved(self) -> None:
        for reserved in self._reserved:
            if reserved.source.acks:
                self.ledger.give_back(reserved.tag)
        while self._reserved:
            reserved = self._reserved.pop()
            if not reserved.source.acks:
                self.plain_client.rpush(reserved.source.key, reserved.raw)
