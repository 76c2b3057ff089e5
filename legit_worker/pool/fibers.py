"""A task as a fiber: a greenlet in the main thread that parks while others bring what it waits for.

In: a task's run. Out: control, back to the loop, whenever the task parks or ends.
"""

from __future__ import annotations

import asyncio
import functools
import os
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import copy_context
from enum import Enum
from math import inf
from time import monotonic
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet

from legit_worker.errors import WaitedTooLongError
from legit_worker.models.methods import away
from legit_worker.pool.clock import Clock
from legit_worker.pool.limits import Limit, TimeLimitPassed
from legit_worker.pool.own import Own
from legit_worker.pool.transactions import in_django_transaction
from legit_worker.pool.turns import Holdings, wait_for_all


class FiberPid(int):
    """The process id that Celery is told: a number to everyone else, the way back to the fiber for `terminate_job`.

    The way back is weak, so that no fiber is in a cycle: Python's collector never frees a greenlet in a cycle, if it
    once looked while the greenlet was running or parked (greenlet 3.5).
    """

    ref: weakref.ref[Fiber]


#: The context of code that has nothing to put aside.
_NOTHING = nullcontext()


class Phase(Enum):
    """Where a task stands in its life, which decides when it can be interrupted."""

    #: Celery's work before the task's own code. What ends the task is raised when that begins.
    NEW = "new"
    #: The task's own code runs. It is interrupted at once.
    BODY = "body"
    #: This package works for the task. What ends the task is raised when the task waits, or when the work is done.
    SERVED = "served"
    #: The task waits in a model call. What ends it is raised there.
    PARKED = "parked"
    #: The task's own code is over. Its result is stored, told and delivered, and nothing interrupts that.
    ENDING = "ending"


