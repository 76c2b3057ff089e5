"""The one way to wait for something that others bring: a model, a batch, a helper process, the delivery of a result.

In: a future, and words for what it brings. Out: control, once the future is done. Inside a pool of fibers the task
parks and others run. Anywhere else the thread brings the future nearer itself, if it can, or blocks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any

#: Brings a future nearer, or waits a moment for it. Called again and again by a thread that can't park.
Drive = Callable[[], None]


class Host:
    """How a thread waits that has no pool: it blocks. A pool of fibers overrides this. Any thread may call it."""

    def wait(self, done: Future[Any], what: str, drive: Drive | None, is_own: bool, loads: str | None) -> None:
        """See `wait` below."""
        while not done.done():
            if drive is None:
                futures.wait([done])
            else:
                drive()

    def park(self, done: Future[Any], what: str, counts: bool) -> bool:
        """See `park` below."""
        return done.done()

    @property
    def is_around_task(self) -> bool:
        """See `is_around_task` below."""
        return False

    def give_way(self, what: str) -> None:
        """See `give_way` below."""

    def serving(self) -> AbstractContextManager[object]:
        """See `serving` below."""
        return nullcontext()

    @property
    def is_pressing(self) -> bool:
        """See `is_pressing` below."""
        return False


_blocking = Host()
_host = _blocking


def wait(
    done: Future[Any], what: str, *, drive: Drive | None = None, is_own: bool = False, loads: str | None = None
) -> None:
    """Return once `done` is done. `what` says in words what it brings; `inspect stats` and log lines show that.

    A task that may not let others run calls `drive` until then. `is_own` says that the task itself is being worked on,
    so the time counts as the task's own; `loads` names the model whose load is
    waited for. Raises what ends the task meanwhile: a time limit, a revoke.
    """
    if not done.done():
        _host.wait(done, what, drive, is_own, loads)


def park(done: Future[Any], what: str, *, counts: bool = False) -> bool:
    """Let others run until `done` is done. Return False at once if the caller can't park.

    `counts` says that a task which is over still counts in the window meanwhile.
    """
    return _host.park(done, what, counts)


def is_around_task() -> bool:
    """Whether the caller is the code before or after a task's own, and can park."""
    return _host.is_around_task


def give_way(what: str) -> None:
    """Let other tasks run once, and the loop look at the time, if the caller can park."""
    _host.give_way(what)


def serving() -> AbstractContextManager[object]:
    """Enter this package's own code on behalf of a task that calls a model.

    What ends the task is raised as it waits, or at the end.
    """
    return _host.serving()


def is_pressing() -> bool:
    """Whether others may be unable to go on before the caller does, so that it must not wait for them."""
    return _host.is_pressing


def keeps_tasks_apart() -> bool:
    """Whether code that parks gets back what it had set: torch's modes, random numbers, warnings' filters."""
    return _host is not _blocking


def use(host: Host) -> None:
    """Wait like this from now on."""
    global _host
    _host = host


def stop() -> None:
    """Block from now on."""
    use(_blocking)


# A child that a task forks has no loop that would resume it.
os.register_at_fork(after_in_child=stop)
