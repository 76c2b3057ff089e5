"""What makes the hub come round, and how to listen to it for less than its own tick.

In: words from any thread that there is something to do. Out: a readable file descriptor.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from contextlib import suppress
from time import monotonic

#: The poller sleeps for whole milliseconds. To listen for less, it is asked again and again.
POLLER_TICK = 0.001


class Wakeup:
    """A file descriptor that the hub finds readable from `set` to `clear`. `set` may be called by any thread."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        # Whether a byte is there, or about to be: one is enough, and each takes a system call.
        self._is_set = False

    def fileno(self) -> int:
        """What the hub polls."""
        return self._reader.fileno()

    def set(self) -> None:
        """Have the hub call back soon. Twice is as good as once; after `close`, nobody is called."""
        if not self._is_set:
            self._is_set = True
            with suppress(OSError):
                self._writer.send(b"\0")

    def wait(self, seconds: float) -> None:
        """Until it is set, or for this many seconds. `select.select` would take no descriptor from 1,024 on."""
        poller = select.poll()
        poller.register(self._reader, select.POLLIN)
        poller.poll(seconds * 1000)

    def clear(self) -> None:
        """Until the next `set`, let the hub sleep. Whoever calls this looks for work afterwards."""
        self._is_set = False
        with suppress(BlockingIOError):
            self._reader.recv(4096)
        self._is_set = False  # a byte that came in between was read, too

    def close(self) -> None:
        """Free both ends."""
        self._reader.close()
        self._writer.close()


def listen(poll: Callable[[float], object], seconds: float) -> bool:
    """Whether the hub's poller finds something to do within `seconds`; it stays there to be found again."""
    if seconds >= POLLER_TICK:
        return bool(poll(seconds))
    until = monotonic() + seconds
    while not (found := bool(poll(0))) and monotonic() < until:
        pass
    return found
