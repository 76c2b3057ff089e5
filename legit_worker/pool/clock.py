"""How long a task took, and how long it only waited.

In: when its own code runs, and which work others do for it. Out: seconds.

A task's own time is its code, the preparation of its input, and the batches that hold its items, each from launch to
landing. The rest of its life is waiting: for company, for its turn, for a model to load.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

#: The worst wait is looked for among this many tasks, the last ones that ended: about two full windows.
RECENT = 2048


@dataclass(eq=False)
class Work:
    """What something else computes for one or more tasks: a batch, or one input in a helper. Any thread may use it."""

    #: Whether the task is to learn of nothing else before this is over.
    is_batch: bool = False
    #: By the monotonic clock; None until it begins.
    began: float | None = None
    #: Seconds that it took; None until it is over.
    took: float | None = None

    def begin(self) -> None:
        """It is at work from now on."""
        self.began = monotonic()

    def end(self, seconds: float | None = None) -> None:
        """It is over, and took as many seconds as whoever did it says. One that never began took none."""
        self.took = self.seconds(monotonic()) if seconds is None else seconds

    def seconds(self, now: float) -> float:
        """How long it took until now."""
        if self.took is not None:
            return self.took
        return 0.0 if self.began is None else now - self.began


class Clock:
    """One running task's. Set going and stopped on the main thread; any thread may read it."""

    def __init__(self) -> None:
        self._started: float | None = None
        # The seconds of all that is over; since when its own code runs; the work that is not over. One tuple, so that
        # a thread that reads it never sees the one part before a change and the other after it.
        self._state: tuple[float, float | None, tuple[Work, ...]] = (0.0, None, ())

    @contextmanager
    def running(self) -> Iterator[None]:
        """The task's own code has the thread."""
        self._begin()
        try:
            yield
        finally:
            self._end()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The task waits without leaving the thread to others."""
        self._end()
        try:
            yield
        finally:
            self._begin()

    def _begin(self) -> None:
        now = monotonic()
        if self._started is None:
            self._started = now
        total, _, works = self._state
        self._state = total, now, works

    def _end(self) -> None:
        total, since, works = self._state
        self._state = total + (0.0 if since is None else monotonic() - since), None, works

    def follow(self, work: Work) -> None:
        """This is done for the task, now or soon."""
        total, since, works = self._state
        self._state = total, since, (*works, work)

    def settle(self, work: Work) -> None:
        """It is over, or nobody wants it any more."""
        total, since, works = self._state
        if work in works:
            self._state = total + work.seconds(monotonic()), since, tuple(one for one in works if one is not work)

    @property
    def is_in_batch(self) -> bool:
        """Whether a batch with an item of the task's is being computed."""
        return any(work.is_batch and work.began is not None for work in self._state[2])

    def seconds(self, now: float) -> float:
        """The task's own time until now."""
        total, since, works = self._state
        return total + (0.0 if since is None else now - since) + sum(work.seconds(now) for work in works)

    def waited(self, now: float) -> float:
        """The rest of the seconds since it started; 0 before that."""
        return 0.0 if self._started is None else max(0.0, now - self._started - self.seconds(now))


def work_of(done: Future[Any]) -> Work:
    """What another process does for a task, from when it takes the task's input until it is done with that.

    Only whoever runs these processes hears of the beginning, and tells it to the future.
    """
    work = Work()
    take = done.set_running_or_notify_cancel

    def taken() -> bool:
        work.begin()
        return take()

    done.set_running_or_notify_cancel = taken  # type: ignore[method-assign]
    if done.running():  # already
        work.begin()
    done.add_done_callback(lambda _: work.end())
    return work


@dataclass
class Waits:
    """How long tasks waited that have ended. `inspect stats` shows it."""

    #: Seconds, of all tasks together.
    total: float = 0.0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    def note(self, seconds: float) -> None:
        """One more task has ended."""
        self.total += seconds
        self.recent.append(seconds)

    def report(self) -> dict[str, float]:
        """As `inspect stats` gives it, in seconds."""
        return {
            "waited_seconds": round(self.total, 3),
            "worst_recent_wait_seconds": round(max(self.recent, default=0.0), 3),
        }
