"""Whether a worker lives, and whether it is ready.

In: the consumer's life, and each time that the loop comes round, told on the main thread. Out: answers, on any thread.

A worker is dead if its loop has not come round for a while and nothing excuses that. Excused are the start, which loads
the pinned models; a broker that is away; the worker's end, which has its own limits; and a batch, for `BATCH_SECONDS`.
A task's own code that keeps the thread is not: it holds up all others. Whoever has tasks that compute for minutes gives
the probe more seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any, Protocol

from celery.worker import state

#: Seconds for which the loop may not come round, unless the probe says otherwise: a hundred of the longest batches.
ALIVE_SECONDS = 60.0

#: Seconds that a batch may take. A longer one hangs: no device computes for that long.
BATCH_SECONDS = 600.0

#: Seconds between two signs of life.
BEAT_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Holder:
    """What has the main thread."""

    #: In words.
    what: str
    #: Whether it is a batch or a load, and not a task's own code.
    is_batch: bool


class Held(Protocol):
    """What health asks of a pool. Any thread may ask."""

    def holder(self) -> Holder | None:
        """What has the main thread; None if the worker's own loop has it."""

    def missing(self) -> list[str]:
        """One sentence for each pinned model that is not there."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """To a probe."""

    is_yes: bool
    #: Why, as JSON.
    why: dict[str, Any]


class Health:
    """One worker's. The main thread changes it, any thread asks it; it takes no lock."""

    def __init__(self, pool: Held | None, clock: Callable[[], float] = monotonic) -> None:
        """`pool` is None if the pool is not a `ModelPool`."""
        self._pool = pool
        self._clock = clock
        self._turned_at = clock()
        self._has_started = self._is_connected = self._is_ending = False

    def turned(self) -> None:
        """The loop came round."""
        self._turned_at = self._clock()

    def connected(self) -> None:
        """The broker gives tasks from now on."""
        self._has_started = self._is_connected = True
        self.turned()

    def away(self) -> None:
        """The broker gives none any more."""
        self._is_connected = False

    def ending(self) -> None:
        """The worker takes no more tasks."""
        self._is_ending = True

    @property
    def age(self) -> float:
        """Seconds since the loop last came round."""
        return self._clock() - self._turned_at

    @property
    def is_ending(self) -> bool:
        """Whether the worker takes no more tasks."""
        flags = (state.should_stop, state.should_terminate)  # an exit code may be 0
        return self._is_ending or any(flag is not None and flag is not False for flag in flags)

    def alive(self, seconds: float = ALIVE_SECONDS) -> Answer:
        """Whether a restart would not help: the loop came round within these seconds, or something excuses it."""
        age = self.age
        holder = self._pool.holder() if self._pool is not None else None
        excuse = self._excuse(age, holder)
        why: dict[str, Any] = {"turned_seconds_ago": round(age, 3), "allowed_seconds": seconds}
        why |= {"busy_with": holder.what} if holder is not None else {}
        why |= {"excuse": excuse} if excuse else {}
        return Answer(is_yes=age <= seconds or bool(excuse), why=why)

    def _excuse(self, age: float, holder: Holder | None) -> str:
        if self.is_ending:
            return "the worker ends"
        if not self._has_started:
            return "the worker starts"
        if not self._is_connected:
            return "the broker is away"
        return "a batch runs" if holder is not None and holder.is_batch and age <= BATCH_SECONDS else ""

    def ready(self) -> Answer:
        """Whether tasks that are sent now are taken and computed."""
        reasons = []
        if self.is_ending:  # which leaves the broker
            reasons.append("the worker ends")
        elif not self._has_started:
            reasons.append("the worker starts")
        elif not self._is_connected:
            reasons.append("the broker is away")
        reasons += self._pool.missing() if self._pool is not None else []
        return Answer(is_yes=not reasons, why={"reasons": reasons})
