"""Waits for the GPU, so that the main thread need not.

In: launches that are not done. Out: for each, once it is, a word to the loop.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from legit_worker.device.devices import Launch


class Waiter:
    """A thread of its own, from the first launch on; on a CPU there is none. Touches no tensor, runs no task code."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._launches: queue.SimpleQueue[tuple[Launch, Callable[[], None]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def watch(self, launch: Launch, on_done: Callable[[], None]) -> None:
        """When this is done, call `on_done` and wake the loop. Launches of one device are done in their order."""
        self._launches.put((launch, on_done))
        if self._thread is None:
            # A daemon: nobody needs the end of a launch after the worker's own.
            self._thread = threading.Thread(target=self._run, name="legit-waiter", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            launch, on_done = self._launches.get()
            launch.wait()
            on_done()
            self._wake()
