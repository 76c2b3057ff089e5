"""What a task sets for itself, though the process has it only once: put aside while other code runs, then given back.

In: a task that parks or calls a model. Out: the process as other code expects it; and as the task had it, when the task
goes on. torch's modes are `device.modes`, random numbers are `device.randoms`; here are Celery's `allow_join_result()`,
filters of warnings, and `SIGALRM`.
"""

from __future__ import annotations

import functools
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

from celery._state import _set_task_join_will_block, task_join_will_block

from legit_worker.device import modes, randoms
from legit_worker.device.imported import imported
from legit_worker.errors import is_of_handler

logger = logging.getLogger(__name__)

#: Seconds until an alarm rings that came due while its task could not be told.
AT_ONCE = 1e-6

#: What an operator reads when a task leaves an alarm behind.
LEFT = (
    "%s ended with an alarm set (signal.alarm or signal.setitimer); it is cancelled, or it would ring in another task"
)

#: What an operator reads when a handler that some task installed is called where no task can be told.
STRAY = "A signal's handler raised in %s; the worker goes on. Handlers of signals other than SIGALRM must not raise"


class Own:
    """What one task set. Lives on the main thread. A context, for code that is not the task's own."""

    def __init__(self, name: str, wake: Callable[[], None]) -> None:
        """`wake` resumes the task while it is parked. Any thread may call it."""
        self._name = name
        self._wake = wake
        # What other code expects. It is set now, since no task runs.
        self._joins_block = task_join_will_block()
        self._modes = _found_modes()
        self._handler = signal.getsignal(signal.SIGALRM)
        # While it is put aside.
        self._restore: list[Callable[[], None]] | None = None
        self._alarm: _Alarm | None = None

    @property
    def is_aside(self) -> bool:
        """Whether others find what they expect."""
        return self._restore is not None

    def put_aside(self) -> None:
        """Set what other code expects."""
        # First, since the task's handler may raise until this is done.
        self._alarm = _put_alarm_aside(self._handler, self._wake)
        self._restore = [modes.suspend(self._modes), randoms.suspend(self), _put_filters_aside()]
        joins_block = task_join_will_block()
        if joins_block != self._joins_block:
            _set_task_join_will_block(self._joins_block)
            self._restore.append(functools.partial(_set_task_join_will_block, joins_block))

    def give_back(self, *_: object) -> None:
        """Set what the task had. If its alarm came due, it rings now."""
        restore, self._restore = self._restore or [], None
        for step in reversed(restore):
            step()
        alarm, self._alarm = self._alarm, None
        if alarm is not None:
            alarm.give_back()

    __enter__, __exit__ = put_aside, give_back

    def ring(self) -> None:
        """Ring the alarm if it is due. Called in the task, while its settings are put aside. Raises what rings."""
        if self._alarm is not None:
            self._alarm.ring()

    def end(self) -> None:
        """Note that the task's own code is over."""
        if _alarms_are_tasks and any(signal.setitimer(signal.ITIMER_REAL, 0)):
            logger.warning(LEFT, self._name)
        modes.suspend(self._modes)  # a default that the task left behind is not for the next one
        randoms.end(self)
        _put_filters_aside()  # the task may have left some in force that a library had set on the loader's thread


class _Alarm:
    """A task's timer and its handler of `SIGALRM`, while others run."""

    def __init__(self, left: float, every: float, handler: Any, wake: Callable[[], None]) -> None:
        """`left`: seconds until it rings, 0 if only the handler is set; `every`: seconds between further ones."""
        self._at = monotonic() + left if left else None
        self._every, self._handler, self._wake = every, handler, wake
        self._timer = self._started_timer()

    def ring(self) -> None:
        """Call the task's handler, if the time has come."""
        if self._at is None or monotonic() < self._at:
            return
        self._at = monotonic() + self._every if self._every else None
        self._timer = self._started_timer()
        if callable(self._handler):
            self._handler(signal.SIGALRM, sys._getframe())
        elif self._handler == signal.SIG_DFL:  # ends the process, as the task chose
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGALRM)

    def give_back(self) -> None:
        """Set the handler and the time that is left, for the task that goes on."""
        self._timer.cancel()
        _handle_by(self._handler)
        if self._at is not None:
            signal.setitimer(signal.ITIMER_REAL, max(self._at - monotonic(), AT_ONCE), self._every)

    def _started_timer(self) -> threading.Timer:
        timer = threading.Timer(0.0 if self._at is None else max(0.0, self._at - monotonic()), self._wake)
        timer.daemon = True
        if self._at is not None:
            timer.start()
        return timer


def _put_alarm_aside(others: Any, wake: Callable[[], None]) -> _Alarm | None:
    """Stop the timer, and have `others` handle `SIGALRM`. None if there is no timer and `others` handle it already."""
    if not _alarms_are_tasks:
        return None
    handler = signal.getsignal(signal.SIGALRM)
    if handler is others and not signal.getitimer(signal.ITIMER_REAL)[0]:
        return None
    left, every = signal.setitimer(signal.ITIMER_REAL, 0)
    _handle_by(others)
    return _Alarm(left, every, handler, wake)


def _handle_by(handler: Any) -> None:
    if handler is not None:  # one that C code installed, and Python can't set
        signal.signal(signal.SIGALRM, handler)


def _put_filters_aside() -> Callable[[], None]:
    """Inside `warnings.catch_warnings()`, set the filters of outside. Returns what sets the inner ones again."""
    if warnings.filters is _filters.filters:
        return _nothing
    own = _Filters()
    _filters.set()
    return own.set


class _Filters:
    """What `warnings.catch_warnings` keeps and sets back (Python 3.10 to 3.13)."""

    NAMES = ("filters", "showwarning", "_showwarnmsg_impl")

    def __init__(self) -> None:
        self.filters = warnings.filters
        self._all = {name: getattr(warnings, name) for name in self.NAMES}

    def set(self) -> None:
        """Put these in force."""
        for name, value in self._all.items():
            setattr(warnings, name, value)
        with warnings.catch_warnings():  # whose end makes Python forget which warnings it has shown
            pass


@contextmanager
def outlive_handlers(where: str) -> Iterator[None]:
    """Log what a signal's handler raises inside, which is nobody's error. `where` says whose code it is."""
    try:
        yield
    except Exception as error:
        if not is_stray(error, where):
            raise


def is_stray(error: Exception, where: str) -> bool:
    """Whether a signal's handler raised it, which is then logged. `where` says whose code the signal interrupted."""
    is_one = is_of_handler(error)
    if is_one:
        logger.error(STRAY, where, exc_info=error)
    return is_one


def _found_modes() -> modes.Found:
    """What was set between two tasks when torch had been loaded: each task puts that back, so it stays."""
    global _found
    torch = imported("torch")
    if _found is None or _found[0] is not torch:
        _found = torch, modes.found()
    return _found[1]


def _nothing() -> None:
    pass


_filters = _Filters()
_alarms_are_tasks = False
_found: tuple[Any, modes.Found] | None = None


def use() -> None:
    """Take what is set now for what other code expects. Called on the tasks' thread, before any task or load begins."""
    global _filters, _alarms_are_tasks, _found
    _filters, _found = _Filters(), None
    # A timer that runs already is the project's: a profiler's, for example.
    is_main = threading.current_thread() is threading.main_thread()
    _alarms_are_tasks = is_main and not signal.getitimer(signal.ITIMER_REAL)[0]
