"""Which messages this process holds, and what is still to be told to the broker about them.

In: messages as channels reserve, ack and lose them. Out: what goes into the outbox, which outlives the channel and its
connection. In a worker there is one ledger per broker; elsewhere each channel has its own, and no owner's name.
"""

from __future__ import annotations

import logging
import time as clocks
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from math import inf
from time import monotonic, time
from typing import Any
from uuid import uuid4

from kombu.utils.json import dumps
from redis import Redis

from legit_worker.broker.outbox import Outbox
from legit_worker.broker.reserve import Source, company
from legit_worker.broker.returning import Keys, eta_seconds, held_by
from legit_worker.broker.weakly import Weakly

logger = logging.getLogger(__name__)

#: Seconds between two looks for tasks that ended without an ack after they had lost their connection.
LOOK = 1.0

#: What a ledger has of a message that it does not hold.
missing = object()


def uptime() -> float:
    """Return seconds of a clock that nobody sets, and that goes on while the machine sleeps, as its lease does.

    Linux alone has one for sure. Python's monotonic clock stands still there meanwhile.
    """
    clock = getattr(clocks, "CLOCK_BOOTTIME", None)
    return monotonic() if clock is None else clocks.clock_gettime(clock)


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
        #: What is still to be told to the server.
        self.outbox = Outbox(keys, self.owner)
        #: The open channels.
        self.channels: Weakly[Any] = Weakly()
        #: Tags whose channel has closed while their tasks go on; and those whose tasks were gone at the last look.
        self.carried: set[str] = set()
        self._silent: set[str] = set()
        self._looked_at = 0.0
        #: Until when no other worker takes this one for dead, by `uptime`.
        self.alive_until = inf
        #: Whether others took this worker for dead, and may have messages that it holds.
        self.has_lapsed = False
        #: Whether the server may have noted messages of which this process never heard.
        self.is_unsure = False
        #: Whether the log has said that acks wait for a connection.
        self.has_told = False
        #: Whether no other connection comes, by which what is unsent could be sent.
        self.is_left = worker is None

    def __repr__(self) -> str:
        return f"<Ledger of {self.owner or 'nobody'}: {len(self.held)} held, {self.outbox!r}>"

    # What is held

    def hold(self, tag: str, source: Source | None = None) -> None:
        """Note that this process has a message."""
        self.outbox.has_left(tag)
        self.held.setdefault(tag, source)

    def forget(self, tag: str) -> Any:
        """Hold a message no more. Returns what `held` had of it, or `missing`."""
        self.carried.discard(tag)
        self.special.discard(tag)
        return self.held.pop(tag, missing)

    def ack(self, tag: str) -> None:
        """Have a message acked, unless it was given back."""
        if tag in self.held:
            self.outbox.ack(tag)  # before it is forgotten: another thread must not take it for a lost one
            self.forget(tag)

    def give_back(self, tag: str, *, to_back: bool = False) -> None:
        """Have a message given back to its list. Messages that kombu fetched it restores itself."""
        source = self.held.get(tag)
        if source is not None:
            self.outbox.give_back(tag, source.key, to_back=to_back)
        self.forget(tag)

    def bury(self, tag: str, record: dict[str, Any]) -> None:
        """Let a message leave a record among the dead ones, in the same step as its ack."""
        if tag in self.held:
            self.outbox.records[tag] = dumps(record)

    # What outlives a connection

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
        return self.has_lapsed or uptime() > self.alive_until

    def forget_lapsed(self, client: Redis) -> None:
        """Hold no more what others took over while this worker gave no sign of life. It has given one since."""
        self.has_lapsed = False
        mine = [tag for tag, source in list(self.held.items()) if source is not None]
        try:
            noted = held_by(client, self.keys, self.owner)
        except BaseException:
            self.has_lapsed = True
            raise
        gone = [tag for tag in mine if tag not in noted and self.forget(tag) is not missing]
        self.outbox.keep_nothing_but(noted)
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

    @property
    def is_settled(self) -> bool:
        """Whether the server must hear of nothing but acks."""
        return not self.is_unsure and self.outbox.has_only_acks

    def flush(self, client: Redis) -> None:
        """Send everything. If a connection fails, raise its error, and keep what may not have arrived."""
        if self.is_unsure and not any(channel.awaits_answer for channel in self.channels):
            self._find_lost(client)
        self.outbox.send(client)

    def knows(self, tag: str) -> bool:
        """Whether this process holds a message, or has yet to tell the server what became of it."""
        return tag in self.held or tag in self.outbox

    def _find_lost(self, client: Redis) -> None:
        """Have those messages given back that the server noted for this process, and that never arrived."""
        noted = held_by(client, self.keys, self.owner) if self.owner else {}
        self.is_unsure = False
        lost = {tag: taken.key for tag, taken in noted.items() if not self.knows(tag)}
        if lost:
            logger.warning("%d messages were lost on their way with a connection, and are given back", len(lost))
        for tag, key in lost.items():
            self.outbox.give_back(tag, key)
