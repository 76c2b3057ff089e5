"""Messages of RabbitMQ that stay in the connection while a task waits that should not wait for them.

kombu reads one message at each turn of the hub, and once more whenever the connection is readable. So each turn reads
one message more than the turn before, and a finished result waits until all their tasks have begun.

In: the hub's reads. Out: the same, or none.
"""

from __future__ import annotations

from typing import Any

from legit_worker.broker.owners import is_hurried


class PatientTransport:
    """Mixed into kombu's transport for RabbitMQ."""

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Let the connection know that a hub reads it, which comes back."""
        connection.is_read_by_hub = True
        super().register_with_event_loop(connection, loop)  # type: ignore[misc]


class PatientConnection:
    """Mixed into a py-amqp connection class. Lives on the main thread."""

    #: Whether the worker's hub reads it.
    is_read_by_hub = False

    def drain_events(self, timeout: float | None = None) -> Any:
        """Read until there is one method, unless the hub should go round first. Only the hub waits for 0 seconds.

        kombu's reader (kombu.transport.base, 5.5 to 5.7) then reads at the hub's next turn. Whatever hurries has set
        the pool's wakeup, so that turn comes at once.
        """
        if timeout == 0 and self.is_read_by_hub and is_hurried():
            return None
        return super().drain_events(timeout)  # type: ignore[misc]
