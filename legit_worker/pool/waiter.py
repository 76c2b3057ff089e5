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
        self._launches: queue.SimpleQueue[Launch] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def watch(self, launch: Launch) -> None:
        """Wake the loop when this is done. Launches of one device are done in the order in which they were made."""
        self._launches.put(launch)
        if self._thread is None:
            # A daemon: nobody needs the end of a launch after the worker's own.
            self._thread = threading.Thread(target=self._run, name="legit-waiter", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            self._launches.get().wait()
            self._wake()
