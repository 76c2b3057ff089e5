"""The batches that other threads compute, in all of this process. A fork waits for them.

In: launches, when they are handed over and when they are done. Out: nothing is in flight.

A child has none of these threads. It would wait for what they hold, or for the batch that was before its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from legit_worker.device.devices import Launch

#: In the order in which they were handed over, which is that of their ends on one device.
_launches: dict[Launch, None] = {}

#: Held while a batch is handed over, and during a fork. A signal's handler may fork on the thread that has it.
_handing_over = threading.RLock()


@contextmanager
def handing_over(launch: Launch) -> Iterator[None]:
    """While a batch is handed over, no thread forks. From then on it is in flight, unless this fails."""
    with _handing_over:
        _launches[launch] = None
        try:
            yield
        except BaseException:
            landed(launch)
            raise


def landed(launch: Launch) -> None:
    """It is done."""
    _launches.pop(launch, None)


def wait() -> None:
    """Until no batch is in flight."""
    for launch in list(_launches):
        launch.wait()


def _before_fork() -> None:
    _handing_over.acquire()
    wait()


def _after_in_child() -> None:
    _launches.clear()  # whatever ended the wait: the child has no thread that computes them
    _handing_over.release()


os.register_at_fork(before=_before_fork, after_in_parent=_handing_over.release, after_in_child=_after_in_child)
