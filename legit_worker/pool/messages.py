"""What a broker says of a message: which task it is for, and whether it came before.

In: messages. Out: keys, and yes or no.
"""

from __future__ import annotations

import kombu

from legit_worker.pool.running import Key, key_from


def key_of(message: kombu.Message) -> Key | None:
    """A message's task id and its retries; None if it has none that tell it apart."""
    try:
        headers = message.headers if "task" in message.headers else message.payload  # protocol 2, and 1
        return key_from(headers["id"], headers.get("retries"))
    except Exception:  # whatever stands in a message: Celery says what is wrong with it
        return None


def came_again(message: kombu.Message) -> bool:
    """Whether the broker says that it has delivered this message before."""
    return bool((message.delivery_info or {}).get("redelivered"))


def is_numbered(message: kombu.Message) -> bool:
    """Whether its broker numbers deliveries anew on each channel (AMQP). kombu's transports give a message one tag."""
    return isinstance(message.delivery_tag, int)


def is_copy(message: kombu.Message, former: kombu.Message) -> bool:
    """Whether a message that came again is the one that came before, and not another that a client sent."""
    if is_numbered(message):
        return message.channel is not former.channel
    return bool(message.delivery_tag == former.delivery_tag)


def is_gone(message: kombu.Message) -> bool:
    """Whether an ack can't reach the broker any more. kombu's transports have their own accounts of acks."""
    return is_numbered(message) and getattr(message.channel, "connection", None) is None
