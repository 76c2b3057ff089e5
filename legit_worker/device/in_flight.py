"""The batches that other threads compute, in all of this process. A fork waits for them.

In: launches, when they are handed over and when they are done. Out: a fork while none is in flight.

A child has none of these threads. It would wait for what they hold, or for the batch that was before its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from legit_worker.device.devices import Launch

#: In the order in which they were handed over. One device ends them in the same order.
_launches: dict[Launch, None] = {}

#: Held while a batch is handed over, and during a fork. A signal's handler may fork on the thread that has it.
_handing_over = threading.RLock()


@contextmanager
def handing_over(launch: Launch) -> Iterator[None]:
    """While a batch is handed over, no other thread forks. After it, the batch is in flight."""
    with _handing_over:
        yield
        _launches[launch] = None  # not before: a handler's fork would wait for what has not begun
        if launch.is_done:
            landed(launch)


def landed(launch: Launch) -> None:
    """Note that a batch is done: a launch says so itself before it calls this."""
    _launches.pop(launch, None)


def wait(kind: type[Launch] = Launch) -> None:
    """Wait for the batches of this kind that are in flight now."""
    with _handing_over:
        launches = [launch for launch in _launches if isinstance(launch, kind)]
    for launch in launches:
        launch.wait()


def _before_fork() -> None:
    _handing_over.acquire()
    wait()


def _after_in_child() -> None:
    _launches.clear()  # whatever ended the wait: the child has no thread that computes them
    _handing_over.release()


os.register_at_fork(before=_before_fork, after_in_parent=_handing_over.release, after_in_child=_after_in_child)
