"""How many of an app's tasks may run at once, and how many may begin in a second.

In: the settings of apps, and which tasks run. Out: whether a task may begin now. One that may not waits in the backlog.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from time import monotonic
from typing import Any

from legit_worker.pool.backlog import Backlog
from legit_worker.pool.fibers import Fiber
from legit_worker.pool.running import Running
from legit_worker.settings import AppSettings

#: Seconds of an app's rate that it may catch up with: tasks begin between two batches, and not at exact times.
SLACK = 0.5


class Gates:
    """One pool's. Lives on the main thread."""

    def __init__(
        self, apps: Mapping[str, AppSettings], running: Running, clock: Callable[[], float] = monotonic
    ) -> None:
        self._limited = {app: own for app, own in apps.items() if own.max_in_flight or own.rate}
        self._running = running
        self._clock = clock
        # By app: when its next task may begin.
        self._next_at: dict[str, float] = {}

    def has(self, app: str) -> bool:
        """Whether an app has a limit."""
        return app in self._limited

    def may_begin(self, fiber: Fiber) -> bool:
        """Whether the limits of the task's app let it begin now."""
        own = self._limited.get(fiber.app)
        if own is None:
            return True
        is_full = self._running.by_app[fiber.app] >= (own.max_in_flight or inf)
        return not is_full and self._clock() >= self._next_at.get(fiber.app, 0.0)

    def begun(self, fiber: Fiber) -> None:
        """A task begins."""
        own = self._limited.get(fiber.app)
        if own is not None and own.rate:
            earliest = self._clock() - SLACK
            self._next_at[fiber.app] = max(self._next_at.get(fiber.app, earliest), earliest) + 1 / own.rate.per_second

    def report(self, backlog: Backlog) -> dict[str, Any]:
        """For `celery inspect stats`."""
        return {
            app: {
                "in_flight": self._running.by_app[app],
                "max_in_flight": own.max_in_flight,
                "rate": str(own.rate) if own.rate else None,
                "waiting": backlog.of(app),
            }
            for app, own in self._limited.items()
        }
