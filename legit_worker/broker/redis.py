"""kombu's Redis transport, with one difference: a message is never in neither place.

kombu pops a message and notes it among the unacked ones in a second step; a worker that is killed in between loses
it, and one message stands there for as long as the worker computes. Here a script on the server does both at once,
for as many messages as the prefetch count has room. Keys, values and everything else are kombu's: stock workers share
the queues, and each restores what the other left behind.

In: kombu's calls on a channel that consumes. Out: deliveries, as kombu would make them. A server that refuses this (one
older than Redis 6.2, or a user who may not run scripts) is asked as kombu asks.
"""

from __future__ import annotations

import functools
import logging
from collections import deque
from contextlib import suppress
from queue import Empty
from time import monotonic, time
from typing import Any
from uuid import uuid4

import kombu
from celery import Celery
from kombu.transport import redis as stock
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps
from redis.exceptions import NoPermissionError, NoScriptError, ResponseError

from legit_worker.broker.acks import ReservingQoS
from legit_worker.broker.bells import Bell, BellPoller
from legit_worker.broker.reserve import MOST_BYTES, MOST_MESSAGES, RESERVE, SHA1, Reserved, Source

logger = logging.getLogger(__name__)

#: The list for bytes that are no message, or a message that can't become a task. A stock worker stops at such a
#: message, and the message is gone.
UNREADABLE_KEY = "legit.unreadable"

#: What servers say, in lower case, to a command that they don't have, or that this user may not run. Inside a script
#: such an answer is no `NoPermissionError`.
REFUSALS = ("unknown command", "unknown subcommand", "can't run this command", "acl failure in script")

#: The refusals of this process that the log has told.
refusals: set[str] = set()


def taking(channel: Any) -> str:
    """How messages come by this channel, for the log and the statistics."""
    if not isinstance(channel, ReservingChannel):
        return "as the broker delivers them"
    return "reserved in groups" if channel.refusal is None else f"fetched one at a time: {channel.refusal}"


def held_by_workers(channel: Any) -> tuple[int, float]:
    """How many messages of a Redis broker are with workers, living or dead; and the seconds after which a message that
    one worker took is given to another. Zeros for other brokers."""
    if not isinstance(channel, stock.Channel) or not channel.ack_emulation:
        return 0, 0.0
    with channel.conn_or_acquire() as client:
        return int(client.zcard(channel.unacked_index_key)), float(channel.visibility_timeout)


def reserve_messages(app: Celery) -> None:
    """From now on, consumers of this app reserve if the broker is Redis. Other brokers are as they were."""
    connection = app.amqp.Connection
    if not issubclass(connection, ReservingConnection):
        app.amqp.Connection = type(connection.__name__, (ReservingConnection, connection), {})


class ReservingConnection(kombu.Connection):
    """A connection to any broker, and after a failover to any other."""

    def get_transport_cls(self) -> type:
        """As kombu chose it from the URL; and reserving, if it is the Redis one or built on it."""
        chosen: type = super().get_transport_cls()
        return reserving(chosen) if issubclass(chosen, stock.Transport) else chosen


@functools.cache
def reserving(transport: type[stock.Transport]) -> type[stock.Transport]:
    """The transport class (plain, Sentinel, or a project's own) with channels that reserve."""
    channel = type(transport.Channel.__name__, (ReservingChannel, transport.Channel), {})
    return type(transport.__name__, (ReservingTransport, transport), {"Channel": channel})


