"""How long a task took, and how long it waited.

In: when the task's code runs, and the work that others do for it. Out: seconds.

A task's own time is its code, the preparation of its input, and the batches with its items, each from launch to end.
The rest of its life it waits: for company, for its turn, for a model to load.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any


@dataclass(eq=False)
class Work:
    """Work for one or more tasks outside their code: a batch, or one input in a helper. Any thread may use it."""

    #: Whether this is a batch. A task learns of nothing else until its batch is over.
    is_batch: bool = False
    #: The time on the monotonic clock at which it began; None before that.
    began: float | None = None
    #: Its seconds; None until it is over.
    took: float | None = None

    def begin(self) -> None:
        """Note that the work begins."""
        self.began = monotonic()

    def end(self, seconds: float | None = None) -> None:
        """Note that the work is over. Without `seconds` it took the time since `begin`, or none."""
        self.took = self.seconds(monotonic()) if seconds is None else seconds

    def seconds(self, now: float) -> float:
        """Return the seconds that it has taken so far."""
        if self.took is not None:
            return self.took
        return 0.0 if self.began is None else now - self.began


class Clock:
    """One running task's clock. The main thread starts and stops it; any thread may read it."""

    def __init__(self) -> None:
        self._started: float | None = None
        # The seconds of everything that is over; the time since which its own code runs; the work that is not over.
        # It is one tuple, so that another thread never reads one part from before a change and another from after it.
        self._state: tuple[float, float | None, tuple[Work, ...]] = (0.0, None, ())

    def running(self) -> Clock:
        """Count the time in the block: the task's own code has the thread."""
        return self

    def __enter__(self) -> None:
        now = monotonic()
        if self._started is None:
            self._started = now
        total, _, works = self._state
        self._state = total, now, works

    def __exit__(self, *_: object) -> None:
        total, since, works = self._state
        self._state = total + (0.0 if since is None else monotonic() - since), None, works

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Count no time in the block: the task waits, and still keeps the thread."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def follow(self, work: Work) -> None:
        """Count this work for the task, from when it begins."""
        total, since, works = self._state
        self._state = total, since, (*works, work)

    def settle(self, work: Work) -> None:
        """Stop counting this work: it is over, or nobody needs it."""
        total, since, works = self._state
        if work in works:
            self._state = total + work.seconds(monotonic()), since, tuple(one for one in works if one is not work)

    @contextmanager
    def following(self, work: Work) -> Iterator[None]:
        """Count this work for the task within the block."""
        self.follow(work)
        try:
            yield
        finally:
            self.settle(work)

    @property
    def is_in_batch(self) -> bool:
        """Whether a batch with an item of this task runs now."""
        return any(work.is_batch and work.began is not None for work in self._state[2])

    def seconds(self, now: float) -> float:
        """Return the task's own seconds until now."""
        total, since, works = self._state
        return total + (0.0 if since is None else now - since) + sum(work.seconds(now) for work in works)

    def waited(self, now: float) -> float:
        """Return the other seconds since the task started; 0 before that."""
        return 0.0 if self._started is None else max(0.0, now - self._started - self.seconds(now))


def work_of(done: Future[Any]) -> Work:
    """Return the work of another process for a task: it begins when the process takes the task's input.

    The process pool tells the beginning only to the future, by `set_running_or_notify_cancel`.
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
