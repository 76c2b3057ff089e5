"""kombu's Redis transport, with one difference: a message is never in neither place.

kombu pops a message and notes it among the unacked ones in a second step; a worker that is killed in between loses
it, and one message stands there for as long as the worker computes. Here a script on the server does both at once,
for as many messages as the prefetch count has room. Keys, values and everything else are kombu's: stock workers share
the queues, and each restores what the other left behind.

In: kombu's calls on a channel that consumes. Out: deliveries, as kombu would make them. What it can't do here (a
server older than Redis 6.2, scripts forbidden, consumers that don't ack) takes kombu's own way.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import select
import weakref
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty
from time import monotonic, time
from typing import Any
from uuid import uuid4

import kombu
from celery import Celery
from kombu.transport import redis as stock
from kombu.transport import virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads
from redis.exceptions import NoPermissionError, NoScriptError, ResponseError

logger = logging.getLogger(__name__)

#: The most messages, and bytes, of one reservation. The first after a wait is for one message and each that comes back
#: full doubles the next, so that of a few messages an idle worker beside this one gets its share.
MOST_MESSAGES = 64
MOST_BYTES = 1 << 20

#: Where bytes are put that are no message at all. A stock worker stops at one, and it is gone.
UNREADABLE_KEY = "legit.unreadable"

#: Reserves messages: each is noted among the unacked ones, as kombu's `QoS.append` does it (kombu.transport.redis,
#: 5.7), and only then taken off its list, so that an error between the two loses nothing.
#:
#: KEYS: the unacked messages, their index, then lists: most urgent priority first, the queues of one priority in a row.
#: ARGV: most messages, most bytes, now (seconds), what a new tag starts with, 1 where queues take turns, and the names
#: of the queues.
#: Returns 1 where more may be waiting, else 0; then, for each message, its list's number, its tag, and its bytes.
RESERVE = """
local messages, bytes = tonumber(ARGV[1]), tonumber(ARGV[2])
local now, new_tag, turns = ARGV[3], ARGV[4], ARGV[5] == '1'
local queues = #ARGV - 5
local reply = {0}

local function address(raw)
    local message = cjson.decode(raw)
    local to = message.properties.delivery_info
    return message.properties.delivery_tag, to.exchange, to.routing_key
end