class ReservingTransport:
    """Mixed into a Redis transport."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = BellPoller()

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """The worker's event loop takes over from the poller's own."""
        self.cycle.hub = loop
        super().register_with_event_loop(connection, loop)  # type: ignore[misc]


class ReservingChannel(stock.Channel):
    """A Redis channel that reserves. kombu's `BRPOP` handlers are the seam: what they started now asks the script.

    Three states. Looking: the script's answer is awaited (`_in_poll`). Waiting: it found nothing more, and a bell hangs
    on each list. Full: the prefetch count has no room, and kombu doesn't call.
    """

    QoS = ReservingQoS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._bells: dict[str, Bell] = {}
        #: Lists of other priorities than the most urgent are first found by chance; from then on they have a bell.
        self._seen: set[str] = set()
        self._reserved: deque[Reserved] = deque()
        #: What the last question was about; empty if kombu asked it.
        self._asked: list[Source] = []
        #: Queues whose consumer doesn't ack.
        self._no_ack_queues: set[str] = set()
        self._looking = True
        self._has_script = False
        self._group = 1
        #: Why messages are taken kombu's way; None while they are reserved.
        self.refusal: str | None = None
        self.noted: str | None = None
        super().__init__(*args, **kwargs)

    def basic_consume(self, queue: str, no_ack: bool = False, *args: Any, **kwargs: Any) -> Any:
        """Messages for a consumer that doesn't ack are not noted; a channel of such consumers alone is kombu's."""
        (self._no_ack_queues.add if no_ack or not self.ack_emulation else self._no_ack_queues.discard)(queue)
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    def _update_queue_cycle(self) -> None:
        """Called when a queue is added or cancelled."""
        super()._update_queue_cycle()
        self._looking = True

    def _sources(self) -> list[Source]:
        """All that is consumed from, in the script's order."""
        queues = self._queue_cycle.consume(len(self.active_queues))
        return [
            Source(
                queue,
                self.global_keyprefix + self._q_for_pri(queue, step),
                queue not in self._no_ack_queues,
            )
            for step in self.priority_steps
            for queue in queues
        ]

    def _brpop_start(self, timeout: float | None = None) -> None:
        """kombu has room for more and awaits nothing. `timeout` is for BRPOP alone."""
        if self.refusal is not None or self._no_ack_queues.issuperset(self.active_queues):
            self._asked = []
            super()._brpop_start(timeout or self.patience())
        elif not self._looking:
            self._hang_bells()
        elif self._script_is_there():
            self._ask()

    def _ask(self) -> None:
        sources = self._sources()
        if not sources:
            return
        self._asked = sources
        keys = [self.global_keyprefix + key for key in (self.unacked_key, self.unacked_index_key)]
        keys += [source.key for source in sources]
        queues = sources[: len(sources) // len(self.priority_steps)]
        named = [part for source in queues for part in (source.queue, int(source.acks))]
        turns = int(self.queue_order_strategy == "round_robin")
        arguments = [self._room(), MOST_BYTES, repr(time()), f"{uuid4()}.", turns, *named]
        self._in_poll = self.client.connection
        self._brpop_sent_at = monotonic()
        self.client.connection.send_command("EVALSHA", SHA1, len(keys), *keys, *arguments)

    def _room(self) -> int:
        """How many messages to ask for. Whoever drains by hand gets one a call, as from kombu."""
        if self.connection.cycle.hub is None:
            return 1
        return min(self._group, self.qos.can_consume_max_estimate() or self._group)

    def _brpop_read(self, **options: Any) -> bool:
        """The server has answered. Raises `Empty` if it had nothing."""
        if not self._asked:
            return bool(super()._brpop_read(**options))
        self._reserved.extend(self._read_answer(options))
        if not self._reserved:
            raise Empty
        if not self._closing:
            self._deliver_reserved()
        return True

    def _read_answer(self, options: dict[str, Any]) -> list[Reserved]:
        try:
            more, *found = self.client.parse_response(self.client.connection, "EVALSHA", **options)
        except NoScriptError:  # a server that was restarted
            self._has_script = False
            return []
        except ResponseError as error:
            self._take_kombus_way(error)
            return []
        except self.connection_errors:
            self.client.connection.disconnect()
            raise
        finally:
            self._in_poll = None
            if hasattr(self, "_flush_brpop_reauth"):  # kombu 5.7: now that the connection is idle
                self._flush_brpop_reauth()
        self._looking = bool(more)
        self._group = min(2 * self._group, MOST_MESSAGES) if more else 1
        reserved = []
        for number, tag, raw in zip(found[::3], found[1::3], found[2::3], strict=True):
            source = self._asked[number - 1]
            self._seen.add(source.key)
            reserved.append(Reserved(source, bytes_to_str(tag), raw))
        return reserved

    def _script_is_there(self) -> bool:
        """Load it if this server may not have it. kombu's own scripts need `SCRIPT LOAD` and `EVALSHA`, too."""
        try:
            self._has_script = self._has_script or bool(self.client.script_load(RESERVE))
        except ResponseError as error:
            self._take_kombus_way(error)
        return self._has_script

    def _deliver_reserved(self) -> None:
        """What a consumer's error leaves here is delivered next time, or given back."""
        while self._reserved:
            reserved = self._reserved.popleft()
            payload = reserved.payload()
            lacked = payload is not None and reserved.complete(payload)
            if payload is None or not self._has_readable_body(payload):
                self._put_bytes_aside(reserved)
                continue
            self._queue_cycle.rotate(reserved.source.queue)
            # kombu can't restore a message without these: it is noted again, as it is delivered.
            self.noted = reserved.tag if reserved.source.acks and not lacked else None
            try:
                self.connection._deliver(payload, reserved.source.queue)
            finally:
                self.noted = None

    def _has_readable_body(self, payload: dict[str, Any]) -> bool:
        """Whether kombu can make a `Message` of it; what the body says is the consumer's business."""
        body = payload.get("body")
        try:
            return not body or self.decode_body(body, payload["properties"].get("body_encoding")) is not None
        except Exception:  # base64 that is none, an encoding that is a list
            return False

    def _put_bytes_aside(self, reserved: Reserved) -> None:
        logger.error(
            "%d bytes in queue %s are no message, and were put into the list %s: %.100r",
            len(reserved.raw),
            reserved.source.queue,
            UNREADABLE_KEY,
            reserved.raw,
        )
        self._move_aside(reserved.raw, reserved.tag)

    def put_aside(self, message: kombu.Message) -> None:
        """A message that can't become a task leaves the queue, and is kept in the list `UNREADABLE_KEY`."""
        self._move_aside(dumps(message._raw), message.delivery_tag)
        message.reject()  # the server has forgotten it by now; this tells kombu's own accounts

    def _move_aside(self, raw: bytes | str, tag: str) -> None:
        with self.conn_or_acquire() as client, client.pipeline() as pipe:
            pipe.rpush(UNREADABLE_KEY, raw)
            pipe.zrem(self.unacked_index_key, tag).hdel(self.unacked_key, tag).execute()

    def _hang_bells(self) -> None:
        sources = self._sources()
        queues = len(self.active_queues)
        self._seen.intersection_update(source.key for source in sources)  # of queues that are consumed from
        wanted = {source.key for number, source in enumerate(sources) if number < queues or source.key in self._seen}
        for key in self._bells.keys() - wanted:
            self.drop(self._bells[key])
        for key in wanted:
            if key not in self._bells:
                connection = self.pool.connection_class(**self.pool.connection_kwargs)
                connection.connect()
                self._bells[key] = Bell(connection, key)
                self.connection.cycle.watch(self, self._bells[key])
            if self._bells[key].asked_at is None:
                self._bells[key].ask(self.patience())

    def on_bell(self, bell: Bell) -> None:
        """A list is no longer empty, or it is time to look at those without a bell."""
        if bell.asked_at is None:  # the server closed a connection that waited for nothing while the worker was busy
            self.drop(bell)
            return
        try:
            bell.answer()
        except ResponseError as error:
            self._take_kombus_way(error)
        except self.connection_errors:
            self.drop(bell)
            raise
        self._looking = True

    def drop(self, bell: Bell) -> None:
        """Disconnect a bell. If it is wanted, there will be another."""
        self._bells.pop(bell.key, None)
        self.connection.cycle.unwatch(bell)
        bell.connection.disconnect()

    def patience(self) -> float:
        """Seconds that the server waits before it says that there is nothing (kombu 5.6: `brpop_timeout`)."""
        return float(getattr(self.connection, "brpop_timeout", 1)) or 1.0

    def _take_kombus_way(self, error: ResponseError) -> None:
        """If this server will never do what it is asked to do; else raise the error."""
        text = str(error)
        if not isinstance(error, NoPermissionError) and not any(refusal in text.lower() for refusal in REFUSALS):
            raise error
        self.refusal = text
        if text not in refusals:
            refusals.add(text)
            logger.warning(
                "the Redis server does not let this worker reserve messages (%s): they are fetched one at a time, and "
                "one that is on its way when the worker is killed is lost, as with any Celery worker. Reserving needs "
                "Redis 6.2 or later, and a user who may run SCRIPT LOAD, EVALSHA and BLMOVE",
                text,
            )
        for bell in list(self._bells.values()):
            self.drop(bell)

    def close(self) -> None:
        """Give back what was not delivered."""
        self._closing = True
        if isinstance(self.qos, ReservingQoS):  # not so without `ack_emulation`
            self.qos.flush_acks()
        for bell in list(self._bells.values()):
            self.drop(bell)
        try:
            if self._in_poll:
                with suppress(Empty):
                    self._brpop_read()
            while self._reserved:
                self._give_back(self._reserved.pop())
        except self.connection_errors:
            logger.warning(
                "the connection broke with %d messages not yet delivered: they are given to a worker after the "
                "visibility timeout",
                len(self._reserved) + 1,
            )
        super().close()

    def _give_back(self, reserved: Reserved) -> None:
        if reserved.source.acks:
            self.qos.restore_by_tag(reserved.tag)
        else:
            with self.conn_or_acquire() as client:
                client.rpush(reserved.source.key.removeprefix(self.global_keyprefix), reserved.raw)
