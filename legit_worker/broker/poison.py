"""Messages that were delivered too often.

In: messages of any broker. Out: how many workers they have outlived, and records of those that are not run any more.
"""

from __future__ import annotations

import base64
from datetime import datetime, timezone
from typing import Any

import kombu
from kombu.utils.encoding import str_to_bytes

from legit_worker.broker.redis import ReservingChannel
from legit_worker.broker.returning import DELIVERIES, count

#: The list of records on Redis, and the queue of records on other brokers.
DEAD = "legit.dead"


def deliveries_of(message: Any) -> int:
    """Count how often a message was delivered before, and not acked.

    On Redis, each time ended with the death of a worker. RabbitMQ counts for quorum queues: lost connections, too.
    """
    if isinstance(message.channel, ReservingChannel):
        return count((message.delivery_info or {}).get(DELIVERIES))
    return count((message.headers or {}).get("x-delivery-count"))


def bury(message: Any, reason: str) -> None:
    """Let a message leave a record among the dead ones. On Redis that is one step with the message's ack.

    Raises what the broker's connection raises.
    """
    channel = message.channel
    if isinstance(channel, ReservingChannel):
        channel.ledger.bury(message.delivery_tag, record(message, reason, channel.queue_of(message.delivery_tag)))
        return
    with channel.connection.client.clone() as connection:
        connection.transport_options = {**connection.transport_options, "confirm_publish": True}
        connection.SimpleQueue(kombu.Queue(DEAD, routing_key=DEAD), serializer="json").put(record(message, reason))


def record(message: Any, reason: str, queue: str = "") -> dict[str, Any]:
    """Return what `legit.dead` keeps of a message. `message` in it is as kombu puts messages into Redis."""
    headers = {name: value for name, value in (message.headers or {}).items() if name != DELIVERIES}
    to = message.delivery_info or {}
    return {
        "v": 1,
        "id": headers.get("id"),
        "task": headers.get("task"),
        "queue": queue or to.get("routing_key"),
        "exchange": to.get("exchange"),
        "routing_key": to.get("routing_key"),
        "reason": reason,
        "deliveries": deliveries_of(message),
        "at": datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "message": _payload(message, headers),
    }


def _payload(message: Any, headers: dict[str, Any]) -> dict[str, Any]:
    raw = getattr(message, "_raw", None)
    if raw is None:
        return {
            "body": base64.b64encode(str_to_bytes(message.body)).decode(),
            "content-type": message.content_type,
            "content-encoding": message.content_encoding,
            "headers": headers,
            "properties": {**(message.properties or {}), "body_encoding": "base64", "delivery_info": {}},
        }
    to = {name: value for name, value in raw["properties"]["delivery_info"].items() if name != DELIVERIES}
    return {**raw, "headers": headers, "properties": {**raw["properties"], "delivery_info": to}}
