"""How many tasks this worker has at a time: those that may run, and those that the broker may hand over.

In: which tasks have begun, and what those that are held are predicted to take. Out: whether one more may start, and
the prefetch count.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

from legit_worker import settings
from legit_worker.pool.running import Running
from legit_worker.pool.share import Prefetch, Share

#: Tasks in flight if LEGIT_WORKER_WINDOW does not say. Measured with MiniLM on two CPU cores: 388 short texts a second
#: with 64, 362 with 256, 444 with 1,024. Mixed texts don't care. `LEGIT_WORKER_WINDOW=256 scripts/bench` measures it.
DEFAULT_WINDOW = 1024

#: The most tasks that run at once and are acked early: a kill loses all of them. They are enough for a batch of short
#: texts, and a prefork worker with as many processes loses as many.
EARLY_WINDOW = 32

#: The most tasks that are fetched in place of others which wait for their delivery: what two lanes take.
MOST_REPLACED = 10_000


def window(chosen: settings.Settings) -> int:
    """How many tasks may be in flight."""
    return chosen.window or DEFAULT_WINDOW


class Intake:
    """One pool's. Lives on the main thread."""

    def __init__(
        self,
        limit: int,
        running: Running,
        share: Share,
        *,
        waiting: Callable[[], int],
        aside: Callable[[], int],
        is_ending: Callable[[], bool],
        bound: Callable[[], float] = lambda: inf,
        max_bytes: float = inf,
    ) -> None:
        """`waiting` counts the tasks that came and have not begun, `aside` those that wait for a model's load.

        `is_ending` says that no task may begin now, `bound` how many may run beside one that may be deadly, and
        `max_bytes` how large all messages of tasks that run may be.
        """
        #: The window.
        self.limit = limit
        self._running = running
        self._share = share
        self._waiting = waiting
        self._aside = aside
        self._is_ending = is_ending
        self._bound = bound
        self._max_bytes = max_bytes
        #: The tasks that this worker may hold now.
        self.most = share.cold(limit)
        self._prefetch: Prefetch | None = None
        # How many tasks waited for a delivery at the last look, and how many of them have waited since the look before:
        # others take their places.
        self._delivering_before = self._replaced = 0
        self._told_aside = 0

    def __repr__(self) -> str:
        return f"<Intake: {self.in_progress} in progress, may hold {self.most}, window {self.limit}>"

    def meet(self, consumer: Any) -> None:
        """Meet the worker's consumer before it connects: from now on the broker hears how many tasks to hand over."""
        self._prefetch = Prefetch(consumer, self.most)

    def close(self) -> None:
        """Tell the broker nothing any more."""
        self._prefetch = None

    @property
    def in_progress(self) -> int:
        """Tasks that began, less those that wait for the delivery of their result, or for a model's load."""
        return len(self._running) - len(self._running.delivering) - self._set_aside

    @property
    def _set_aside(self) -> int:
        """Tasks that wait for a load and don't count, one window of them at most."""
        return min(self._aside(), self.limit)

    @property
    def is_full(self) -> bool:
        """Whether the window is."""
        return self.in_progress >= self.limit

    def may_start(self) -> bool:
        """Whether one more task may begin. One that would only be ended stays the broker's."""
        return not self.is_full and not self._is_ending() and self._is_within_bound()

    def _is_within_bound(self) -> bool:
        """Whether one more may run beside those that may be deadly, and no further message is on its way."""
        bound, delivering = self._bound(), len(self._running.delivering)
        if bound == inf or self._prefetch is None:
            return True
        return len(self._running) - delivering < bound and self._prefetch.has_told(int(bound) + delivering)

    def may_start_early(self) -> bool:
        """Whether one more may begin that a kill would lose. Until then it is not acked."""
        return self.in_progress < self.most and self._running.early < EARLY_WINDOW

    def resize(self, limit: int) -> None:
        """Have another window. What runs goes on."""
        self.limit = max(1, limit)
        self.decide()

    def decide_if_due(self) -> None:
        """Decide again, unless that was a moment ago. A task that is set aside makes room for another at once."""
        if self._prefetch is None:
            return
        if self._prefetch.is_due():
            self.decide()
        elif self._set_aside > self._told_aside:
            self._tell()

    def decide(self) -> None:
        """Take no more tasks than others can spare, and tell the broker, which counts those that are not acked."""
        waiting = self._waiting()
        self.most = self._share.most(self.in_progress + waiting, waiting, self.limit)
        self._tell()

    def _tell(self) -> None:
        self._told_aside = self._set_aside
        if self._prefetch is not None:
            count = max(1, self.most - self._running.early) + self._replaced + self._told_aside
            bound = self._bound() + len(self._running.delivering)
            self._prefetch.want(int(min(count, bound, self._fitting())), at_most=bound < inf)

    def _fitting(self) -> float:
        """How many messages may be held, if they are as large as the messages of the tasks that run; one at least.

        Tasks that wait for a load or for a delivery count here, though they take no other room.
        """
        held, count = self._running.bytes, len(self._running)
        return max(1, count * self._max_bytes / held) if held else inf

    def replace_delivering(self) -> None:
        """Fetch one more task for each whose delivery takes long: other apps don't wait for a server that is away.

        What a lane takes is bounded too (`routing.lane.MAX_WAITING`), but not while the broker itself is away.
        """
        delivering = len(self._running.delivering)
        self._replaced = min(delivering, self._delivering_before, MOST_REPLACED)
        self._delivering_before = delivering
        self.decide()

    def reconnect(self) -> None:
        """The broker counts from zero again: what waits for its delivery from before has no place in its count."""
        self._replaced = 0
