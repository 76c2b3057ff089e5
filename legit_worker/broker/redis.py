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
from time import monotonic, time
from typing import Any
from uuid import uuid4

import kombu
from celery import Celery
from kombu.transport import redis as stock
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps
from redis import Redis
from redis.exceptions import NoPermissionError, NoScriptError, ResponseError

from legit_worker.broker import owners, poison
from legit_worker.broker.acks import ReservingQoS, send
from legit_worker.broker.bells import Bell, BellPoller
from legit_worker.broker.failover import FailedOverError, enduring
from legit_worker.broker.ledger import Ledger
from legit_worker.broker.reserve import (
    MORE,
    MOST_BYTES,
    MOST_MESSAGES,
    NO_ROOM,
    RESERVE,
    SHA1,
    UNSURE,
    Reserved,
    Source,
)
from legit_worker.broker.returning import DELIVERIES, count

logger = logging.getLogger(__name__)

#: The list that keeps bytes which are no message, and messages that can't become a task.
UNREADABLE_KEY = "legit.unreadable"

#: Parts of a server's answer, in lower case, to a command that it does not have or that this user may not run. Redis
#: raises no `NoPermissionError` inside a script.
REFUSALS = ("unknown command", "unknown subcommand", "can't run this command", "acl failure in script")

#: The refusals that this process has logged.
refusals: set[str] = set()


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


