"""Acks that go out together.

In: acks, one by one, as Celery makes them. Out: one round trip in each turn of the hub.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

from kombu.transport import redis as stock
from kombu.transport import virtual

logger = logging.getLogger(__name__)

#: Acks go out before the hub waits, or as soon as there are this many.
MOST_ACKS = 64

#: The accounts that have unsent acks.
_with_acks: weakref.WeakSet[ReservingQoS] = weakref.WeakSet()


def flush_acks() -> None:
    """Send all unsent acks."""
    for qos in list(_with_acks):
        qos.flush_acks()


class ReservingQoS(stock.QoS):
    """kombu's accounts of unacked messages. It groups acks, and does not note again what the script has noted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._acked: list[str] = []

    def ack(self, delivery_tag: str) -> None:
        """Ack a message: now without an event loop, else before the hub waits."""
        if self.channel.closed:  # the connection was lost, kombu gave its messages back, and they come again
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
        """Send the unsent acks. If the connection is gone, forget them: their tasks run again."""
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
        """Note a message that is being delivered, unless the script has noted it."""
        if delivery_tag == self.channel.noted:
            virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)
