"""How a dead letter gets another chance.

In: letters. Out: for each, nothing if it is where it should be again, or why it is not.
"""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from typing import Any
from uuid import uuid4

from celery import Celery
from kombu import Connection

from legit_worker.routing.delivery import AwayError, Delivery
from legit_worker.routing.formats import Message, queue_of
from legit_worker.routing.letters import Letter, envelope_of
from legit_worker.routing.wires import BrokerWire, Wire, is_redis, judged, open_wire
from legit_worker.settings import NAME, AppSettings, Settings

#: Counts on the headers of a message, which the next worker must not see.
COUNTS = ("legit_deliveries", "x-delivery-count", "x-acquired-count", "x-death")


class Replayer:
    """Sends dead letters again. Owns the connections to the apps' servers; `close` ends them."""

    def __init__(self, app: Celery, chosen: Settings, connection: Connection, prefix: str, queue: str | None) -> None:
        """`connection` is the broker's; `prefix` precedes its keys. `queue` takes messages; None: the one they had."""
        self._app = app
        self._chosen = chosen
        self._connection = connection
        self._prefix = prefix
        self._queue = queue
        self._wires: dict[str | None, Wire] = {}
        #: The servers that did not answer, and why.
        self._away: dict[str | None, str] = {}

    def close(self) -> None:
        """Close the connections."""
        for wire in self._wires.values():
            wire.close()

    def send(self, letter: Letter) -> str:
        """Send a letter again. Returns why that was not possible; empty if it was."""
        url = self._url(letter)
        if url in self._away:
            return self._away[url]
        try:
            error = {"result": self._result, "poisoned": self._poisoned, "unreadable": self._unreadable}[letter.kind](
                letter
            )
        except AwayError as away:
            self._away[url] = error = f"the server went away: {away}"
        return error

    def _url(self, letter: Letter) -> str | None:
        chosen = self._chosen.apps.get(letter.app or "") if letter.kind == "result" else None
        return chosen.url if chosen else None

    def _wire(self, url: str | None) -> Wire:
        if url not in self._wires:
            self._wires[url] = open_wire(self._app, url)
        return self._wires[url]

    def _result(self, letter: Letter) -> str:
        chosen = self._chosen.apps.get(letter.app or "")
        if letter.content is None or letter.app is None or chosen is None:
            return f"no app {letter.app!r} is configured, so nobody knows where its results go"
        queue = letter.queue or queue_of(letter.app, chosen)
        if letter.queue and not _may_name(chosen, letter.queue):
            return f"app {letter.app} does not let messages name the queue {letter.queue} any more (REPLY_TO_PREFIX)"
        delivery = Delivery(app=letter.app, chosen=chosen, queue=queue, task_id=letter.id, envelope=envelope_of(letter))
        ((_, error),) = self._wire(chosen.url).send([delivery])
        return f"{type(error).__name__}: {error}" if error else ""

    def _poisoned(self, letter: Letter) -> str:
        queue = self._queue or letter.queue
        if letter.content is None or not isinstance(letter.content.get("message"), dict) or not queue:
            return "its record does not say what to send, or where"
        message = _without_counts(letter.content["message"])
        if is_redis(self._connection):
            return self._put(queue, message)
        exchange = "" if self._queue else letter.content.get("exchange") or ""
        key = letter.content.get("routing_key") if exchange else queue
        wire = self._wire(None)
        assert isinstance(wire, BrokerWire), "the broker is not Redis"
        error = wire.publish(str(key), _parcel(message), exchange)
        return f"{type(error).__name__}: {error}" if error else ""

    def _unreadable(self, letter: Letter) -> str:
        if self._queue is None:
            return "nobody knows its queue: name one with --queue"
        return self._push(self._prefix + self._queue, letter.raw)

    def _put(self, queue: str, message: dict[str, Any]) -> str:
        """Put a message into its queue's list as kombu does, by its priority (kombu.transport.redis.Channel._put)."""
        channel = self._connection.default_channel
        message["properties"]["delivery_tag"] = str(uuid4())
        key = channel._q_for_pri(queue, channel._get_message_priority(message, reverse=False))
        return self._push(self._prefix + key, json.dumps(message).encode())

    def _push(self, key: str, value: bytes) -> str:
        try:
            self._connection.default_channel.client.lpush(key, value)
        except Exception as error:
            return f"{type(error).__name__}: {judged(error)}"
        return ""


def _may_name(chosen: AppSettings, queue: str) -> bool:
    """Tell whether a message may choose this queue: who writes to the broker can write letters, too."""
    prefix = chosen.reply_to_prefix
    return bool(prefix and queue.startswith(prefix) and re.fullmatch(NAME, queue))


def _without_counts(message: dict[str, Any]) -> dict[str, Any]:
    headers = {name: value for name, value in (message.get("headers") or {}).items() if name not in COUNTS}
    return {**message, "headers": headers, "properties": dict(message.get("properties") or {})}


def _parcel(message: dict[str, Any]) -> Message:
    """Return a message of kombu's form in Redis as one for another broker."""
    properties = message["properties"]
    body = message.get("body") or ""
    is_base64 = properties.get("body_encoding") == "base64"
    parcel = Message(
        base64.b64decode(body) if is_base64 else str(body).encode(),
        message["headers"],
        {name: properties[name] for name in ("correlation_id", "reply_to", "priority") if properties.get(name)},
    )
    return replace(
        parcel,
        content_type=message.get("content-type") or "application/data",
        content_encoding=message.get("content-encoding") or "binary",
    )