class Fiber(greenlet):
    """One running task. Lives on the main thread; switched to by the loop only, and back to it by `park` only."""

    #: Who gets control when it parks or ends.
    parent: greenlet

    def __init__(
        self,
        run: Callable[[], Any],
        *,
        app: str,
        name: str,
        request: Any = None,
        acks_late: bool = True,
        exclusive: bool = False,
        wake: Callable[[Fiber], None] = lambda fiber: None,
    ) -> None:
        # Long, since each attribute has its line of explanation.
        super().__init__(run)
        # Each task sees its own copy: a Sentry scope or a log binding of one never shows in another.
        self.gr_context = copy_context()
        #: The app it works for, `""` if none is configured.
        self.app = app
        #: The task's name and id.
        self.name = name
        #: Celery's `Request`, which has its message; None if what runs is no task.
        self.request = request
        #: Whether its message is still the broker's, who gives it to another worker if this one ends.
        self.acks_late = acks_late
        #: Above zero, model calls don't let other tasks run: see `legit_worker.exclusive`.
        self.exclusive_depth = int(exclusive)
        # Has the loop resume it. Called by any thread.
        self._wake = wake
        self.phase = Phase.NEW
        #: What is raised in it as soon as its phase allows. Set by any thread.
        self.pending: BaseException | None = None
        #: What it waits for, in words; None while it runs.
        self.waits_for: str | None = None
        #: Due to be resumed at the loop's next turn.
        self.woken = False
        #: It is parked although it could go on: others run first.
        self.gives_way = False
        #: Seconds that it had the thread.
        self.ran_seconds = 0.0
        #: What it took, and what it waited.
        self.clock = Clock()
        #: How long it may take.
        self.limit: Limit | None = None
        #: Seconds that it may wait in all, and whether it waited longer, which the watcher sets.
        self.max_wait, self.has_waited_too_long = inf, False
        #: When its own code last got the thread back from this package, by the monotonic clock.
        self.served_at = 0.0
        #: What it has open that other tasks may need.
        self.holdings = Holdings()
        self.pid = FiberPid(os.getpid())
        self.pid.ref = weakref.ref(self)
        #: What it sets for itself.
        self.own = Own(name, functools.partial(_wake, self.pid.ref))

    def __repr__(self) -> str:
        return f"<Fiber {self.name}: {self.waits_for or ('ended' if self.dead else self.phase.value)}>"

    # Waiting

    def wait_for(self, done: Future[Any], what: str, *, in_own_code: bool = True) -> None:
        """Park until `done` is done. Called from inside it, if it may park.

        `in_own_code` says that code of its own called what waits, and may have set something for itself.
        """
        done.add_done_callback(functools.partial(_wake, self.pid.ref))  # a done future keeps its callbacks
        while not done.done():
            self.park(what, None if in_own_code else _NOTHING)
            if not done.done():  # whoever woke it, what is due is told
                self.raise_due(what)

    def give_way(self, what: str) -> None:
        """Park until the loop comes round. Called from inside it, if it may park."""
        self.gives_way = True
        self._wake(self)
        try:
            self.park(what)
        finally:
            self.gives_way = False

    def park(self, waits_for: str, aside: AbstractContextManager[object] | None = None) -> None:
        """Give control back to the loop until it resumes this fiber. Called from inside it.

        `aside` lets others find the process as they expect it; if it is None, this fiber's own settings are put aside.
        """
        before = self.phase
        try:
            if before in (Phase.BODY, Phase.SERVED):
                self.phase = Phase.PARKED
            self.waits_for = waits_for
            self.holdings.review(self)
            with away(), aside or self.aside():
                self.parent.switch()
                if self.phase is Phase.PARKED:
                    self.own.ring()
        finally:
            self.phase = before
            self.waits_for = None

    def aside(self) -> AbstractContextManager[object]:
        """Let other code find the process as it expects it, and give back this fiber's own settings afterwards."""
        return _NOTHING if self.own.is_aside else self.own

    def may_park(self) -> bool:
        """Whether other tasks may run while this one waits.

        Not inside `exclusive()`, or a transaction that other tasks would join; nor below an asyncio loop or another
        library's greenlet, which other tasks would find running. After its own code, none of these is its own.
        """
        if self.phase is Phase.ENDING:
            return self.is_innermost()
        return self.may_wait() and not self.holdings.keep_others_out()

    def may_wait(self) -> bool:
        """The same, if it waits for a transaction of another task."""
        return not self.exclusive_depth and self.is_innermost() and not in_django_transaction()

    def is_innermost(self) -> bool:
        """Whether the code that runs is the fiber's own, with nothing below it that others would find running."""
        return getcurrent() is self and asyncio._get_running_loop() is None and not _is_child

    def wait_to_be_alone(self) -> None:
        """Let parked tasks end their transactions before an exclusive task's own code begins, which can't wait."""
        self.exclusive_depth, depth = 0, self.exclusive_depth
        try:
            wait_for_all(self)
        finally:
            self.exclusive_depth = depth

    # Phases, and what interrupts them

    def enter_body(self) -> bool:
        """Note that the task's own code begins. False if it does not: what runs is a part of it, or comes after it."""
        if self.phase is not Phase.NEW:
            return False
        self.phase = Phase.BODY
        return True

    def served(self) -> AbstractContextManager[object]:
        """Run this package's code for the task, uninterrupted. What came due meanwhile is raised at the end."""
        return self._served() if self.phase is Phase.BODY else _NOTHING

    @contextmanager
    def _served(self) -> Iterator[None]:
        self.phase = Phase.SERVED
        try:
            with self.aside():
                yield
        finally:
            self.phase = Phase.BODY
            self.served_at = monotonic()
        self.raise_pending()

    def raise_pending(self) -> None:
        """End, or warn, a task whose time is over. Called from inside it, where its own code can take it."""
        if self.pending is not None:
            error, self.pending = self.pending, None
            raise error

    def raise_if_too_late(self) -> None:
        """End a task whose own code is over, and was over its hard limit before that."""
        if self.limit is not None and self.limit.is_over:
            raise TimeLimitPassed

    def raise_due(self, waits_for: str) -> None:
        """Raise what is due in a task that waits without parking. Called from inside it."""
        if (error := self.due(waits_for)) is not None:
            raise error
        if self.phase is Phase.SERVED:
            self.own.ring()

    @property
    def is_due(self) -> bool:
        """Whether something must be raised in it where it waits, perhaps later."""
        is_late = self.pending is not None or (self.has_waited_too_long and not self.woken)
        return is_late and self.phase in (Phase.PARKED, Phase.SERVED)

    def due(self, waits_for: str) -> BaseException | None:
        """What must be raised in it where it waits, if anything. What came due in a batch is told after the batch."""
        if not self.is_due or self.clock.is_in_batch:
            return None
        if self.pending is not None:
            error, self.pending = self.pending, None
            return error
        return WaitedTooLongError(
            f"{self.name} has waited for {self.clock.waited(monotonic()):.1f} s in all, now for {waits_for}, "
            f"and LEGIT_WORKER_MAX_WAIT_SECONDS is {self.max_wait:g}: send it again when less is queued, start "
            "another worker, or raise the bound"
        )

    def resume(self, error: BaseException | None = None) -> None:
        """Start it, or let it go on, or raise `error` where it is parked. Called by the loop."""
        self.woken = False
        with self.clock.running():
            if error is None:
                self.switch()
            else:
                self.throw(error)

    def terminate(self, error: BaseException | None = None) -> None:
        """Unwind it where it is parked: its `finally` blocks run, its result is never stored; with `error`, that is.

        A signal handler may call this from within another fiber, so control comes back to the caller, not to the loop.
        """
        caller = getcurrent()
        if self is current():  # the watcher interrupts it, once the handler is over
            self.pending = error or GreenletExit()
        elif not self.dead:
            loop, self.parent, running = self.parent, caller, current()
            try:
                with running.aside() if running else _NOTHING, self.clock.running():
                    self.throw(error or GreenletExit)
            finally:
                if not self.dead:  # it caught that, and parked again
                    self.parent = loop


#: Whether this process was forked by a task: the loop that would resume it is its parent's. The id takes a system call.
_is_child = False


def is_in_child() -> bool:
    """Whether this code runs in a child that a task forked."""
    return _is_child


def _note_child() -> None:
    global _is_child
    _is_child = current() is not None


os.register_at_fork(after_in_child=_note_child)


def fiber_of(pid: int | None) -> Fiber | None:
    """The fiber that was told as this process id; None if there is none, or once it is gone."""
    return pid.ref() if isinstance(pid, FiberPid) else None


def _wake(ref: weakref.ref[Fiber], *_: object) -> None:
    fiber = ref()
    if fiber is not None:
        fiber._wake(fiber)


def current() -> Fiber | None:
    """The fiber this code runs in, below any other library's greenlets; None outside a ModelPool's tasks."""
    here = getcurrent()
    while here is not None and not isinstance(here, Fiber):
        here = here.parent
    return here


@contextmanager
def exclusive() -> Iterator[None]:
    """Model calls inside don't switch tasks. Nests; does nothing outside a fiber."""
    fiber = current()
    if fiber is None:
        yield
        return
    wait_for_all(fiber)
    fiber.exclusive_depth += 1
    try:
        yield
    finally:
        fiber.exclusive_depth -= 1
