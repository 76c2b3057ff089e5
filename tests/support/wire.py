"""What a program says to a Redis server: a proxy that keeps the bytes, and what remains equal from run to run.

In: a server's URL. Out: a URL to give to a worker, and the commands that it sent, connection by connection, with what
differs between any two runs (times, process ids, random ids, names of workers and queues) replaced by its kind.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

#: Bytes read at once.
CHUNK = 65536

Command = tuple[bytes, ...]

#: What no run has like another. The order counts: an id may hold digits that look like a time.
NOISE = (
    (re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"), "<uuid>"),
    (re.compile(r"\b[0-9a-f]{32}\b"), "<random>"),
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?([+-]\d\d:\d\d|Z)?"), "<time>"),
    (re.compile(r"\b1[6-9]\d{8}(\.\d+)?\b"), "<time>"),
    (re.compile(r"worker[\d-]+@tests"), "<worker>"),
    (re.compile(r"\btests-[0-9a-f]{12}"), "<queue>"),
    (re.compile(r"\bgen\d+@[\w.-]+"), "<origin>"),
    (re.compile(r'"pid": \d+'), '"pid": <pid>'),
    # The number of a database, which kombu puts in front of what it publishes to everyone.
    (re.compile(r"^/\d+(?=\.)"), "/<database>"),
    (re.compile(re.escape(str(Path(__file__).parents[2]))), "<root>"),
)

#: Asking for messages, and looking after a connection: how often depends on the clock.
IDLE = (b"BRPOP", b"PING", b"SELECT", b"CLIENT", b"HELLO", b"AUTH")


class Recorder:
    """A TCP proxy. One thread accepts, and two a connection carry; it never changes a byte."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._server = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        #: What clients sent, one entry per connection, in the order in which they connected.
        self.sent: list[bytearray] = []
        self.url = parts._replace(netloc=f"127.0.0.1:{self._listener.getsockname()[1]}").geturl()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                server = socket.create_connection(self._server)
                for end in (client, server):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.sent.append(bytearray())
                for pair in ((client, server, self.sent[-1]), (server, client, bytearray())):
                    threading.Thread(target=self._carry, args=pair, daemon=True).start()

    @staticmethod
    def _carry(source: socket.socket, target: socket.socket, record: bytearray) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(CHUNK):
                record += chunk
                target.sendall(chunk)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def connections(self) -> list[list[Command]]:
        """The masked commands of each connection that said more than hello."""
        said = [[masked(command) for command in commands(bytes(stream))] for stream in self.sent]
        return [kept for kept in ([one for one in all_ if one[0] not in IDLE] for all_ in said) if kept]

    def raw(self) -> bytes:
        """All that was sent, with the bodies of messages in clear."""
        return b"\n".join(in_clear(word) for stream in self.sent for one in commands(bytes(stream)) for word in one)


def commands(stream: bytes) -> Iterator[Command]:
    """The words of each command in a client's half of a RESP conversation."""
    position = 0

    def line() -> bytes:
        nonlocal position
        end = stream.index(b"\r\n", position)
        found, position = stream[position:end], end + 2
        return found

    while position < len(stream):
        head = line()
        assert head[:1] == b"*", head
        words = []
        for _ in range(int(head[1:])):
            length = int(line()[1:])
            words.append(stream[position : position + length])
            position += length + 2
        yield (words[0].upper(), *words[1:])


def masked(command: Command) -> Command:
    """A command without what differs between two runs."""
    return (command[0], *(mask(in_clear(word)) for word in command[1:]))


def mask(word: bytes) -> bytes:
    """One word of a command."""
    text = word.decode("utf-8", "surrogateescape")
    for pattern, kind in NOISE:
        text = pattern.sub(kind, text)
    return text.encode("utf-8", "surrogateescape")


def in_clear(word: bytes) -> bytes:
    """A message of kombu's with its body as JSON inside; anything else as it is."""
    if b'"body_encoding": "base64"' not in word:
        return word
    return json.dumps(_opened(json.loads(word))).encode()


def _opened(value: Any) -> Any:
    """Bodies, wherever they are: an unacked entry holds a message in a list."""
    if isinstance(value, list):
        return [_opened(part) for part in value]
    if isinstance(value, dict) and "body" in value and "properties" in value:
        return value | {"body": base64.b64decode(value["body"]).decode()}
    return value