class ReservingChannel(stock.Channel):
    """A Redis channel that reserves messages. It overrides kombu's `BRPOP` handlers to run the script.

    It has three states. Looking: the channel awaits the script's answer (`_in_poll`). Waiting: the lists were empty,
    and each has a bell. Full: the prefetch count is used up, and kombu doesn't call.
    """

    QoS = ReservingQoS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._bells: dict[str, Bell] = {}
        #: Lists that had a message. A list of a lower priority gets a bell once it has had one.
        self._seen: set[str] = set()
        self._reserved: deque[Reserved] = deque()
        #: The lists that the script was asked about; empty if kombu sent a `BRPOP`.
        self._asked: list[Source] = []
        #: Queues whose consumer doesn't ack.
        self._no_ack_queues: set[str] = set()
        self._looking = True
        #: Until then a server without memory lets no bell wait, and the script looks now and then.
        self._full_until = 0.0
        self._has_script = False
        self._group = 1
        #: Acks that the outstanding question has brought along.
        self._riding: list[str] = []
        #: While a suspect is next for which the worker holds too many messages: how many it may hold together with it.
        self._suspect: int | None = None
        #: What the script is told about the bytes of which it was not sure.
        self._verdict = ""
        #: The server's refusal, after which kombu fetches the messages; None while the script reserves them.
        self.refusal: str | None = None
        #: The tag of the message that is being delivered, if the script has noted it.
        self.noted: str | None = None
        super().__init__(*args, **kwargs)
        #: What this process holds of this broker's messages.
        self.ledger: Ledger = owners.opened(self)

    @functools.cached_property
    def plain_client(self) -> Redis:
        """A client that adds no prefix to keys."""
        return Redis(connection_pool=self.pool)

    @property
    def awaits_answer(self) -> bool:
        """Whether the script may have reserved messages that have not arrived yet."""
        return bool(self._in_poll and self._asked)

    def basic_consume(self, queue: str, no_ack: bool = False, *args: Any, **kwargs: Any) -> Any:
        """Remember the queues whose consumer doesn't ack. If there are no others, kombu fetches the messages."""
        (self._no_ack_queues.add if no_ack or not self.ack_emulation else self._no_ack_queues.discard)(queue)
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    def _update_queue_cycle(self) -> None:
        """Look at the lists again: a queue was added or cancelled."""
        super()._update_queue_cycle()
        self._looking = True

    def _sources(self) -> list[Source]:
        """Return the lists of all consumed queues, in the script's order."""
        queues = self._queue_cycle.consume(len(self.active_queues))
        return [
            Source(queue, self.global_keyprefix + self._q_for_pri(queue, step), queue not in self._no_ack_queues)
            for step in self.priority_steps
            for queue in queues
        ]

    def _brpop_start(self, timeout: float | None = None) -> None:
        """Ask for messages: kombu has room for more and awaits no answer. Only BRPOP uses `timeout`."""
        if self.refusal is not None or self._no_ack_queues.issuperset(self.active_queues):
            self._asked = []
            super()._brpop_start(timeout or self.patience())
        elif self._suspect is not None and not self._has_room_for_suspect():
            return
        elif not self._looking and not self.ledger.unsent:
            if monotonic() >= self._full_until:
                self._hang_bells()
        elif self._script_is_there():
            self._ask()

    def _has_room_for_suspect(self) -> bool:
        """Tell whether the worker holds few enough messages by now, and look again then."""
        bounds = [bound for bound in (self._suspect, self.ledger.bound) if bound]
        has_room = self.ledger.awake < min(bounds, default=1)
        if has_room:
            self._suspect = None
        return has_room

    def _ask(self) -> None:
        sources = self._sources()
        if not sources:
            return
        self._asked, self._riding = sources, self.ledger.take_acks()
        ours = self.ledger.keys
        keys = [ours.unacked, ours.index, ours.unreadable, ours.held(self.ledger.owner)]
        keys += [source.key for source in sources]
        self._in_poll = self.client.connection
        self._brpop_sent_at = monotonic()
        self.client.connection.send_command("EVALSHA", SHA1, len(keys), *keys, *self._arguments(sources))

    def _arguments(self, sources: list[Source]) -> list[Any]:
        """Return what the script is told beside its keys."""
        queues = sources[: len(sources) // len(self.priority_steps)]
        named = [part for source in queues for part in (source.queue, int(source.acks))]
        turns = int(self.queue_order_strategy == "round_robin")
        ledger, riding = self.ledger, self._riding
        if self.connection.cycle.hub is None:
            # A caller gets one message a call, as from kombu; and whatever the worker holds: its task waits for it.
            room, company = 1, [0, 0, 0]
        else:
            room = self.qos.can_consume_max_estimate() or self._group
            company = [ledger.max_deliveries, ledger.awake, ledger.bound]
        new_tag, verdict, self._verdict = f"{uuid4()}.", self._verdict, ""
        is_owned = int(bool(ledger.owner))
        fixed = [min(self._group, room), MOST_BYTES, repr(time()), new_tag, turns, verdict, is_owned, *company]
        return [*fixed, len(riding), *riding, *named]

    def _brpop_read(self, **options: Any) -> bool:
        """Read the server's answer and deliver its messages. Raises `Empty` if there were none."""
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
            answer = self.client.parse_response(self.client.connection, "EVALSHA", **options)
        except NoScriptError:  # the server was restarted
            self._has_script = False
            self.ledger.ack_again(self._riding)
            return []
        except self.connection_errors:
            self.ledger.ack_again(self._riding)
            self.ledger.is_unsure = True
            self.client.connection.disconnect()
            raise
        except ResponseError as error:
            self.ledger.ack_again(self._riding)
            self._take_kombus_way(error)
            return []
        finally:
            self._in_poll = None
            self._riding = []
            if hasattr(self, "_flush_brpop_reauth"):  # kombu 5.7 does this once the connection is idle
                self._flush_brpop_reauth()
        return self._understand(*answer)

    def _understand(self, state: int, suspect: int, *found: Any) -> list[Reserved]:
        """Note what the script said of what is next, and what it reserved."""
        self._looking = bool(state)
        self._group = min(2 * self._group, MOST_MESSAGES) if state == MORE else 1
        self._suspect = suspect if state == NO_ROOM else None
        reserved = []
        for number, tag, raw in zip(found[::3], found[1::3], found[2::3], strict=True):
            source = self._asked[number - 1]
            self._seen.add(source.key)
            reserved.append(Reserved(source, bytes_to_str(tag), raw))
            if source.acks and tag:
                self.ledger.hold(reserved[-1].tag, source)
        if state == UNSURE:
            self._judge(reserved.pop())
        return reserved

    def _judge(self, unsure: Reserved) -> None:
        """Decide whether the bytes at the end of a list are a message. The script acts on it when it is asked next."""
        is_message = unsure.payload() is not None
        self._verdict = ("+" if is_message else "-") + unsure.sha1
        if not is_message:
            logger.error(
                "%d bytes in queue %s are no message, and are put into the list %s: %.100r",
                *(len(unsure.raw), unsure.source.queue, UNREADABLE_KEY, unsure.raw),
            )

    def _script_is_there(self) -> bool:
        """Load the script if this server may not have it. kombu's own scripts need the same commands."""
        try:
            owners.keep_alive(self)
            self._has_script = self._has_script or bool(self.client.script_load(RESERVE))
        except ResponseError as error:
            self._take_kombus_way(error)
        return self._has_script

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
                    "%d bytes in queue %s are no message, and were put into the list %s: %.100r",
                    *(len(reserved.raw), reserved.source.queue, UNREADABLE_KEY, reserved.raw),
                )
                self._move_aside(reserved.raw, reserved.tag)

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
            self.ledger.describe(reserved.tag, deliveries, headers.get("eta"))
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
        """Move a message that can't become a task from its queue to the list `UNREADABLE_KEY`."""
        self._move_aside(dumps(message._raw), message.delivery_tag)
        message.reject()  # for kombu's own accounts: the server has forgotten the message by now

    def _move_aside(self, raw: bytes | str, tag: str) -> None:
        self.ledger.put_aside(self.plain_client, tag, raw)

    def _hang_bells(self) -> None:
        sources = self._sources()
        queues = len(self.active_queues)
        self._seen.intersection_update(source.key for source in sources)
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
        """Look at the lists again: one has a message, or the lists without a bell are due for a look."""
        if bell.asked_at is None:  # the server closed this idle connection while the worker was busy
            self.drop(bell)
            return
        try:
            bell.answer()
        except FailedOverError as error:
            self.drop(bell)
            if not error.is_full:
                raise
            self._full_until = monotonic() + self.patience()
        except ResponseError as error:
            self._take_kombus_way(error)
        except self.connection_errors:
            self.drop(bell)
            raise
        self._looking = True

    def drop(self, bell: Bell) -> None:
        """Disconnect a bell. `_hang_bells` makes another if it needs one."""
        self._bells.pop(bell.key, None)
        self.connection.cycle.unwatch(bell)
        bell.connection.disconnect()

    def patience(self) -> float:
        """Return the seconds that the server waits before it answers that the list is empty."""
        return float(getattr(self.connection, "brpop_timeout", 1)) or 1.0  # kombu 5.5 has none

    def _take_kombus_way(self, error: ResponseError) -> None:
        """Let kombu fetch the messages if this server refuses the script. Raises any other error again."""
        text = str(error)
        if not isinstance(error, NoPermissionError) and not any(refusal in text.lower() for refusal in REFUSALS):
            raise error
        self.refusal = text
        if text not in refusals:
            refusals.add(text)
            logger.warning(
                "the Redis server does not let this worker reserve messages (%s): the worker fetches them one at a "
                "time, and if it is killed, a message on its way to it is lost, as with any Celery worker. To reserve "
                "messages, take Redis 6.2 or later, and a user who may run SCRIPT LOAD, EVALSHA and BLMOVE",
                text,
            )
        for bell in list(self._bells.values()):
            self.drop(bell)

    def close(self) -> None:
        """Give back what was not delivered, and what no task goes on with. What can't be sent now, the ledger keeps."""
        if self.closed:
            return
        self._closing = True
        for bell in list(self._bells.values()):
            self.drop(bell)
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
