"""A task as a fiber: a greenlet in the main thread that parks at model calls.

In: a task, as Celery hands it to a pool. Out: control, back to the loop, whenever the task parks or ends.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from math import inf
from time import monotonic
from typing import Any

from billiard.einfo import ExceptionInfo
from celery._state import _set_task_join_will_block, task_join_will_block
from celery.concurrency.base import apply_target
from celery.exceptions import WorkerLostError, WorkerShutdown, WorkerTerminate
from greenlet import GreenletExit, getcurrent, greenlet

from legit_worker.device import modes
from legit_worker.errors import WaitedTooLongError
from legit_worker.pool.clock import Clock
from legit_worker.pool.limits import Limit, TimeLimitPassed
from legit_worker.pool.transactions import in_django_transaction
from legit_worker.pool.turns import Holdings, wait_for_all


class FiberPid(int):
    """The process id that Celery is told: a number to everyone else, the way back to the fiber for `terminate_job`.

    The way back is weak, so that no fiber is in a cycle: Python's collector never frees a greenlet in a cycle, if it
    once looked while the greenlet was running or parked (greenlet 3.5).
    """

    ref: weakref.ref[Fiber]

    @property
    def fiber(self) -> Fiber | None:
        """None once it is gone."""
        return self.ref()


class Fiber(greenlet):
    """One running task. Lives on the main thread; switched to by the loop only, and back to it by `park` only."""

    def __init__(
        self,
        run: Callable[[], Any],
        *,
        app: str,
        name: str,
        request: Any = None,
        acks_late: bool = True,
        exclusive: bool = False,
    ) -> None:
        super().__init__(run)
        # Each task sees its own copy: a Sentry scope or a log binding of one never shows in another.
        self.gr_context = copy_context()
        #: The app it works for, `""` where none is configured.
        self.app = app
        #: The task's name and id.
        self.name = name
        #: Celery's `Request`, which has its message; None if what runs is no task.
        self.request = request
        #: Whether its message is still the broker's, who gives it to another worker if this one ends.
        self.acks_late = acks_late
        #: Above zero, model calls don't let other tasks run: see `legit_worker.exclusive`.
        self.exclusive_depth = int(exclusive)
        #: What it waits for, in words; None while it runs.
        self.waits_for: str | None = None
        #: Due to be resumed at the loop's next turn.
        self.woken = False
        #: Revoked before it began: it ends where its own code would start.
        self.doomed = False
        #: What it took, and what it waited.
        self.clock = Clock()
        #: How long it may take.
        self.limit: Limit | None = None
        #: Seconds that it may wait in all.
        self.max_wait = inf
        #: It waited longer. Set by the watcher.
        self.has_waited_too_long = False
        #: Its own code is over, and is not to be interrupted any more.
        self.is_over = False
        #: What is to be raised in it as soon as its own code can take it. Set by any thread.
        self.overdue: BaseException | None = None
        #: Above zero, what runs is this package's code on its behalf, which is not interrupted.
        self.shielded = 0
        #: When that was last over, by the monotonic clock: the task's own code has run since.
        self.served_at = 0.0
        #: What it has open that other tasks may need.
        self.holdings = Holdings()
        self.pid = FiberPid(os.getpid())
        self.pid.ref = weakref.ref(self)
        # The worker's own answer to whether `result.get()` is refused: it is what the other tasks are to find.
        self._joins_block = task_join_will_block()

    def __repr__(self) -> str:
        return f"<Fiber {self.name}: {self.waits_for or ('ended' if self.dead else 'running')}>"

    def park(self, waits_for: str) -> None:
        """Give control back to the loop until it resumes this fiber. Called from inside it."""
        self.waits_for = waits_for
        self.holdings.review(self)
        try:
            with self._others_run():
                self.parent.switch()
        finally:
            self.waits_for = None

    @contextmanager
    def _others_run(self) -> Iterator[None]:
        """What the thread has only once is as others are to find it, and then again as it was here."""
        restore = modes.suspend()
        # One flag for the whole process: inside `allow_join_result()`, it is one task's alone (celery.result, 5.7).
        joins_block = task_join_will_block()
        _set_task_join_will_block(self._joins_block)
        try:
            yield
        finally:
            _set_task_join_will_block(joins_block)
            restore()

    def may_park(self) -> bool:
        """Whether other tasks may run while this one waits.

        Not inside `exclusive()`, or a transaction that other tasks would join; nor below an asyncio loop or another
        library's greenlet, which other tasks would find running.
        """
        return self.may_wait() and not self.holdings.keep_others_out()

    def may_wait(self) -> bool:
        """The same, if it waits for a transaction of another task."""
        return not self.exclusive_depth and self.is_innermost() and not in_django_transaction()

    def wait_to_be_alone(self) -> None:
        """Before its own code begins: it can't let another one end its transaction later."""
        self.exclusive_depth, depth = 0, self.exclusive_depth
        self.is_over = True  # not begun is not to be interrupted, either
        try:
            wait_for_all(self)
        finally:
            self.exclusive_depth, self.is_over = depth, False

    def is_innermost(self) -> bool:
        """Whether the code that runs is the fiber's own, with nothing below it that others would find running."""
        return getcurrent() is self and asyncio._get_running_loop() is None

    def resume(self, error: BaseException | None = None) -> None:
        """Start it, or let it go on, or raise `error` where it is parked. Called by the loop."""
        self.woken = False
        with self.clock.running():
            if error is None:
                self.switch()
            else:
                self.throw(error)

    def due(self, waits_for: str) -> BaseException | None:
        """What is to be raised in it where it waits, if anything. What came due in a batch is told after that."""
        if self.is_over or self.clock.is_in_batch:
            return None
        if self.overdue is not None:
            error, self.overdue = self.overdue, None
            return error
        if self.has_waited_too_long and not self.woken:
            return WaitedTooLongError(
                f"{self.name} has waited for {self.clock.waited(monotonic()):.1f} s in all, now for {waits_for}, "
                f"and LEGIT_WORKER_MAX_WAIT_SECONDS is {self.max_wait:g}: send it again when less is queued, start "
                "another worker, or raise the bound"
            )
        return None

    def raise_overdue(self) -> None:
        """End, or warn, a task whose time is over. Called from inside it, where its own code can take it."""
        if self.overdue is not None and not self.is_over:
            error, self.overdue = self.overdue, None
            raise error

    @contextmanager
    def shield(self) -> Iterator[None]:
        """What runs inside is not interrupted; what came due meanwhile is raised at its end."""
        self.shielded += 1
        try:
            yield
        finally:
            self.served_at = monotonic()
            self.shielded -= 1
        if not self.shielded:
            self.raise_overdue()

    def terminate(self, error: BaseException | None = None) -> None:
        """Unwind it where it is parked: its `finally` blocks run, its result is never stored; with `error`, that is.

        A signal handler may call this from within another fiber, so control comes back to the caller, not to the loop.
        """
        caller = getcurrent()
        if caller is self:  # the watcher interrupts it, once the handler is over
            self.doomed, self.overdue = True, error or GreenletExit()
        elif not self.dead:
            self.parent = caller
            with self._others_run(), self.clock.running():
                self.throw(error or GreenletExit)


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
    error_callback: Callable[[Any], Any],
    accept_callback: Callable[[int, float], Any] | None,
) -> None:
    """A fiber's whole life: Celery's `apply_target` (celery.concurrency.base, 5.7), told the fiber's own pid.

    A task that ends by `sys.exit()`, a `KeyboardInterrupt` of its own, or a `MemoryError` fails. Celery would end the
    worker with it, as if a child process had died, and prefork's parent tells `Request.on_failure` of that.
    """
    fiber = current()
    assert fiber is not None

    def call_target(*args: Any, **kwargs: Any) -> Any:  # limits.TARGET
        if fiber.doomed:
            raise GreenletExit
        if fiber.exclusive_depth:
            fiber.wait_to_be_alone()
        try:
            return target(*args, **kwargs)
        except (GreenletExit, WorkerShutdown, WorkerTerminate):
            raise
        except BaseException as error:
            if isinstance(error, Exception):
                raise
            return _as_lost(error)

    def tell(result: Any) -> Any:
        return error_callback(result) if isinstance(result, ExceptionInfo) else callback(_without_memory_error(result))

    try:
        apply_target(call_target, args, kwargs, tell, accept_callback, pid=fiber.pid, propagate=(GreenletExit,))
    except TimeLimitPassed:
        limit, fiber.limit = fiber.limit, None
        if limit is not None and limit.hard is not None:
            limit.on_timeout(False, limit.hard)
    finally:
        fiber.holdings.end(fiber)


def _without_memory_error(result: Any) -> Any:
    """What Celery's trace returns, whose failure is stored. `Request.on_failure` would raise a `MemoryError` again."""
    match result:
        case (1, ExceptionInfo(exception=MemoryError() as error) as failure, _):
            failure.exception = RuntimeError(repr(error))
    return result


def _as_lost(error: BaseException) -> ExceptionInfo:
    """Celery's word for a task that took its process with it, which is stored as its failure."""
    try:
        raise WorkerLostError(repr(error)) from error
    except WorkerLostError:
        return ExceptionInfo()


def refuse_task(
    error: Exception,
    callback: Callable[[Any], Any],
    accept_callback: Callable[[int, float], Any] | None,
) -> None:
    """In the place of a task that can't begin: fail it. `callback` is Celery's `Request.on_failure`."""
    fiber = current()
    assert fiber is not None
    if accept_callback is not None:  # which acks, where that is early
        accept_callback(fiber.pid, monotonic())
    try:
        raise error
    except Exception:
        callback(ExceptionInfo())


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
