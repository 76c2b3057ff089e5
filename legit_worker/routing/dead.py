"""The dead letters of an app: envelopes that did not reach its queue.

In: an app's name. Out: its envelopes, oldest first; sent again, or deleted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from celery import Celery
from kombu import Connection
from kombu.exceptions import ChannelError

from legit_worker.errors import RoutingError
from legit_worker.routing.formats import queue_of
from legit_worker.routing.lanes import dead_queue
from legit_worker.routing.wires import AwayError, Delivery, connect, is_redis, open_wire, reach
from legit_worker.settings import NAME, Settings


class DeadLetters:
    """The dead letters that `celery legit results` shows and moves."""

    def __init__(self, app: Celery, chosen: Settings) -> None:
        self._app = app
        self._chosen = chosen

    def counts(self) -> dict[str, int]:
        """Count the dead letters of each configured app."""
        found = {}
        for name in self._chosen.apps:
            with self._box(name) as box:
                found[name] = len(box)
        return found

    def envelopes(self, name: str) -> list[dict[str, Any]]:
        """Return an app's dead letters, oldest first."""
        with self._box(name) as box:
            return [json.loads(envelope) for envelope in box]

    def drop(self, name: str) -> int:
        """Delete an app's dead letters. Returns how many there were."""
        with self._box(name) as box:
            count = len(box)
            box.clear()
            return count

    def replay(self, name: str) -> int:
        """Send each dead letter to the queue that the settings name now. Returns how many it sent.

        A letter is deleted only when the app's server has it. If that server does not answer, raises `RoutingError`
        and keeps the rest.
        """
        chosen = self._chosen.apps.get(name)
        if chosen is None:
            raise self._unknown(name, "so nobody knows where its results go")
        sent = 0
        wire = open_wire(self._app, chosen.url)
        try:
            with self._box(name) as box:
                for envelope in box.take():
                    task_id = json.loads(envelope)["id"]
                    queue = queue_of(name, chosen)
                    delivery = Delivery(app=name, chosen=chosen, queue=queue, task_id=task_id, envelope=envelope)
                    for _, error in wire.send([delivery]):
                        if error is not None:
                            raise RoutingError(f"{sent} sent again, then one was refused: {error}")
                    sent += 1
        except AwayError as error:
            raise RoutingError(f"{sent} sent again, then the server went away: {error}") from None
        finally:
            wire.close()
        return sent

    def _unknown(self, name: str, so: str) -> RoutingError:
        return RoutingError(f"no app {name!r} is configured, {so}; there are: {', '.join(self._chosen.apps) or 'none'}")

    @contextmanager
    def _box(self, name: str) -> Iterator[_RedisBox | _BrokerBox]:
        if not re.fullmatch(NAME, name):
            raise RoutingError(f"{name!r} is no app's name")
        with connect(self._app, None) as connection:
            try:
                reach(connection)
            except (OSError, *connection.connection_errors) as error:
                raise RoutingError(f"the broker {connection.as_uri()} does not answer: {error}") from None
            box = (_RedisBox if is_redis(connection) else _BrokerBox)(connection, dead_queue(name))
            if name not in self._chosen.apps and not len(box):  # letters outlive their app's settings
                raise self._unknown(name, "and it has no dead letters")
            yield box


class _RedisBox:
    """An app's dead letters as a Redis list. `take` deletes a letter when the caller asks for the next."""

    def __init__(self, connection: Connection, key: str) -> None:
        self._client = connection.channel().client
        self._key = key

    def __len__(self) -> int:
        return int(self._client.llen(self._key))

    def __iter__(self) -> Iterator[bytes]:
        yield from self._client.lrange(self._key, 0, -1)

    def take(self) -> Iterator[bytes]:
        for _ in range(len(self)):
            envelope = self._client.lindex(self._key, 0)
            if envelope is None:
                return
            yield envelope
            # By value: another process may take from the same list.
            self._client.lrem(self._key, 1, envelope)

    def clear(self) -> None:
        self._client.delete(self._key)


class _BrokerBox:
    """The same as a queue of another broker."""

    def __init__(self, connection: Connection, queue: str) -> None:
        self._connection = connection
        self._queue = queue

    def __len__(self) -> int:
        with suppress(ChannelError):
            return int(self._connection.channel().queue_declare(self._queue, passive=True).message_count)
        return 0

    def __iter__(self) -> Iterator[bytes]:
        # When this channel closes, the broker gets its messages back.
        with self._connection.channel() as channel:
            for message in self._messages(channel):
                yield _bytes(message.body)

    def take(self) -> Iterator[bytes]:
        with self._connection.channel() as channel:
            for message in self._messages(channel):
                yield _bytes(message.body)
                message.ack()

    def clear(self) -> None:
        if len(self):
            self._connection.channel().queue_purge(self._queue)

    def _messages(self, channel: Any) -> Iterator[Any]:
        for _ in range(len(self)):
            message = channel.basic_get(self._queue)
            if message is None:
                return
            yield message if hasattr(message, "ack") else channel.message_to_python(message)


def _bytes(body: Any) -> bytes:
    return body.encode() if isinstance(body, str) else bytes(body)
