"""A task as a fiber: a greenlet in the main thread that parks at model calls.

In: a task, as Celery hands it to a pool. Out: control, back to the loop, whenever the task parks or ends.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any

from celery._state import _set_task_join_will_block, task_join_will_block
from celery.concurrency.base import apply_target
from greenlet import GreenletExit, getcurrent, greenlet

from legit_worker.device import modes


class FiberPid(int):
    """The process id that Celery is told: a number to everyone else, the way back to the fiber for `terminate_job`."""

    fiber: Fiber


class Fiber(greenlet):
    """One running task. Lives on the main thread; switched to by the loop only, and back to it by `park` only."""

    def __init__(self, run: Callable[[], Any], *, app: str, name: str, exclusive: bool = False) -> None:
        super().__init__(run)
        # Each task sees its own copy: a Sentry scope or a log binding of one never shows in another.
        self.gr_context = copy_context()
        #: The app it works for, `""` where none is configured.
        self.app = app
        self.name = name
        #: Above zero, model calls don't let other tasks run: see `legit_worker.exclusive`.
        self.exclusive_depth = int(exclusive)
        #: What it waits for, in words; None while it runs.
        self.waits_for: str | None = None
        #: Due to be resumed at the loop's next turn.
        self.woken = False
        #: Revoked before it began: it ends where its own code would start.
        self.doomed = False
        self.pid = FiberPid(os.getpid())
        self.pid.fiber = self
        # The worker's own answer to whether `result.get()` is refused: it is what the other tasks are to find.
        self._joins_block = task_join_will_block()

    def __repr__(self) -> str:
        return f"<Fiber {self.name}: {self.waits_for or ('ended' if self.dead else 'running')}>"

    def park(self, waits_for: str) -> None:
        """Give control back to the loop until it resumes this fiber. Called from inside it."""
        self.waits_for = waits_for
        restore = modes.suspend()
        # One flag for the whole process: inside `allow_join_result()`, it is this task's alone (celery.result, 5.7).
        joins_block = task_join_will_block()
        _set_task_join_will_block(self._joins_block)
        try:
            self.parent.switch()
        finally:
            _set_task_join_will_block(joins_block)
            restore()
            self.waits_for = None

    def may_park(self) -> bool:
        """Whether other tasks may run while this one waits.

        Not inside `exclusive()`; nor below an asyncio loop or another library's greenlet, which other tasks would
        find running.
        """
        return not self.exclusive_depth and self.is_innermost()

    def is_innermost(self) -> bool:
        """Whether the code that runs is the fiber's own, with nothing below it that others would find running."""
        return getcurrent() is self and asyncio._get_running_loop() is None

    def resume(self) -> None:
        """Start it, or let it go on. Called by the loop."""
        self.woken = False
        self.switch()

    def terminate(self) -> None:
        """Unwind it where it is parked: its `finally` blocks run, its result is never stored.

        A signal handler may call this from within another fiber, so control comes back to the caller, not to the loop.
        """
        caller = getcurrent()
        if caller is self:
            self.doomed = True
        elif not self.dead:
            self.parent = caller
            self.throw(GreenletExit)


def current() -> Fiber | None:
    """The fiber this code runs in, below any other library's greenlets; None outside a ModelPool's tasks."""
    here = getcurrent()
    while here is not None and not isinstance(here, Fiber):
        here = here.parent
    return here


def run_task(
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    callback: Callable[[Any], Any],
    accept_callback: Callable[[int, float], Any] | None,
) -> None:
    """A fiber's whole life: Celery's `apply_target` (celery.concurrency.base, 5.7), told the fiber's own pid."""
    fiber = current()
    assert fiber is not None

    def run(*args: Any, **kwargs: Any) -> Any:
        if fiber.doomed:
            raise GreenletExit
        return target(*args, **kwargs)

    apply_target(run, args, kwargs, callback, accept_callback, pid=fiber.pid, propagate=(GreenletExit,))


@contextmanager
def exclusive() -> Iterator[None]:
    """Model calls inside don't switch tasks. Nests; does nothing outside a fiber."""
    fiber = current()
    if fiber is None:
        yield
        return
    fiber.exclusive_depth += 1
    try:
        yield
    finally:
        fiber.exclusive_depth -= 1