local function reserve(list, queue)
    local raw = redis.call('LINDEX', KEYS[list], -1)
    if not raw then return false end
    local ok, tag, exchange, routing_key = pcall(address, raw)
    if not ok or type(exchange) ~= 'string' or type(routing_key) ~= 'string' then
        exchange, routing_key = '', ARGV[5 + queue]
    end
    if not ok or type(tag) ~= 'string' or redis.call('HEXISTS', KEYS[1], tag) == 1 then
        tag = new_tag .. #reply
    end
    redis.call('ZADD', KEYS[2], now, tag)
    redis.call('HSET', KEYS[1], tag,
        '[' .. raw .. ', ' .. cjson.encode(exchange) .. ', ' .. cjson.encode(routing_key) .. ']')
    redis.call('RPOP', KEYS[list])
    messages, bytes = messages - 1, bytes - #raw
    reply[#reply + 1] = list - 2
    reply[#reply + 1] = tag
    reply[#reply + 1] = raw
    return true
end

for first = 3, #KEYS, queues do
    local again = true
    while again do
        again = false
        for queue = 1, queues do
            repeat
                if messages <= 0 or bytes <= 0 then
                    reply[1] = 1
                    return reply
                end
                local found = reserve(first + queue - 1, queue)
                again = again or found
            until turns or not found
        end
    end
end
return reply
"""
SHA1 = hashlib.sha1(RESERVE.encode(), usedforsecurity=False).hexdigest()


def reserve_messages(app: Celery) -> None:
    """From now on, consumers of this app reserve, where the broker is Redis. Other brokers are as they were."""
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


class Bell:
    """Rings when a list has something in it, and leaves it there. One connection to the server.

    No command waits without taking. To move the last element to where it was comes to the same.
    """

    def __init__(self, connection: Any, key: str) -> None:
        self.connection = connection
        self.key = key
        self.asked_at: float | None = None

    def fileno(self) -> int:
        """What the poller watches."""
        return int(self.connection._sock.fileno())

    def ask(self, timeout: float) -> None:
        """Have the server answer when the list is not empty, or after `timeout` seconds."""
        self.connection.send_command("BLMOVE", self.key, self.key, "RIGHT", "RIGHT", timeout)
        self.asked_at = monotonic()

    def answer(self) -> None:
        """Read what the server said; what it is doesn't matter."""
        self.asked_at = None
        self.connection.read_response(disable_decoding=True)


class BellPoller(stock.MultiChannelPoller):
    """kombu's poller, which polls bells too. A bell is heard even while the prefetch count has no room."""

    def __init__(self) -> None:
        super().__init__()
        self.hub: Any = None
        self._bells: dict[int, tuple[ReservingChannel, Bell]] = {}

    @property
    def fds(self) -> dict[int, Any]:
        """All that is polled, by file descriptor."""
        return {**super().fds, **self._bells}

    def on_poll_start(self) -> None:
        """The hub is about to wait."""
        flush_acks()
        super().on_poll_start()

    def watch(self, channel: ReservingChannel, bell: Bell) -> None:
        """Begin to poll a bell that has just been connected."""
        self._bells[bell.fileno()] = channel, bell
        self.poller.register(bell.fileno(), self.eventflags)

    def unwatch(self, bell: Bell) -> None:
        """Stop polling one that is about to be disconnected."""
        for fileno, (_, watched) in list(self._bells.items()):
            if watched is bell:
                del self._bells[fileno]
                if self.hub is not None:
                    self.hub.remove(fileno)
                else:
                    self.poller.unregister(fileno)

    def on_readable(self, fileno: int) -> Any:
        """A bell's answer, or what kombu awaits."""
        if fileno in self._bells:
            channel, bell = self._bells[fileno]
            return channel.on_bell(bell)
        return super().on_readable(fileno)

    def handle_event(self, fileno: int, event: int) -> Any:
        """The same, where there is no event loop."""
        if fileno in self._bells:
            return self.on_readable(fileno), self
        return super().handle_event(fileno, event)

    def maybe_check_brpop_health(self) -> None:
        """Called from time to time (kombu 5.7): drop connections on which an answer is overdue."""
        getattr(super(), "maybe_check_brpop_health", lambda: None)()
        for channel, bell in list(self._bells.values()):
            patience = channel._patience() + (channel.health_check_interval or 0)
            is_overdue = bell.asked_at is not None and monotonic() - bell.asked_at > patience
            if is_overdue and not _is_readable(bell):  # nor has it come while the worker computed
                logger.warning("Redis gave no answer for %.0f seconds; connecting anew", patience)
                channel.drop(bell)


def _is_readable(file: Any) -> bool:
    """Now. `select.select` takes no descriptor from 1,024 on."""
    poller = select.poll()
    poller.register(file, select.POLLIN)
    return bool(poller.poll(0))


class ReservingTransport:
    """Mixed into a Redis transport."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = BellPoller()

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """The worker's event loop takes over from the poller's own."""
        self.cycle.hub = loop
        super().register_with_event_loop(connection, loop)  # type: ignore[misc]


#: Acks that may wait for company, in a worker's event loop. They go out before the hub waits, or when they are so many.
MOST_ACKS = 64

#: Those that have some.
_with_acks: weakref.WeakSet[ReservingQoS] = weakref.WeakSet()


def flush_acks() -> None:
    """Send all acks that wait."""
    for qos in list(_with_acks):
        qos.flush_acks()


class ReservingQoS(stock.QoS):
    """kombu's accounts of what is not acked. What the script noted is not noted once more, and acks go in groups."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._acked: list[str] = []

    def ack(self, delivery_tag: str) -> None:
        """A message is done with. Celery says so from the hub's queue, which the hub empties before it waits."""
        if self.channel.closed:  # a connection that was lost: its messages were given back, and will be delivered again
            virtual.QoS.ack(self, delivery_tag)
            return
        if self.channel.connection.cycle.hub is None:
            super().ack(delivery_tag)
            return
        virtual.QoS.ack(self, delivery_tag)
        self._acked.append(delivery_tag)
        _with_acks.add(self)
        if len(self._acked) >= MOST_ACKS:
            self.flush_acks()

    def flush_acks(self) -> None:
        """Send the acks that wait. Where the connection is gone they are forgotten, and their tasks run again."""
        acked, self._acked = self._acked, []
        _with_acks.discard(self)
        if not acked:
            return
        try:
            with self.pipe_or_acquire() as pipe:
                pipe.zrem(self.unacked_index_key, *acked).hdel(self.unacked_key, *acked).execute()
        except self.channel.connection_errors as error:
            logger.critical("%d tasks that are done could not be acked, and will run again: %r", len(acked), error)

    def append(self, message: Any, delivery_tag: str) -> None:
        """A message is being delivered."""
        if delivery_tag == self.channel.noted:
            virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)


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
        self._asked: list[tuple[str, str]] = []
        self._looking = True
        self._script_is_known = True
        self._group = 1
        self.noted: str | None = None
        super().__init__(*args, **kwargs)
        self._kombus_way = not self.ack_emulation

    def basic_consume(self, queue: str, no_ack: bool = False, *args: Any, **kwargs: Any) -> Any:
        """Consumers that don't ack have nothing noted."""
        self._kombus_way = self._kombus_way or (no_ack and queue not in self._fanout_queues)
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    def _update_queue_cycle(self) -> None:
        """Called at each change of what is consumed from."""
        super()._update_queue_cycle()
        self._looking = True

    def _lists(self) -> list[tuple[str, str]]:
        """Queue and list, of all that is consumed from, in the script's order."""
        queues = self._queue_cycle.consume(len(self.active_queues))
        return [
            (queue, self.global_keyprefix + self._q_for_pri(queue, step))
            for step in self.priority_steps
            for queue in queues
        ]

    def _brpop_start(self, timeout: float | None = None) -> None:
        """kombu has room for more and awaits nothing. `timeout` is for BRPOP alone."""
        if self._kombus_way:
            super()._brpop_start(timeout or self._patience())
        elif self._looking:
            self._ask()
        else:
            self._hang_bells()

    def _ask(self) -> None:
        self._asked = self._lists()
        queues = [queue for queue, _ in self._asked[: len(self._asked) // len(self.priority_steps)]]
        keys = [self.global_keyprefix + key for key in (self.unacked_key, self.unacked_index_key)]
        keys += [key for _, key in self._asked]
        room = min(self._group, self.qos.can_consume_max_estimate() or self._group)
        turns = int(self.queue_order_strategy == "round_robin")
        arguments = [room, MOST_BYTES, repr(time()), f"{uuid4()}.", turns, *queues]
        script = ("EVALSHA", SHA1) if self._script_is_known else ("EVAL", RESERVE)
        self._in_poll = self.client.connection
        self._brpop_sent_at = monotonic()
        self.client.connection.send_command(*script, len(keys), *keys, *arguments)

    def _brpop_read(self, **options: Any) -> bool:
        """The script has answered."""
        if self._kombus_way:
            return bool(super()._brpop_read(**options))
        try:
            more, *found = self.client.parse_response(self.client.connection, "EVALSHA", **options)
        except NoScriptError:
            self._script_is_known = False
            raise Empty from None
        except self.connection_errors:
            self.client.connection.disconnect()
            raise
        finally:
            self._in_poll = None
            if hasattr(self, "_flush_brpop_reauth"):  # kombu 5.7: now that the connection is idle
                self._flush_brpop_reauth()
        self._script_is_known = True
        self._looking = bool(more)
        self._group = min(2 * self._group, MOST_MESSAGES) if more else 1
        for number, tag, raw in zip(found[::3], found[1::3], found[2::3], strict=True):
            queue, key = self._asked[number - 1]
            self._seen.add(key)
            self._reserved.append(Reserved(queue, bytes_to_str(tag), raw))
        if not self._closing:
            self._deliver_reserved()
        return True

    def _deliver_reserved(self) -> None:
        """What a consumer's error leaves here is delivered next time, or given back."""
        while self._reserved:
            reserved = self._reserved.popleft()
            payload = reserved.payload()
            if payload is None:
                self._put_aside(reserved)
                continue
            self._queue_cycle.rotate(reserved.queue)
            # kombu can't restore a message without these: it is noted again, as it is delivered.
            self.noted = None if complete(payload, reserved) else reserved.tag
            try:
                self.connection._deliver(payload, reserved.queue)
            finally:
                self.noted = None

    def _put_aside(self, reserved: Reserved) -> None:
        logger.error(
            "%d bytes in queue %s are no message, and were put into the list %s: %.100r",
            len(reserved.raw),
            reserved.queue,
            UNREADABLE_KEY,
            reserved.raw,
        )
        with self.conn_or_acquire() as client, client.pipeline() as pipe:
            pipe.rpush(UNREADABLE_KEY, reserved.raw)
            self.qos._remove_from_indices(reserved.tag, pipe).execute()

    def _hang_bells(self) -> None:
        lists = self._lists()
        queues = len(self.active_queues)
        wanted = {key for number, (_, key) in enumerate(lists) if number < queues or key in self._seen}
        for key in self._bells.keys() - wanted:
            self.drop(self._bells[key])
        for key in wanted:
            if key not in self._bells:
                connection = self.pool.connection_class(**self.pool.connection_kwargs)
                connection.connect()
                self._bells[key] = Bell(connection, key)
                self.connection.cycle.watch(self, self._bells[key])
            if self._bells[key].asked_at is None:
                self._bells[key].ask(self._patience())

    def on_bell(self, bell: Bell) -> None:
        """A list is no longer empty, or it is time to look at those without a bell."""
        try:
            bell.answer()
        except ResponseError as error:
            self._take_kombus_way(error)
        except self.connection_errors:
            self.drop(bell)
            raise
        self._looking = True

    def drop(self, bell: Bell) -> None:
        """Disconnect a bell. Where it is wanted, there will be another."""
        self._bells.pop(bell.key, None)
        self.connection.cycle.unwatch(bell)
        bell.connection.disconnect()

    def _patience(self) -> float:
        """Seconds that the server waits before it says that there is nothing (kombu 5.6: `brpop_timeout`)."""
        return float(getattr(self.connection, "brpop_timeout", 1))

    def _take_kombus_way(self, error: ResponseError) -> None:
        """If this server will never do what is asked of it."""
        if not isinstance(error, NoPermissionError) and "unknown command" not in str(error).lower():
            raise error
        logger.warning(
            "this Redis server refuses BLMOVE (%s): messages are fetched one at a time, and one that is on "
            "its way when the worker is killed is lost, as with any Celery worker",
            error,
        )
        self._kombus_way = True
        for bell in list(self._bells.values()):
            self.drop(bell)

    def close(self) -> None:
        """Give back what was not delivered."""
        self._closing = True
        flush_acks()
        for bell in list(self._bells.values()):
            self.drop(bell)
        try:
            if self._in_poll:
                with suppress(Empty):
                    self._brpop_read()
            while self._reserved:
                self.qos.restore_by_tag(self._reserved.pop().tag)
        except self.connection_errors:
            logger.warning(
                "the connection broke with %d messages not yet delivered: they are given to a worker after the "
                "visibility timeout",
                len(self._reserved) + 1,
            )
        super().close()


@dataclass(frozen=True)
class Reserved:
    """A message as it came from its list."""

    queue: str
    tag: str
    raw: bytes

    def payload(self) -> dict[str, Any] | None:
        """What it says; None where it is no message."""
        try:
            payload = loads(bytes_to_str(self.raw))
        except (ValueError, RecursionError):
            return None
        return payload if isinstance(payload, dict) else None


def complete(payload: dict[str, Any], reserved: Reserved) -> bool:
    """Give a message its tag, and what a foreign client left out. Returns whether that was anything."""
    lacks = [part for part in ("headers", "properties") if not isinstance(payload.get(part), dict)]
    payload |= {part: {} for part in lacks}
    properties = payload["properties"]
    properties["delivery_tag"] = reserved.tag
    match properties.get("delivery_info"):
        case {"exchange": str(), "routing_key": str()}:
            return bool(lacks)
    properties["delivery_info"] = {"exchange": "", "routing_key": reserved.queue}
    return True
