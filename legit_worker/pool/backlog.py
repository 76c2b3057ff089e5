"""Tasks that came and have not started, and so are not accepted.

In: fibers, in the order in which they came. Out: the same, as soon as each may start.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import count

from legit_worker.pool.fibers import Fiber


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
