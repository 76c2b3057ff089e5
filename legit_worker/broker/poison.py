"""Messages that were delivered too often.

In: messages of any broker. Out: how many workers they have outlived, and records of those that are not run any more.
"""

from __future__ import annotations

import base64
import logging
from datetime import datetime, timezone
from typing import Any

import amqp
import kombu
from kombu.utils.encoding import str_to_bytes

from legit_worker.broker.behind import PATIENCE, reach
from legit_worker.broker.returning import DELIVERIES, count
from legit_worker.broker.tally import tally

logger = logging.getLogger(__name__)

#: The list of records on Redis, and the queue of records on other brokers.
DEAD = "legit.dead"


def deliveries_of(message: Any) -> int:
    """Count how often a message was delivered before, and not acked.

    On Redis, each time ended with the death of a worker. RabbitMQ counts for quorum queues: lost connections, too.
    """
    known = (message.delivery_info or {}).get(DELIVERIES)
    return count((message.headers or {}).get("x-delivery-count") if known is None else known)


def bury(message: Any, reason: str) -> None:
    """Let a message leave a record among the dead ones. On Redis that is one step with the message's ack.

    A record that the broker does not take goes into the log: the message has to leave its queue, or it ends each worker
    that gets it. Raises what a lost connection raises.
    """
    tally["poisoned"] += 1
    ledger = getattr(message.channel, "ledger", None)
    if ledger is not None:
        source = ledger.held.get(message.delivery_tag)
        queue = source.queue if source is not None else message.delivery_info["routing_key"]
        payload = message._raw
        ledger.bury(message.delivery_tag, record_of(payload, queue, reason, deliveries_of(message)))
        return
    if message.channel.connection is None:
        raise ConnectionResetError("the message's connection is gone: it comes again")
    queue = (message.delivery_info or {}).get("routing_key", "")
    record = record_of(_payload(message), queue, reason, deliveries_of(message))
    with message.channel.connection.client.clone() as connection:
        try:
            _put(connection, record)
        except (*connection.channel_errors, amqp.exceptions.MessageNacked, TimeoutError) as error:
            logger.error("the broker takes no record of a message into %s (%r), so here it is: %s", DEAD, error, record)


def _put(connection: kombu.Connection, record: dict[str, Any]) -> None:
    """Put a record into the queue of records. One that its owner made with other arguments stays as it is."""
    amqp_only = {"confirm_timeout": PATIENCE} if connection.transport.driver_type == "amqp" else {}
    reach(connection, confirm_publish=True)
    try:
        kombu.Queue(DEAD, channel=connection.channel()).queue_declare(passive=True)
    except connection.channel_errors:  # the queue is missing, and RabbitMQ has closed the channel
        kombu.Queue(DEAD, channel=connection.channel()).queue_declare()
    producer = connection.Producer(connection.channel(), serializer="json")
    producer.publish(record, routing_key=DEAD, delivery_mode=2, **amqp_only)


def record_of(payload: dict[str, Any], queue: str, reason: str, deliveries: int) -> dict[str, Any]:
    """Return what `legit.dead` keeps of a message, which comes as kombu puts messages into Redis."""
    headers = {name: value for name, value in payload["headers"].items() if name != DELIVERIES}
    to = dict(payload["properties"].get("delivery_info") or {})
    to.pop(DELIVERIES, None)
    return {
        "v": 1,
        "id": headers.get("id"),
        "task": headers.get("task"),
        "queue": queue,
        "exchange": to.get("exchange"),
        "routing_key": to.get("routing_key"),
        "reason": reason,
        "deliveries": deliveries,
        "at": datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "message": {**payload, "headers": headers, "properties": {**payload["properties"], "delivery_info": to}},
    }


def _payload(message: Any) -> dict[str, Any]:
    """Return an AMQP message as kombu would put it into Redis."""
    to = {part: (message.delivery_info or {}).get(part) for part in ("exchange", "routing_key")}
    properties = {**(message.properties or {}), "body_encoding": "base64", "delivery_info": to}
    return {
        "body": base64.b64encode(str_to_bytes(message.body)).decode(),
        "content-type": message.content_type,
        "content-encoding": message.content_encoding,
        "headers": message.headers or {},
        "properties": properties,
    }
