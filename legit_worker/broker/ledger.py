"""Which messages this process holds, and what is still to be told to the broker about them.

In: messages as channels reserve, ack and lose them. Out: acks and returns, which outlive the channel and its
connection. In a worker there is one ledger per broker; elsewhere each channel has its own, and no owner's name.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from math import inf
from time import monotonic, time
from typing import Any
from uuid import uuid4

from kombu.utils.json import dumps
from redis import Redis

from legit_worker.broker.reserve import Source, company
from legit_worker.broker.returning import Keys, eta_seconds, give_back, held_by
from legit_worker.broker.scripts import Script

logger = logging.getLogger(__name__)

#: Acks that one command takes. Lua can't unpack 8,000.
MOST_ACKS = 500

#: Seconds between two looks for tasks that ended without an ack after they had lost their connection.
LOOK = 1.0


#: Acks a message, and keeps a record of it, unless it was given back. KEYS: the unacked messages, their index, what the
#: owner holds, the list of records. ARGV: tag, record.
BURY = Script("""
redis.call('HDEL', KEYS[3], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 then return 0 end
return redis.call('RPUSH', KEYS[4], ARGV[2])
""")

#: What a ledger has of a message that it does not hold.
missing = object()


@dataclass(frozen=True, kw_only=True)
class Worker:
    """What ledgers need to know of the worker of their process."""

    node: str
    #: Seconds until a worker that gives no sign of life counts as dead.
    lease_seconds: float
    #: How often a message may be delivered; 0 is no bound.
    max_deliveries: int
    #: The tags of the tasks that go on if their connection is lost, and are acked later.
    keeps: Callable[[], Collection[str]] = frozenset
    #: The tags of the tasks that can do no harm any more: their own code is over, and their result is on its way.
    harmless: Callable[[], Collection[str]] = frozenset
    #: Whether tasks wait that should not wait until all messages are delivered that have come.
    is_hurried: Callable[[], bool] = bool
    #: Whether such a task may come soon.
    is_shared: Callable[[], bool] = bool


class Special:
    """The held messages that other workers held as they died, and those that Celery starts later."""

    def __init__(self) -> None:
        # By tag: how many workers died, and when Celery starts the message: a time of `time.time`, 0 if at once.
        self._messages: dict[str, tuple[int, float]] = {}

    def add(self, tag: str, deliveries: int, eta: Any) -> None:
        """Note what a message says of itself."""
        starts_at = eta_seconds(eta)
        if deliveries or starts_at:
            self._messages[tag] = deliveries, starts_at

    def discard(self, tag: str) -> None:
        """A message is held no more."""
        self._messages.pop(tag, None)

    def is_suspect(self, tag: str) -> bool:
        """Whether workers died while they held a message."""
        return self._messages.get(tag, (0, 0.0))[0] > 0

    @property
    def asleep(self) -> int:
        """How many wait for their time."""
        now = time()
        return sum(starts_at > now for _, starts_at in list(self._messages.values()))

    def bound(self, most_deliveries: int) -> int:
        """How many messages may be held at most, since one of them may be deadly; 0 if there is no bound."""
        now = time()
        suspects = [deaths for deaths, starts_at in list(self._messages.values()) if deaths and starts_at <= now]
        return min((company(deaths, most_deliveries) for deaths in suspects), default=0)


class Ledger:
    """One broker's. Channels of the main thread use it, and so may a task's own threads and the lease's thread."""

    def __init__(self, keys: Keys, worker: Worker | None = None) -> None:
        self.keys = keys
        self.worker = worker
        #: The owner's name on the server; empty outside of a worker: then nobody looks after its messages.
        self.owner = f"{worker.node}:{uuid4()}" if worker is not None else ""
        self.max_deliveries = worker.max_deliveries if worker is not None else 0
        #: By tag, where each message came from that this process holds; None if kombu fetched it.
        self.held: dict[str, Source | None] = {}
        #: What is special about some of them.
        self.special = Special()
        #: The open channels.
        self.channels: weakref.WeakSet[Any] = weakref.WeakSet()
        #: Tags whose channel has closed while their tasks go on.
        self.carried: set[str] = set()
        #: Until when no other worker takes this one for dead, by the monotonic clock.
        self.alive_until = inf
        #: Whether others took this worker for dead, and may have messages that it holds.
        self.has_lapsed = False
        #: Whether the server may have noted messages of which this process never heard.
        self.is_unsure = False
        #: Whether no other connection comes, by which what is unsent could be sent.
        self.is_left = worker is None
        self._lock = threading.Lock()
        self._acked: list[str] = []
        # By tag, the list that a message goes back to; and the tags of those that go to its back.
        self._returned: dict[str, str] = {}
        self._to_back: set[str] = set()
        # By tag, the record that a message leaves as it is acked; and those that were acked.
        self._records: dict[str, str] = {}
        self._buried: dict[str, str] = {}
        # Carried tags whose tasks were gone at the last look.
        self._silent: set[str] = set()
        self._looked_at = 0.0

    def __repr__(self) -> str:
        return f"<Ledger of {self.owner or 'nobody'}: {len(self.held)} held, {len(self._acked)} acks unsent>"

    # What is held

    def hold(self, tag: str, source: Source | None = None) -> None:
        """Note that this process has a message."""
        self.held.setdefault(tag, source)

    def outlive(self, tags: Iterable[str]) -> list[str]:
        """A channel has closed: give back its messages, except those whose tasks go on.

        Returns the tags of those that kombu fetched and must restore itself.
        """
        kept = frozenset(self.worker.keeps()) if self.worker is not None else frozenset()
        fetched = []
        for tag in tags:
            if tag in kept and tag in self.held:
                self.carried.add(tag)
            elif self.held.get(tag, missing) is None:
                self.forget(tag)
                fetched.append(tag)
            else:
                self.give_back(tag)
        return fetched

    def look_for_silent(self) -> None:
        """Give back the messages of tasks that lost their connection, went on, and ended without an ack."""
        if not self.carried or self.worker is None or monotonic() - self._looked_at < LOOK:
            return
        self._looked_at = monotonic()
        gone = self.carried.difference(self.worker.keeps())
        for tag in gone & self._silent:  # an ack may come a moment after its task's end
            self.give_back(tag)
        self._silent = gone

    # Messages that others have by now

    @property
    def is_in_doubt(self) -> bool:
        """Whether others may have what this process holds. No task may begin until `forget_lapsed` has looked."""
        return self.has_lapsed or monotonic() > self.alive_until

    def forget_lapsed(self, client: Redis) -> None:
        """Hold no more what others took over while this worker gave no sign of life. It has given one since."""
        self.has_lapsed = False
        mine = [tag for tag, source in list(self.held.items()) if source is not None]
        try:
            noted = held_by(client, self.keys, self.owner)
        except BaseException:
            self.has_lapsed = True
            raise
        with self._lock:
            gone = [tag for tag in mine if tag not in noted and self.forget(tag) is not missing]
            for tag in self._returned.keys() - noted.keys():
                del self._returned[tag]
        if gone:
            logger.warning(
                "%d of its messages are others' by now: this worker runs none of them that it has not begun", len(gone)
            )

    # Room for suspects

    @property
    def awake(self) -> int:
        """How many of the held messages count: those that may do harm now, and those that must not be harmed."""
        harmless = self.worker.harmless() if self.worker is not None else ()
        # Others can still do harm to these. A suspect would lose a delivery again, and perhaps its last one.
        safe = sum(tag in self.held and not self.special.is_suspect(tag) for tag in harmless)
        return len(self.held) - self.special.asleep - safe

    @property
    def bound(self) -> int:
        """How many messages this process may hold at most while it holds these; 0 if there is no bound."""
        return self.special.bound(self.max_deliveries)

    # What the server must hear

    def ack(self, tag: str) -> None:
        """Have a message acked, unless it was given back."""
        with self._lock:
            if self.forget(tag) is missing:
                return
            if tag in self._records:
                self._buried[tag] = self._records.pop(tag)
            else:
                self._acked.append(tag)

    def give_back(self, tag: str, *, to_back: bool = False) -> None:
        """Have a message given back to its list. Messages that kombu fetched it restores itself."""
        with self._lock:
            source = self.forget(tag)
            self._records.pop(tag, None)
            if isinstance(source, Source):
                self._returned[tag] = source.key
                if to_back:
                    self._to_back.add(tag)

    def forget(self, tag: str) -> Any:
        """Hold a message no more. Returns what `held` had of it, or `missing`."""
        self.carried.discard(tag)
        self.special.discard(tag)
        return self.held.pop(tag, missing)

    def bury(self, tag: str, record: dict[str, Any]) -> None:
        """Let a message leave a record among the dead ones, in the same step as its ack."""
        if tag in self.held:
            self._records[tag] = dumps(record)

    @property
    def unsent(self) -> int:
        """How many acks the server has not heard of."""
        return len(self._acked)

    @property
    def is_settled(self) -> bool:
        """Whether the server must hear of nothing but acks."""
        return not (self.is_unsure or self._returned or self._buried)

    def take_acks(self) -> list[str]:
        """Take acks that a reservation brings along. Give them to `ack_again` if it failed."""
        with self._lock:
            taken, self._acked = self._acked[:MOST_ACKS], self._acked[MOST_ACKS:]
            return taken

    def ack_again(self, tags: list[str]) -> None:
        """Keep acks that may not have arrived. To ack twice does no harm."""
        with self._lock:
            self._acked = tags + self._acked

    def flush(self, client: Redis) -> None:
        """Send everything. If a connection fails, raise its error, and keep what may not have arrived."""
        if self.is_unsure:
            self._find_lost(client)
        while tags := self.take_acks():
            self._send_acks(client, tags)
        self._send_buried(client)
        self._send_returned(client)

    def _send_buried(self, client: Redis) -> None:
        buried = dict(self._buried)
        if buried:
            keys = [self.keys.unacked, self.keys.index, self.keys.held(self.owner), self.keys.dead]
            BURY.run_each(client, [(keys, [tag, record]) for tag, record in buried.items()])
        for tag in buried:
            self._buried.pop(tag, None)

    def _send_acks(self, client: Redis, tags: list[str]) -> None:
        pipe = client.pipeline(transaction=False)  # a full server takes acks, and no transactions
        pipe.hdel(self.keys.unacked, *tags)
        pipe.zrem(self.keys.index, *tags)
        if self.owner:
            pipe.hdel(self.keys.held(self.owner), *tags)
        try:
            pipe.execute()
        except BaseException:
            self.ack_again(tags)
            raise

    def _send_returned(self, client: Redis) -> None:
        for to_back in (False, True):
            lists = {tag: key for tag, key in list(self._returned.items()) if (tag in self._to_back) is to_back}
            if lists:
                give_back(client, self.keys, self.owner, lists, to_back=to_back)
            for tag in lists:
                self._to_back.discard(tag)
                self._returned.pop(tag, None)

    def _find_lost(self, client: Redis) -> None:
        """Have those messages given back that the server noted for this process, and that never arrived."""
        if any(channel.awaits_answer for channel in self.channels):
            return
        noted = held_by(client, self.keys, self.owner) if self.owner else {}
        self.is_unsure = False
        known = self.held.keys() | self._returned.keys() | self._buried.keys() | set(self._acked)
        lost = {tag: taken.key for tag, taken in noted.items() if tag not in known}
        if lost:
            logger.warning("%d messages were lost on their way with a connection, and are given back", len(lost))
            self._returned |= lost
