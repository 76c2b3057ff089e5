"""Looks after a process's models if no loop does: under prefork, threads, eager, in a shell.

In: a process's residency, each time that somebody is done with a model or asks for one. Out: a thread that evicts what
is idle and loads what waits. It ends when it has nothing to look after.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from time import sleep

from legit_worker.models.residency import Residency

logger = logging.getLogger(__name__)

#: The least and the most seconds between two looks.
LEAST_LOOK, MOST_LOOK = 0.05, 1.0

_starting = threading.Lock()


def watch(residency: Residency) -> None:
    """See to it that somebody calls `evict_idle` and `review`, as long as there is something to do. Raises nothing."""
    if residency.is_looked_after:  # as at each call inside a ModelPool
        return
    with _starting:
        if residency.has_caretaker or residency.next_look() is None:
            return
        residency.has_caretaker = True
    try:
        threading.Thread(target=_look_after, args=(residency,), name="legit-caretaker", daemon=True).start()
    except RuntimeError as error:  # whoever called has its result
        residency.has_caretaker = False
        logger.warning("no thread can start that looks after the models (%s): the next call tries again", error)


def _look_after(residency: Residency) -> None:
    is_failing = False
    while True:
        with _starting:  # or a model that comes now would find a caretaker that is about to leave
            seconds = residency.next_look()
            if seconds is None or residency.is_looked_after:  # by a loop that has begun meanwhile
                residency.has_caretaker = False
                return
        sleep(MOST_LOOK if is_failing else min(max(seconds, LEAST_LOOK), MOST_LOOK))
        # An error in one step, or in one look, must not end the others.
        outcomes = [_is_done(step, is_told=is_failing) for step in (residency.review, residency.evict_idle)]
        is_failing = not all(outcomes)


def _is_done(step: Callable[[], None], *, is_told: bool) -> bool:
    """Do a step. Returns whether it went well; if not, logs why, unless the look before told of an error."""
    try:
        step()
    except Exception:
        if not is_told:
            logger.exception("a look after the models failed; one follows each %s s until all goes well", MOST_LOOK)
        return False
    return True


def _after_fork() -> None:
    global _starting
    _starting = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
