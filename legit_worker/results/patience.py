"""How a task waits for a result backend, if Celery's own code would fail and can be called again.

In: calls, and which of their errors mean that the backend is away. Out: what a call gives once the backend is back.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from math import inf
from time import monotonic
from typing import Any

from celery.exceptions import BackendStoreError

from legit_worker import parking

logger = logging.getLogger(__name__)

#: What a task waits for, in the log and in `inspect stats`.
WAIT = "its result to be stored"

#: Seconds between two looks.
LOOK_SECONDS = 0.5

#: Seconds before the log says again that a backend takes nothing.
SAID_SECONDS = 60.0

#: If a backend has stored other tasks' states between two tries, and this often, it refuses this one. Once may be by
#: chance: a server that starts goes away again.
MOST_REFUSALS = 3

#: Since when tasks wait, by the monotonic clock.
waiting_since: dict[object, float] = {}


def patiently(call: Callable[[], Any], what: str, waits: Callable[[Exception], bool]) -> tuple[Any, bool]:
    """Return what a call gives, and whether its backend was away. As long as it is, the task waits, if it can park.

    `what` says in words what the task waits for, and `waits` tells whether an error means that the backend is away.
    """
    this = object()
    try:
        while True:
            try:
                return call(), this in waiting_since
            except Exception as error:  # noqa: PERF203
                if not waits(error):
                    raise
                if this not in waiting_since:
                    waiting_since[this] = monotonic()
                    logger.warning("the result backend takes nothing, and a task waits for %s: %r", what, error)
                if not parking.park(later(), what, counts=True):
                    raise
    finally:
        waiting_since.pop(this, None)


class Outage:
    """For how long a result backend has taken nothing, and what the log says of it. Lives on one thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        #: When it stopped taking results, by the monotonic clock; None while it takes them.
        self.since: float | None = None
        # When the log last said so.
        self._said_at = -inf

    def goes_on(self, why: str) -> None:
        """It took nothing just now."""
        now = monotonic()
        if self.since is None:
            self.since, self._said_at = now, -inf
        if now - self._said_at >= SAID_SECONDS:
            self._said_at = now
            logger.warning(
                "%s takes no results, for %.0f s by now, and the tasks wait until it does: %s",
                *(self._name, now - self.since, why),
            )

    def ends(self) -> None:
        """It took something, whether it was away or not."""
        if self.since is not None:
            logger.warning("%s takes results again, after %.1f s", self._name, monotonic() - self.since)
            self.since = None


class RefusedStateError(BackendStoreError):
    """A result backend refuses the state of one task."""


@dataclass(eq=False)
class _Caller:
    """A task that calls a backend."""

    task_id: Any
    #: Whether its call runs. It may call the backend again, for a chord's body, and that must not wait for it.
    is_trying: bool = False
    tries: int = 0
    #: How often the backend refused it, and took others since its last try.
    refusals: int = 0
    #: How many calls of others had succeeded at its last try.
    seen: int = 0


class Patient:
    """One result backend. Lives on the tasks' thread. Owns who waits for it.

    While it raises errors, one of those who wait tries at each look: a try may take seconds, in which no other task
    runs. Two states of one task keep their order.
    """

    def __init__(self, name: str, is_own: Callable[[Exception], bool]) -> None:
        """`is_own` tells whether an error is one task's, who does not wait."""
        self._name = name
        self._is_own = is_own
        self._waiting: dict[_Caller, None] = {}
        # Whose try is next, if any of them waits.
        self._next: _Caller | None = None
        # The look before which nobody tries.
        self._look: Future[None] | None = None
        self._successes = 0
        self._outage = Outage(name)

    def __repr__(self) -> str:
        return f"<Patient {self._name}: {len(self._waiting)} waiting>"

    def call(self, call: Callable[[], Any], task_id: Any) -> Any:
        """Return what a call gives that stores something of a task, as soon as the backend takes it.

        Raises the errors that are the task's own, and `RefusedStateError`.
        """
        this = _Caller(task_id)
        try:
            while True:
                if self._may_try(this):
                    try:
                        answer = self._try(this, call)
                    except Exception as error:
                        if self._is_own(error):
                            raise
                        self._failed(this, error)
                    else:
                        self._succeeded()
                        return answer
                elif this not in self._waiting:
                    self._line_up(this)
                if not parking.park(later(), WAIT, counts=True):
                    return call()
        finally:
            self._leave(this)

    def _may_try(self, this: _Caller) -> bool:
        is_early = self._look is not None and not self._look.done()
        return not is_early and self._next in (None, this)

    @staticmethod
    def _try(this: _Caller, call: Callable[[], Any]) -> Any:
        this.tries += 1
        this.is_trying = True
        try:
            return call()
        finally:
            this.is_trying = False

    def _failed(self, this: _Caller, error: Exception) -> None:
        this.refusals += this.tries > 1 and this.seen != self._successes
        this.seen = self._successes
        if this.refusals >= MOST_REFUSALS or _is_of_code(error):
            raise RefusedStateError(f"{self._name} refuses a task's state: {error!r}") from error
        self._look = later()
        self._line_up(this)
        self._outage.goes_on(repr(error))

    def _succeeded(self) -> None:
        self._successes += 1
        self._look = None
        self._outage.ends()

    def _line_up(self, this: _Caller) -> None:
        self._waiting.setdefault(this)
        waiting_since.setdefault(this, monotonic())
        self._choose()

    def _leave(self, this: _Caller) -> None:
        if this in self._waiting:
            del self._waiting[this], waiting_since[this]
            self._choose()

    def _choose(self) -> None:
        """Choose whose try is next: of those with the fewest tries, who came first. Of one task, its first state."""
        firsts: dict[Any, _Caller] = {}
        for caller in self._waiting:
            firsts.setdefault(caller.task_id, caller)
        idle = (caller for caller in firsts.values() if not caller.is_trying)
        self._next = min(idle, key=lambda caller: caller.tries, default=None)


def _is_of_code(error: Exception) -> bool:
    """Whether an error is of a backend's code over one state: no server's or network's error is one of Python's own."""
    return type(error).__module__ == "builtins" and not isinstance(error, OSError)


class _Look:
    """The next look. All tasks that wait share it: a thread for each would be a thousand after a worker's death."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done: Future[None] | None = None

    def later(self) -> Future[None]:
        """Return what is done once it is time to look again. Any thread may call it."""
        with self._lock:
            if self._done is None:
                timer = threading.Timer(LOOK_SECONDS, self._come)
                timer.daemon = True
                timer.start()
                self._done = Future()
            return self._done

    def _come(self) -> None:
        with self._lock:
            done, self._done = self._done, None
        assert done is not None
        done.set_result(None)


later = _Look().later
