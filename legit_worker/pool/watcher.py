"""Looks at the main thread from outside: tasks that run into their time limits, and tasks that hold everything up.

In: the running fibers, and which of them has the main thread. Out: what is due, noted in the fibers; a signal to the
main thread, if it must interrupt the task that runs; and a log line when others wait for that task for too long.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count
from math import inf
from time import monotonic
from types import FrameType
from typing import Any
from weakref import ref

from greenlet import GreenletExit

from legit_worker.pool import fibers
from legit_worker.pool.fibers import Fiber, Phase
from legit_worker.pool.running import Running

logger = logging.getLogger(__name__)

#: Seconds between two looks, while a running task has a limit, and otherwise.
LIMIT_LOOK, STALL_LOOK = 0.1, 1.0

#: Looks at tasks that are over which are kept for the next time.
SPARE = 256

#: Nobody uses it: Celery has its own meanings for the others that a program may choose, and `SIGALRM` is tasks'.
SIGNAL = signal.SIGVTALRM

#: Of a stalled task's stack, the innermost frames that are logged.
FRAMES = 12


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A fiber has the main thread."""

    fiber: Fiber
    since: float


class Watcher:
    """A thread of its own, from `start` to `stop`. Never runs task code, takes no lock that the main thread holds.

    Of tasks with a limit it keeps the earliest time at which each can be over, so looking costs the same however many
    there are.
    """

    def __init__(
        self,
        *,
        running: Running,
        wake: Callable[[], None],
        stall_seconds: float,
        ends_at: Callable[[], float] = lambda: inf,
    ) -> None:
        self._running = running
        self._wake = wake
        self._stall_seconds = stall_seconds
        # When a soft or a cold shutdown lets no task go on any longer.
        self._ends_at = ends_at
        self._main = 0
        self._poke = threading.Event()
        self._thread: threading.Thread | None = None
        self._is_over = False
        self._signal_before: Any = None
        self._told: Turn | None = None
        self._has_failed = False
        # Tasks with a limit: those that began since the last look; and all, by the time of the next look at each.
        # A task that is over is not kept by these.
        self._begun: deque[ref[Fiber]] = deque()
        self._looks: list[tuple[float, int, ref[Fiber]]] = []
        self._numbers = count()
        self._looks_often = False
        # Tasks in which something was noted since the loop last asked.
        self._noted: deque[Fiber] = deque()
        #: Which fiber has the main thread. Set by it.
        self.turn: Turn | None = None

    def start(self) -> None:
        """Called on the main thread."""
        self._main = threading.get_ident()
        if threading.current_thread() is threading.main_thread():  # elsewhere, running code can't be interrupted
            self._signal_before = signal.signal(SIGNAL, interrupt)
        self._thread = threading.Thread(target=self._run, name="legit-watcher", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Called on the main thread; twice is as good as once.

        The signal's handler stays if the default would take its place: that ends the process at a signal under way.
        """
        self._is_over = True
        self._poke.set()
        if self._thread is not None:
            self._thread.join(STALL_LOOK)
        if self._signal_before not in (None, signal.SIG_DFL):
            signal.signal(SIGNAL, self._signal_before)
        self._signal_before = None

    def follow(self, fiber: Fiber) -> None:
        """A task begins. Called on the main thread."""
        if fiber.limit is not None or fiber.max_wait < inf:
            self._begun.append(ref(fiber))
            if not self._looks_often:
                self._poke.set()

    def take_due(self) -> list[Fiber]:
        """The tasks in which something was noted since the last call. Called on the main thread."""
        return [self._noted.popleft() for _ in range(len(self._noted))]

    def _run(self) -> None:
        while not self._is_over:
            for step in (self._look_at_limits, self._note_end, self._interrupt_overdue, self._notice_stall):
                self._try(step)
            self._looks_often = bool(self._looks) or self._ends_at() < inf
            if not self._begun or self._looks_often:
                self._poke.wait(LIMIT_LOOK if self._looks_often else STALL_LOOK)
            self._poke.clear()

    def _look_at_limits(self) -> None:
        now = monotonic()
        for _ in range(len(self._begun)):
            heappush(self._looks, (now, next(self._numbers), self._begun.popleft()))
        if len(self._looks) > SPARE + 2 * len(self._running):
            self._looks = [look for look in self._looks if _is_alive(look[2])]
            heapify(self._looks)
        while self._looks and self._looks[0][0] <= now:
            _, number, here = heappop(self._looks)
            fiber = here()
            if fiber is None or fiber.dead:
                continue
            self._try(self._note_due, fiber, now)
            after = _remaining(fiber, now)
            if after < inf:
                heappush(self._looks, (now + max(LIMIT_LOOK, after), number, here))

    def _try(self, step: Callable[..., None], *args: Any) -> None:
        """One task that can't be looked at must not take the limits from all others."""
        try:
            step(*args)
        except Exception:
            if not self._has_failed:
                self._has_failed = True
                logger.exception("the watcher failed at %s; it goes on, and says so this once", step.__name__)

    def _note_due(self, fiber: Fiber, now: float) -> None:
        limit = fiber.limit
        due = None if limit is None else limit.due(fiber.clock.seconds(now), now)
        # In a model call that lets no others run, it waits without being parked.
        waits = fiber.phase in (Phase.PARKED, Phase.SERVED)
        if due is not None:
            # A task that was revoked or cancelled has its end, which a limit must not replace.
            fiber.pending = fiber.pending if isinstance(fiber.pending, GreenletExit) else due
        elif waits and fiber.clock.waited(now) >= fiber.max_wait and not fiber.has_waited_too_long:
            fiber.has_waited_too_long = True
        else:
            return
        self._noted.append(fiber)
        self._wake()

    def _note_end(self) -> None:
        """The main thread ends the parked tasks, and can't get to it while another one has it."""
        turn = self.turn
        if turn is not None and monotonic() >= self._ends_at():
            turn.fiber.pending = turn.fiber.pending or GreenletExit()

    def _interrupt_overdue(self) -> None:
        turn = self.turn
        if turn is not None and turn.fiber.pending is not None and self._signal_before is not None:
            signal.pthread_kill(self._main, SIGNAL)

    def _notice_stall(self) -> None:
        turn = self.turn
        # Inside a model call, what it waits for is this package's to bring: a batch, or a load.
        if turn is None or turn is self._told or turn.fiber.phase is Phase.SERVED:
            return
        seconds = monotonic() - max(turn.since, turn.fiber.served_at)
        if seconds >= self._stall_seconds and (parked := self._running.parked):
            self._told = turn
            frame = sys._current_frames().get(self._main)
            stack = "".join(traceback.format_stack(frame)[-FRAMES:])
            said = IMPORTING if waits_for_import(frame) else STALLED
            logger.warning(said, turn.fiber.name, seconds, parked, stack)


def waits_for_import(frame: FrameType | None) -> bool:
    """Tell whether a thread that stands here waits for a module that another thread is importing."""
    code = None if frame is None else frame.f_code
    return code is not None and code.co_filename == "<frozen importlib._bootstrap>" and code.co_name == "acquire"


def _is_alive(here: ref[Fiber]) -> bool:
    fiber = here()
    return fiber is not None and not fiber.dead


def _remaining(fiber: Fiber, now: float) -> float:
    """Seconds until something may be due in a task, at the earliest."""
    wait = inf if fiber.has_waited_too_long else fiber.max_wait - fiber.clock.waited(now)
    if fiber.limit is None:
        return wait
    try:
        return min(wait, fiber.limit.remaining(fiber.clock.seconds(now), now))
    except Exception:  # a limit that can't be asked was logged once
        return wait


#: What an operator reads when a task imports what the load of a model is importing, such as torch.
IMPORTING = """%s has held the main thread for %.1f s, and %d parked tasks can't go on.
It imports a module that another thread is importing, as the load of a model does. It goes on when that is done.
This is where it stands:
%s"""

#: What an operator reads when one task keeps all others from going on.
STALLED = """%s has held the main thread for %.1f s, and %d parked tasks can't go on.
If it waits for something that a parked task holds, a lock or a connection of a small pool, neither ever will. Ways out:
- `with legit_worker.exclusive():` around a model call and what is held across it;
- give it back, or commit, before the call;
- LEGIT_WORKER_WINDOW no larger than the pool of connections;
- LEGIT_WORKER_APPS__<APP>__BATCHING=off for an app whose tasks do this.
This is where it stands:
%s"""


def interrupt(signum: int, frame: FrameType | None) -> None:
    """Raise what is due in the task that runs, if its own code does. Handles the signal.

    Another library's greenlet below the fiber is one that the task's own code went to. During a fork, nothing is
    raised: Python drops what a fork's hook raises, and a lock that it was to free, such as logging's, stays taken. The
    next signal comes after the watcher's next look.
    """
    fiber = fibers.current()
    if fiber is not None and fiber.phase is Phase.BODY and not _is_forking(frame):
        fiber.raise_pending()


def _is_forking(frame: FrameType | None) -> bool:
    """Whether a hook of a fork runs: one that was there before this module's, or one of this package's by its name."""
    if _forking:
        return True
    while frame is not None:
        if frame.f_code.co_name == "_before_fork":
            return True
        frame = frame.f_back
    return False


#: Something while the main thread forks.
_forking: list[bool] = []


def _before_fork() -> None:
    if threading.current_thread() is threading.main_thread():
        _forking.append(True)


os.register_at_fork(before=_before_fork, after_in_parent=_forking.clear, after_in_child=_forking.clear)
