"""Where dead letters lie: a list in Redis, or a queue of another broker.

In: an open connection, and the list's or queue's name. Out: each letter's bytes, oldest first, and a way to remove it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from kombu import Connection
from kombu.exceptions import ChannelError
from redis.exceptions import NoPermissionError

from legit_worker.routing.letters import OF_APP
from legit_worker.routing.wires import is_redis

#: Letters that Redis gives at once: each may have some megabytes.
CHUNK = 16

#: Keys that Redis looks at in one step of a search. With ten million keys, a search has a thousand steps.
SCANNED = 10_000

#: A letter's bytes, and what removes the letter.
Item = tuple[bytes, Callable[[], None]]


class Box:
    """One list or queue of dead letters."""

    def __len__(self) -> int:
        raise NotImplementedError

    def items(self) -> Iterator[Item]:
        """Yield each letter that is here now. One that is removed must be so before the next is asked for."""
        raise NotImplementedError


def box(connection: Connection, name: str, prefix: str = "") -> Box:
    """Return the box of this name. `prefix` precedes it in Redis."""
    return RedisBox(connection, prefix + name) if is_redis(connection) else BrokerBox(connection, name)


def apps_with_letters(connection: Connection) -> list[str]:
    """Return the apps that have dead letters, if the broker can say that, and lets this user see it."""
    found: list[bytes] = []
    if is_redis(connection):
        with suppress(NoPermissionError):
            found += connection.default_channel.client.scan_iter(match=f"{OF_APP}*", count=SCANNED)
    return sorted(key.decode(errors="replace").removeprefix(OF_APP) for key in found)


class RedisBox(Box):
    """A list in Redis."""

    def __init__(self, connection: Connection, key: str) -> None:
        self._client = connection.default_channel.client
        self._key = key

    def __len__(self) -> int:
        return int(self._client.llen(self._key))

    def items(self) -> Iterator[Item]:
        """Go through the list by index. What is removed moves the rest down."""
        left, kept = len(self), 0
        while left > 0:
            chunk = self._client.lrange(self._key, kept, kept + min(left, CHUNK) - 1)
            if not chunk:
                return
            for raw in chunk:
                gone: list[int] = []
                yield raw, lambda raw=raw, gone=gone: gone.append(self._remove(raw))  # type: ignore[misc]
                kept += not gone
            left -= len(chunk)

    def _remove(self, raw: bytes) -> int:
        # By value: another process may take from the same list.
        return int(self._client.lrem(self._key, 1, raw))


class BrokerBox(Box):
    """A queue of another broker. When the channel closes, the broker gets back what was not removed."""

    def __init__(self, connection: Connection, queue: str) -> None:
        self._connection = connection
        self._queue = queue

    def __len__(self) -> int:
        with suppress(ChannelError), self._connection.channel() as channel:
            return int(channel.queue_declare(self._queue, passive=True).message_count)
        return 0

    def items(self) -> Iterator[Item]:
        """Get one message after the other."""
        with self._connection.channel() as channel:
            for _ in range(len(self)):
                message = channel.basic_get(self._queue)
                if message is None:
                    return
                python = channel.message_to_python(message)
                yield _bytes(python.body), python.ack


def _bytes(body: Any) -> bytes:
    return body.encode() if isinstance(body, str) else bytes(body)
