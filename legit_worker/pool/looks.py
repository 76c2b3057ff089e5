"""What a worker looks at from time to time, since nothing tells it.

In: functions, each with its seconds. Out: the event loop calls each of them again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

#: Seconds between two looks at the tasks that wait for the delivery of their result, and between two decisions about
#: how many tasks to hold, while nothing else happens.
DELIVERY = SHARE = 1.0

#: Seconds between two looks for models that nobody has used for their `keep_alive`, and whether a model that waits for
#: room has waited for long enough.
IDLE = 1.0
WAITING = 0.25

#: Seconds between two looks at what other processes have of the device's memory.
MEMORY = 5.0


class Looks:
    """The timers of one worker."""

    def __init__(self) -> None:
        self._timers: list[Any] = []

    def __len__(self) -> int:
        return len(self._timers)

    def begin(self, hub: Any, every: Sequence[tuple[float, Callable[[], Any]]]) -> None:
        """Look from now on, and not as before: Celery 5.6 keeps timers through a lost connection."""
        for timer in self._timers:
            timer.cancel()
        self._timers = [hub.call_repeatedly(seconds, look) for seconds, look in every]

    def later(self, hub: Any, seconds: float, look: Callable[[], Any]) -> None:
        """Look once more, after so many seconds."""
        self._timers.append(hub.call_later(seconds, look))
