"""Looks after a process's models if no loop does: under prefork, threads, eager, in a shell.

In: a process's residency, each time that somebody is done with a model or asks for one. Out: a thread that evicts what
is idle and loads what waits. It ends when it has nothing to look after.
"""

from __future__ import annotations

import os
import threading
from time import sleep

from legit_worker.models.residency import Residency

#: The least and the most seconds between two looks.
LEAST_LOOK, MOST_LOOK = 0.05, 1.0

_starting = threading.Lock()


def watch(residency: Residency) -> None:
    """See to it that somebody calls `evict_idle` and `review`, as long as there is something to do."""
    if residency.is_looked_after:  # as at each call inside a ModelPool
        return
    with _starting:
        if residency.is_looked_after or residency.next_look() is None:
            return
        residency.is_looked_after = True
    threading.Thread(target=_look_after, args=(residency,), name="legit-caretaker", daemon=True).start()


def _look_after(residency: Residency) -> None:
    while True:
        with _starting:  # or a model that comes now would find a caretaker that is about to leave
            seconds = residency.next_look()
            if seconds is None:
                residency.is_looked_after = False
                return
        sleep(min(max(seconds, LEAST_LOOK), MOST_LOOK))
        residency.review()
        residency.evict_idle()


def _after_fork() -> None:
    global _starting
    _starting = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
