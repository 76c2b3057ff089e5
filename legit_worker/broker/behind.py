"""How a message of RabbitMQ gets behind the others in its queue, with the number of workers that died of it.

RabbitMQ gives a dead worker's messages to the next one before all others, and a classic queue does not count them. So a
copy with the number goes to the queue's end, and then the message is acked. A worker that is killed between the two
steps leaves both.

In: messages, and their numbers. Out: copies.
"""

from __future__ import annotations

import logging
from time import monotonic
from typing import Any

import amqp
import kombu

from legit_worker.broker.returning import DELIVERIES, count

logger = logging.getLogger(__name__)

#: The count of a quorum queue, if the message came before. Classic queues count nothing.
COUNT = "x-delivery-count"

#: How often a message of a quorum queue was given to a consumer, from RabbitMQ 4.3 on. Its `COUNT` is then of failures.
ACQUIRED = "x-acquired-count"

#: The header of a copy with the exchange and the routing key by which its message came.
ADDRESS = "legit_address"

#: The header of a copy with how many of these workers have said since that they live.
VOUCHED = "legit_vouched"

#: Seconds that RabbitMQ may take to connect, and to confirm a copy.
PATIENCE = 5.0

#: Seconds in which no copy is tried after one that failed: at first, and at most. Suspects wait for each other then.
FIRST_PAUSE, LAST_PAUSE = 5.0, 60.0


class Behind:
    """One worker's own connection for copies, made when the first one goes out. Lives on the main thread."""

    def __init__(self) -> None:
        self._connection: kombu.Connection | None = None
        self._is_busy = False
        # Until when no copy is tried, by the monotonic clock, and the seconds of that pause.
        self._away_until = self._pause = 0.0

    def put(self, message: kombu.Message, queue: str, deliveries: int, vouched: int) -> bool:
        """Put a message behind the others in its queue. Returns False if RabbitMQ does not take the copy.

        A signal's handler may bring a message while a copy is on its way: it does not wait behind that one.
        """
        if self._is_busy or monotonic() < self._away_until:
            return False
        self._is_busy = True
        try:
            self._channel(message).basic_publish_confirm(
                _copy(message, deliveries, vouched), routing_key=queue, confirm_timeout=PATIENCE
            )
        except (amqp.AMQPError, amqp.exceptions.MessageNacked, OSError) as error:
            self._fail(queue, error)
            return False
        finally:
            self._is_busy = False
        self._pause = 0.0
        message.ack()
        return True

    def _fail(self, queue: str, error: BaseException) -> None:
        """Try no copy for a while: each would hold up everybody as long as this one did."""
        self._pause = min(max(2 * self._pause, FIRST_PAUSE), LAST_PAUSE)
        self._away_until = monotonic() + self._pause
        logger.warning(
            "RabbitMQ takes no copy of a message for the end of its queue %s, and gets none for %.0f s: %r",
            *(queue, self._pause, error),
        )
        self.close()

    def _channel(self, message: kombu.Message) -> Any:
        if self._connection is None:
            # Nobody reads this connection between two copies, so it must need no heartbeats.
            connection = message.channel.connection.client.clone(heartbeat=0)
            reach(connection)
            self._connection = connection
        return self._connection.default_channel

    def close(self) -> None:
        """Disconnect."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.collect()


def reach(connection: kombu.Connection, **options: Any) -> None:
    """Open a connection, or raise at once: kombu would try for ever. RabbitMQ then has to answer within `PATIENCE`.

    `options` are more of RabbitMQ's. A clone shares its options with the worker's own connection, which keeps them.
    """
    if connection.transport.driver_type == "amqp":
        connection.connect_timeout = PATIENCE
        own = {"read_timeout": PATIENCE, "write_timeout": PATIENCE, **options}
        connection.transport_options = {**connection.transport_options, **own}
    connection.ensure_connection(max_retries=1, timeout=PATIENCE, interval_start=0, reraise_as_library_errors=False)


def _copy(message: kombu.Message, deliveries: int, vouched: int) -> amqp.Message:
    to = message.delivery_info
    own = {DELIVERIES: deliveries, VOUCHED: vouched, ADDRESS: [to.get("exchange") or "", to.get("routing_key") or ""]}
    headers = {
        name: value for name, value in message.headers.items() if name not in (COUNT, ACQUIRED)
    }  # both begin anew
    properties = {**message.properties, "application_headers": headers | own}
    return amqp.Message(message.body, **properties)


def unpack(message: kombu.Message) -> tuple[int, int]:
    """Take what a copy brings off its headers, so that a task finds its message as it first came.

    Returns how many workers may have died of it, without those that RabbitMQ counts, and how many of them live.
    """
    deliveries, vouched = (count(message.headers.pop(name, 0)) for name in (DELIVERIES, VOUCHED))
    match message.headers.pop(ADDRESS, None):
        case [str() as exchange, str() as routing_key]:
            message.delivery_info |= {"exchange": exchange, "routing_key": routing_key, "redelivered": True}
    return deliveries, vouched
