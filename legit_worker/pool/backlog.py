"""Tasks that came and have not started, and so are not accepted; and the limits of apps that keep some of them back.

In: fibers, in the order in which they came; the settings of apps, and which tasks run. Out: the same fibers, as soon as
each may start.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from itertools import count
from math import inf
from time import monotonic
from typing import Any

from legit_worker.pool.fibers import Fiber
from legit_worker.pool.running import Running
from legit_worker.settings import AppSettings

#: Seconds of an app's rate that it may catch up with: tasks begin between two batches, and not at exact times.
SLACK = 0.5


class Backlog:
    """Lines, of which none holds up another: for tasks that are acked early, and for each app with limits of its own.

    Main thread only.
    """

    def __init__(self, has_limits: Callable[[str], bool] = lambda app: False) -> None:
        self._has_limits = has_limits
        self._numbers = count()
        self._lines: dict[tuple[bool, str], deque[tuple[int, Fiber]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def append(self, fiber: Fiber) -> None:
        """One more."""
        key = (fiber.acks_late, fiber.app if self._has_limits(fiber.app) else "")
        self._lines.setdefault(key, deque()).append((next(self._numbers), fiber))

    def take(self, may_start: Callable[[Fiber], bool]) -> Fiber | None:
        """The one that came first of those that may start; None if there is none."""
        lines = [line for line in self._lines.values() if line and may_start(line[0][1])]
        return min(lines, key=lambda line: line[0][0]).popleft()[1] if lines else None

    def of(self, app: str) -> int:
        """How many wait of an app with limits of its own."""
        return sum(len(line) for (_, whose), line in self._lines.items() if whose == app)

    def clear(self) -> None:
        """Forget them: the broker has them still."""
        self._lines.clear()


class AppLimits:
    """How many of an app's tasks may run at once, and how many may begin in a second. Lives on the main thread."""

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

    def blocks(self, fiber: Fiber) -> bool:
        """Whether a task has not begun, and the limits of its app are why."""
        return fiber not in self._running and not self.may_begin(fiber)

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
