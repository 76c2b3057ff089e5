"""Tasks that came and have not started, and so are not accepted.

In: fibers, in the order in which they came. Out: the same, as soon as each may start.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import count

from legit_worker.pool.fibers import Fiber


class Backlog:
    """Two lines: who waits in the line of tasks that are acked early holds up nobody in the other. Main thread only."""

    def __init__(self) -> None:
        self._numbers = count()
        self._late: deque[tuple[int, Fiber]] = deque()
        self._early: deque[tuple[int, Fiber]] = deque()

    def __len__(self) -> int:
        return len(self._late) + len(self._early)

    def append(self, fiber: Fiber) -> None:
        """One more."""
        (self._late if fiber.acks_late else self._early).append((next(self._numbers), fiber))

    def take(self, may_start_early: Callable[[], bool]) -> Fiber | None:
        """The one that came first of those that may start; None if there is none."""
        lines = [line for line in (self._late, self._early) if line and (line is self._late or may_start_early())]
        return min(lines, key=lambda line: line[0][0]).popleft()[1] if lines else None

    def clear(self) -> None:
        """Forget them: the broker has them still."""
        self._late.clear()
        self._early.clear()
