"""Acks that go out together, and a channel's part of the ledger.

In: acks, one by one, as Celery makes them. Out: they ride with the next reservation; without one, they take one round
trip in each turn of the hub.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from time import time
from typing import Any

from kombu.transport import redis as stock
from kombu.transport import virtual
from kombu.utils.encoding import bytes_to_str
from redis.exceptions import ResponseError

from legit_worker.broker.ledger import Ledger
from legit_worker.broker.outbox import MOST_ACKS
from legit_worker.broker.returning import put_aside
from legit_worker.broker.weakly import Weakly

logger = logging.getLogger(__name__)

#: The ledgers of open channels.
ledgers: Weakly[Ledger] = Weakly()

#: What servers have answered to messages that came back, or to records of them.
_refused: set[str] = set()


def flush_acks(*, may_wait: bool = False) -> None:
    """Send all unsent acks. Those that `may_wait` ride with the next question once the outstanding one is answered."""
    for ledger, channel in _open(ledger for ledger in ledgers if ledger.outbox.unsent or not ledger.is_settled):
        if not (may_wait and channel.awaits_answer and channel.qos.can_consume()):
            send(ledger, channel)


def settle() -> None:
    """Send what can't ride with a question. Raises the error of a connection that is lost."""
    for ledger in ledgers:
        ledger.look_for_silent()
    for ledger, channel in _open(ledger for ledger in ledgers if ledger.has_lapsed):
        ledger.forget_lapsed(channel.plain_client)
    for ledger, channel in _open(ledger for ledger in ledgers if not ledger.is_settled):
        _flush(ledger, channel)


def _open(some: Iterable[Ledger]) -> list[tuple[Ledger, Any]]:
    """Return ledgers, each with an open channel; preferably the one that takes tasks."""
    found = []
    for ledger in some:
        channels = [channel for channel in ledger.channels if not channel.closed]
        if channels:
            found.append((ledger, max(channels, key=lambda channel: bool(channel.active_queues))))
    return found


def send(ledger: Ledger, channel: Any) -> None:
    """Send everything of a ledger by a channel. What can't be sent waits for the next connection; the log says so once.

    A worker that ends tries again in each of its turns.
    """
    if ledger.is_settled and not ledger.outbox.unsent:
        return
    try:
        _flush(ledger, channel)
    except channel.connection_errors as error:
        if not ledger.has_told:
            logger.warning("%d acks wait for a connection to the broker: %r", ledger.outbox.unsent, error)
        ledger.has_told = True


def _flush(ledger: Ledger, channel: Any) -> None:
    """Send everything. Raises the error of a connection that fails.

    What the server refuses ends no worker: it is tried again, and the log says once why.
    """
    try:
        ledger.flush(channel.plain_client)
        ledger.has_told = False
    except channel.connection_errors:
        raise
    except ResponseError as error:
        if ledger.worker is None:
            raise
        if str(error) not in _refused:
            _refused.add(str(error))
            logger.error("the broker refuses messages or records of them, which stay with this worker: %s", error)


class ReservingQoS(stock.QoS):
    """kombu's accounts of unacked messages. It tells the ledger, and does not note again what the script has noted."""

    @property
    def ledger(self) -> Ledger:
        """The channel's."""
        ledger: Ledger = self.channel.ledger
        return ledger

    def can_consume(self) -> bool:
        """Tell whether there is room. Tasks that go on without their channel count, too."""
        return not self.prefetch_count or self._count() < self.prefetch_count

    def can_consume_max_estimate(self) -> int | None:
        """Return how many messages there is room for; None if there is no bound."""
        return max(self.prefetch_count - self._count(), 0) if self.prefetch_count else None

    def _count(self) -> int:
        return len(self._delivered) - len(self._dirty) + len(self.ledger.carried)

    def ack(self, delivery_tag: str) -> None:
        """Ack a message: before the hub waits, or now if there is no event loop, or later if the channel is closed."""
        virtual.QoS.ack(self, delivery_tag)
        self.ledger.ack(delivery_tag)
        if self.channel.closed:
            return
        if self.channel.connection.cycle.hub is None or self.ledger.outbox.unsent >= MOST_ACKS:
            _flush(self.ledger, self.channel)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Ack a message that is not wanted, or give it back."""
        if not requeue:
            self.ack(delivery_tag)
            return
        virtual.QoS.ack(self, delivery_tag)
        self.restore_by_tag(delivery_tag, leftmost=True)

    def append(self, message: Any, delivery_tag: str) -> None:
        """Note a message that is being delivered, unless the script has noted it."""
        self.ledger.hold(delivery_tag)
        if delivery_tag == self.channel.noted:
            virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)

    def restore_by_tag(self, tag: str, client: Any = None, leftmost: bool = False) -> None:
        """Give one message back: one that is not wanted, or another's that took longer than its visibility timeout.

        A worker that lives gives none back for that. It renews the message, if a clock or a sleeping machine makes it
        look old.
        """
        tag = bytes_to_str(tag)
        if self.ledger.held.get(tag) is not None and leftmost:
            self.ledger.give_back(tag, to_back=True)
            if not self.channel.closed:
                _flush(self.ledger, self.channel)
            return
        if not leftmost and self.ledger.worker is not None and tag in self.ledger.held:
            with self.channel.conn_or_acquire(client) as known:
                known.zadd(self.unacked_index_key, {tag: time()}, xx=True)
            return
        self.ledger.forget(tag)
        try:
            super().restore_by_tag(tag, client, leftmost)
        except (TypeError, ValueError):  # noted by an older release: even stock workers can't start with it there
            put_aside(self.channel.plain_client, self.ledger.keys, tag)

    def restore_unacked(self, client: Any = None) -> None:
        """Give back what the channel's end leaves, except the messages of tasks that go on."""
        for tag in self.ledger.outlive(self._delivered):
            super().restore_by_tag(tag, client)
        self._delivered.clear()
        if self.ledger.is_left:
            send(self.ledger, self.channel)
