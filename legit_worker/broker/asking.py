"""A Redis channel that asks the script for messages, and reads its answers.

In: lists that may have messages, and acks. Out: messages that this process holds from then on.
"""

from __future__ import annotations

import functools
import logging
from time import monotonic, time
from typing import Any
from uuid import uuid4

from kombu.utils.encoding import bytes_to_str
from redis import Redis
from redis.exceptions import NoScriptError, ResponseError

from legit_worker.broker import owners
from legit_worker.broker.hearing import HearingChannel
from legit_worker.broker.ledger import Ledger, uptime
from legit_worker.broker.reserve import (
    LAST,
    MORE,
    MOST_BYTES,
    MOST_MESSAGES,
    NO_ROOM,
    RESERVE,
    SHA1,
    SHARED_MESSAGES,
    UNSURE,
    Reserved,
    Source,
)
from legit_worker.broker.returning import held_by
from legit_worker.broker.tally import tally

logger = logging.getLogger(__name__)


class AskingChannel(HearingChannel):
    """The part of a reserving channel that asks. Lives on its connection's thread."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        #: The lists that the script was asked about; empty if kombu sent a `BRPOP`.
        self._asked: list[Source] = []
        self._has_script = False
        #: When the script was asked last, by `uptime`.
        self._asked_at = 0.0
        self._group = 1
        # Whether the lists were empty after the last answer, which brought as many as were asked for.
        self._saw_last = False
        #: Acks that the outstanding question has brought along.
        self._riding: list[str] = []
        #: While a suspect is next for which the worker holds too many messages: how many it may hold together with it.
        self._suspect: int | None = None
        #: The verdict on the bytes about which the script was not sure.
        self._verdict = ""
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

    @property
    def awaits_messages(self) -> bool:
        """The same, if it is likely: some were left when the script was asked before."""
        return self.awaits_answer and not self._saw_last

    @property
    def left_messages(self) -> bool:
        """Whether more messages were there than the script was asked for the last time."""
        return self._group > 1 and not self._saw_last

    @property
    def is_asking(self) -> bool:
        """Whether messages come by the script to a worker's event loop, which has room for more."""
        return bool(self._asked and self.connection.cycle.hub is not None and self.qos.can_consume())

    def _has_room_for_suspect(self) -> bool:
        """Tell whether the worker holds few enough messages by now, and look again then."""
        bounds = [bound for bound in (self._suspect, self.ledger.bound) if bound]
        has_room = self.ledger.awake < min(bounds, default=1)
        if has_room:
            self._suspect = None
        return has_room

    def _script_is_there(self) -> bool:
        """Load the script if this server may not have it. kombu's own scripts need the same commands."""
        try:
            owners.keep_alive(self)
            self._has_script = self._has_script or bool(self.client.script_load(RESERVE))
        except ResponseError as error:
            self._take_kombus_way(error)
        return self._has_script

    def _ask(self) -> None:
        sources = self._sources()
        if not sources:
            return
        self._asked, self._riding = sources, self.ledger.outbox.take_acks()
        ours = self.ledger.keys
        keys = [ours.unacked, ours.index, ours.unreadable, ours.held(self.ledger.owner)]
        keys += [source.key for source in sources]
        self._in_poll = self.client.connection
        self._brpop_sent_at, self._asked_at = monotonic(), uptime()
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
            if ledger.worker is not None and ledger.worker.is_shared():
                room = min(room, SHARED_MESSAGES)
            company = [ledger.max_deliveries, ledger.awake, ledger.bound]
        new_tag, verdict, self._verdict = f"{uuid4()}.", self._verdict, ""
        is_owned = int(bool(ledger.owner))
        fixed = [min(self._group, room), MOST_BYTES, repr(time()), new_tag, turns, verdict, is_owned, *company]
        return [*fixed, len(riding), *riding, *named]

    def _read_answer(self, options: dict[str, Any]) -> list[Reserved]:
        try:
            answer = self._parse("EVALSHA", options)
        except NoScriptError:  # the server was restarted
            self._has_script = False
            self._ack_again()
            return []
        except self.connection_errors:
            raise
        except ResponseError as error:
            self._ack_again()
            self._take_kombus_way(error)
            return []
        finally:
            self._riding = []
        return self._understand(*answer)

    def _read_popped(self, options: dict[str, Any]) -> list[Reserved]:
        """Read the answer to kombu's own `BRPOP`. The server has noted nothing of the message."""
        popped = self._parse("BRPOP", options)
        if not popped:
            return []
        key, raw = bytes_to_str(popped[0]), popped[1]
        queue = key.rsplit(self.sep, 1)[0]
        return [Reserved(Source(queue, key, acks=False), str(uuid4()), raw)]

    def _parse(self, command: str, options: dict[str, Any]) -> Any:
        try:
            return self.client.parse_response(self.client.connection, command, **options)
        except self.connection_errors:
            self.client.connection.disconnect()
            raise
        finally:
            self._in_poll = None
            if hasattr(self, "_flush_brpop_reauth"):  # kombu 5.7 does this once the connection is idle
                self._flush_brpop_reauth()

    def _on_connection_disconnect(self, connection: Any) -> None:
        """Somebody disconnects, this channel or kombu's look at an answer that is overdue: nothing may have arrived."""
        if self.awaits_answer and self._in_poll is connection:
            self._ack_again()
            self.ledger.is_unsure = True
        super()._on_connection_disconnect(connection)

    def _ack_again(self) -> None:
        self.ledger.outbox.ack_again(self._riding)
        self._riding = []

    def _understand(self, state: int, suspect: int, *found: Any) -> list[Reserved]:
        """Note what the script says about the next messages, and what it reserved."""
        self._looking = bool(state)
        self._saw_last = state == LAST
        self._group = min(2 * self._group, MOST_MESSAGES) if state in (MORE, LAST) else 1
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
        return self._still_held(reserved)

    def _still_held(self, reserved: list[Reserved]) -> list[Reserved]:
        """Leave out what others took over, if this process did not come to read the answer for most of its lease."""
        worker, waited = self.ledger.worker, uptime() - self._asked_at
        if worker is None or waited < worker.lease_seconds / 2:
            return reserved
        held = held_by(self.plain_client, self.ledger.keys, self.ledger.owner)
        for one in reserved:
            if one.source.acks and one.tag not in held:
                self.ledger.forget(one.tag)
        return [one for one in reserved if not one.source.acks or one.tag in held]

    def _judge(self, unsure: Reserved) -> None:
        """Decide whether the bytes at the end of a list are a message. The script acts on it when it is asked next."""
        is_message = unsure.payload() is not None
        self._verdict = ("+" if is_message else "-") + unsure.sha1
        if not is_message:
            tally["unreadable"] += 1
            logger.error(
                "%d bytes in queue %s are no message, and are put into the list %s: %.100r",
                *(len(unsure.raw), unsure.source.queue, self.ledger.keys.unreadable, unsure.raw),
            )
