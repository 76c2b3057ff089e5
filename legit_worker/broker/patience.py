"""Messages of RabbitMQ that stay in the connection while a task waits that should not wait for them.

kombu reads one message at each turn of the hub, and once more whenever the connection is readable. So each turn reads
one message more than the turn before, and a finished result waits until all their tasks have begun.

An answer of RabbitMQ to a question comes behind all messages that it had sent. So tasks don't begin before it.

In: the hub's reads, and questions. Out: the same; or one read at each turn, as long as a task waits; and whether an
answer is waited for.

Sources: kombu.transport.base.Transport.on_readable (5.5 to 5.7), amqp.abstract_channel.AbstractChannel.wait (5.4).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from legit_worker.broker.owners import is_hurried


class _Waits(threading.local):
    """One thread's."""

    #: How many answers are waited for, each within the one before.
    depth = 0


_waits = _Waits()


def is_answer_awaited() -> bool:
    """Whether this thread reads a connection until an answer comes: messages before it are only kept."""
    return _waits.depth > 0


class PatientChannel:
    """Mixed into a py-amqp channel class."""

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        """Wait for an answer. A message that comes first may bring a command, whose own question comes within."""
        _waits.depth += 1
        try:
            return super().wait(*args, **kwargs)  # type: ignore[misc]
        finally:
            _waits.depth -= 1


class PatientTransport:
    """Mixed into kombu's transport for RabbitMQ. Lives on the main thread."""

    def _make_reader(self, connection: Any, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        """Return what the hub calls when the connection is readable."""
        reads = _Reads(connection)
        read = super()._make_reader(reads, *args, **kwargs)  # type: ignore[misc]

        def read_once_more(loop: Any) -> None:
            reads.coming += 1
            read(loop)

        return read_once_more


class _Reads:
    """What kombu's reader sees of a connection. The hub calls the reader again, if it has read something."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        #: How often the hub will call the reader from now on, though the connection may not be readable: TLS has read
        #: more than it has given.
        self.coming = 0

    @property
    def connected(self) -> bool:
        """Whether the connection is open."""
        return bool(self._connection.connected)

    def drain_events(self, timeout: float) -> None:
        """Read until there is one method. In a hurry, only the last call of those that are coming reads.

        Whatever hurries has set the pool's wakeup, so the hub's next turn comes at once. It reads there, however long
        the hurry lasts: heartbeats and remote control are such methods, too.
        """
        self.coming -= 1
        if self.coming and is_hurried():
            raise TimeoutError  # kombu lets this one go
        self._connection.drain_events(timeout=timeout)
        self.coming += 1
