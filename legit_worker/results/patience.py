"""How a task waits for a result backend, if Celery's own code would fail and can be called again.

In: calls, and which of their errors mean that the backend is away. Out: what a call gives once the backend is back.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from time import monotonic
from typing import Any

from legit_worker import parking

logger = logging.getLogger(__name__)

#: Seconds between two looks.
LOOK_SECONDS = 0.5

#: Since when tasks wait, by the monotonic clock.
waiting_since: dict[object, float] = {}


def patiently(call: Callable[[], Any], what: str, waits: Callable[[Exception], bool]) -> tuple[Any, bool]:
    """Return what a call gives, and whether its backend was away. As long as it is, the task waits, if it can park.

    `what` says in words what the task waits for, and `waits` tells whether an error means that the backend is away.
    """
    this = object()
    try:
        while True:
            try:
                return call(), this in waiting_since
            except Exception as error:  # noqa: PERF203
                if not waits(error):
                    raise
                if this not in waiting_since:
                    waiting_since[this] = monotonic()
                    logger.warning("the result backend takes nothing, and a task waits for %s: %r", what, error)
                if not parking.park(later(), what, counts=True):
                    raise
    finally:
        waiting_since.pop(this, None)


class _Look:
    """The next look. All tasks that wait share it: a thread for each would be a thousand after a worker's death."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done: Future[None] | None = None

    def later(self) -> Future[None]:
        """Return what is done once it is time to look again. Any thread may call it."""
        with self._lock:
            if self._done is None:
                timer = threading.Timer(LOOK_SECONDS, self._come)
                timer.daemon = True
                timer.start()
                self._done = Future()
            return self._done

    def _come(self) -> None:
        with self._lock:
            done, self._done = self._done, None
        assert done is not None
        done.set_result(None)


later = _Look().later
