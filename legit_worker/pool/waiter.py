"""A thread that waits for the GPU, so that the main thread need not.

In: launches that are not done. Out: a call for each launch as soon as it is done, and a signal to the loop.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from legit_worker.device.devices import Launch


class Waiter:
    """Owns the thread, which starts with the first launch; on a CPU there is none. Touches no tensor, runs no task."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._launches: queue.SimpleQueue[tuple[Launch, Callable[[], None]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def watch(self, launch: Launch, on_done: Callable[[], None]) -> None:
        """Call `on_done` and wake the loop when this launch is done. A device's launches are done in their order."""
        self._launches.put((launch, on_done))
        if self._thread is None:
            # A daemon: when the worker has ended, nobody needs the launch.
            self._thread = threading.Thread(target=self._run, name="legit-waiter", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            launch, on_done = self._launches.get()
            launch.wait()
            on_done()
            self._wake()
