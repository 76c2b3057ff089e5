"""How a message of RabbitMQ gets behind the others in its queue, with the number of workers that died of it.

RabbitMQ gives a dead worker's messages to the next one before all others, and a classic queue does not count them. So a
copy with the number goes to the queue's end, and then the message is acked. A worker that is killed between the two
steps leaves both.

In: messages, and their numbers. Out: copies.
"""

from __future__ import annotations

import logging
from typing import Any

import amqp
import kombu

from legit_worker.broker.returning import DELIVERIES, count

logger = logging.getLogger(__name__)

#: The count of a quorum queue, if the message came before. Classic queues count nothing.
COUNT = "x-delivery-count"

#: The header of a copy with the exchange and the routing key by which its message came.
ADDRESS = "legit_address"

#: Seconds that RabbitMQ may take to confirm a copy.
CONFIRM_SECONDS = 5.0


class Behind:
    """One worker's own connection for copies, made when the first one goes out. Lives on the main thread."""

    def __init__(self) -> None:
        self._connection: kombu.Connection | None = None

    def put(self, message: kombu.Message, queue: str, deliveries: int) -> bool:
        """Put a message behind the others in its queue. Returns False if RabbitMQ does not take the copy."""
        try:
            self._channel(message).basic_publish_confirm(
                _copy(message, deliveries), routing_key=queue, confirm_timeout=CONFIRM_SECONDS
            )
        except (amqp.AMQPError, amqp.exceptions.MessageNacked, OSError) as error:
            logger.warning("RabbitMQ takes no copy of a message for the end of its queue %s: %r", queue, error)
            self.close()
            return False
        message.ack()
        return True

    def _channel(self, message: kombu.Message) -> Any:
        if self._connection is None:
            # Nobody reads this connection between two copies, so it must need no heartbeats.
            self._connection = message.channel.connection.client.clone(heartbeat=0)
        return self._connection.default_channel

    def close(self) -> None:
        """Disconnect."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.collect()


def _copy(message: kombu.Message, deliveries: int) -> amqp.Message:
    to = message.delivery_info
    own = {DELIVERIES: deliveries, ADDRESS: [to.get("exchange") or "", to.get("routing_key") or ""]}
    headers = {name: value for name, value in message.headers.items() if name != COUNT}  # the copy's begins anew
    properties = {**message.properties, "application_headers": headers | own}
    return amqp.Message(message.body, **properties)


def unpack(message: kombu.Message) -> int:
    """Take what a copy brings off its headers, so that a task finds its message as it first came.

    Returns the number of workers that died of it, without those that RabbitMQ counts.
    """
    deliveries = count(message.headers.pop(DELIVERIES, 0))
    match message.headers.pop(ADDRESS, None):
        case [str() as exchange, str() as routing_key]:
            message.delivery_info |= {"exchange": exchange, "routing_key": routing_key, "redelivered": True}
    return deliveries
