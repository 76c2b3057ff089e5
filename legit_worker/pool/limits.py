"""Time limits of tasks, and when they are over.

In: the seconds that Celery was told, per task, and the task's own seconds so far. Out: what is raised in the task, as
the prefork pool would have it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from typing import Any

import celery
from celery.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded
from celery.worker import state
from greenlet import GreenletExit

from legit_worker.errors import InvalidInputError, shown

logger = logging.getLogger(__name__)

#: Seconds after which a task that outlived its hard limit, since it caught what ended it, is ended again.
AGAIN = 1.0

#: From this release on, `Request.on_timeout` tells all who are to know of a hard limit. Before, it leaves the signal,
#: the event and whether the message goes back to `Request.on_failure`, which prefork calls, too (billiard.pool).
TELLS_ALL = (5, 7)


#: The longest limit, in seconds: thirty years. Beyond what a float holds, a number could not be compared with a clock.
MOST_SECONDS = 1e9


class TimeLimitPassed(GreenletExit):
    """Ends a task that ran into its hard time limit. Its `finally` blocks run, its result is never stored."""


@dataclass(eq=False, kw_only=True)
class Limit:
    """One running task's. The watcher thread asks it what is due."""

    #: Seconds of the task's own time; None is no limit.
    soft: float | None
    hard: float | None
    #: Celery's `Request.on_timeout(is_soft, seconds)`.
    on_timeout: Callable[[bool, float], None]
    # By the monotonic clock: when a task that outlives its hard limit is ended again, also if it only waits.
    _again_at: float = inf

    def due(self, own: float, now: float) -> BaseException | None:
        """What to raise in the task, if anything: the soft limit's error once, the hard limit's again and again.

        `own` is the task's own time in seconds, `now` the monotonic clock's.
        """
        if now >= self._again_at or (self._again_at == inf and self.hard is not None and own >= self.hard):
            self.soft, self._again_at = None, now + AGAIN
            return TimeLimitPassed()
        if self.soft is not None and own >= self.soft:
            passed, self.soft = self.soft, None
            self.on_timeout(True, passed)  # which logs
            error: BaseException = SoftTimeLimitExceeded()
            return error
        return None

    @property
    def is_over(self) -> bool:
        """Whether the hard limit has passed."""
        return self._again_at < inf

    def remaining(self, own: float, now: float) -> float:
        """Seconds until something may be due, at the earliest."""
        if self._again_at < inf:
            return self._again_at - now
        return min(inf if limit is None else limit - own for limit in (self.soft, self.hard))


def seconds_of(value: Any, what: str) -> float | None:
    """A limit as a number; None for 0 and for nothing, which are no limit. Raises `InvalidInputError`.

    Numbers in text count, as other programs' clients may send them. `what` says which limit it is, and whose.
    """
    number = value
    if isinstance(value, str):
        with suppress(ValueError):
            number = int(value) if value.strip().isdecimal() else float(value)
    if value is None:
        return None
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number <= MOST_SECONDS:
        raise InvalidInputError(
            f"{what} is {shown(value)}: send a number of seconds, 0 or more, or null, which is no limit of its own"
        )
    return number or None


def repair_shape(request: Any, **_: Any) -> None:
    """Have Celery get two limits out of any message, for `seconds_of` to judge; else it would end the worker.

    A receiver of `task_received`: `Request.execute_using_pool` (celery.worker.request, 5.5 to 5.7) unpacks them.
    """
    limits = request.time_limits
    if not isinstance(limits, list | tuple) or len(limits) != 2:
        request.time_limits = ([limits], None)  # a list is no limit


def timeout_callback(
    name: str, on_timeout: Callable[[bool, float], None], fail: Callable[[Exception], None]
) -> Callable[[bool, float], None]:
    """What to call when a limit of this task is over: once each, what prefork brings about.

    Once a shutdown has begun, `Request.on_timeout` acks a task that is over its hard limit, and stores nothing (Celery
    5.6 and 5.7).
    """

    def tell(is_soft: bool, seconds: float) -> None:
        if is_soft or (celery.VERSION[:2] >= TELLS_ALL and not state.should_terminate):
            on_timeout(is_soft, seconds)
            return
        # Not `on_timeout` as well: both store the failure, and would call the task's errbacks twice.
        logger.error("Hard time limit (%ss) exceeded for %s", seconds, name)
        fail(TimeLimitExceeded(seconds))

    return tell
