"""How a worker ends: warm, soft, cold, or because its device is lost.

In: Celery's `stop` and `terminate`, and `DeviceLostError`. Out: tasks that end or go back to the broker, and the
process's exit code.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from collections.abc import Callable
from math import inf
from time import monotonic
from typing import Any

from celery.worker import state

from legit_worker.broker.acks import flush_acks
from legit_worker.errors import DeviceLostError
from legit_worker.pool.engine import Engine
from legit_worker.pool.fibers import Fiber
from legit_worker.pool.intake import Intake
from legit_worker.pool.loop import Loop
from legit_worker.pool.reports import Reports
from legit_worker.pool.running import Running
from legit_worker.pool.softly import SoftShutdown, is_set
from legit_worker.results.backend import away_since
from legit_worker.routing.lanes import is_any_down, is_broker_down

logger = logging.getLogger(__name__)

#: Seconds that a worker waits, at its end, for batches that nobody waits for any more.
FLIGHT_SECONDS = 5.0

#: Seconds between two looks while all that still runs waits for something.
LOOK = 0.25

#: Seconds that a cold shutdown waits for results to be stored, while the result backend takes results.
STORE_SECONDS = 5.0

#: Seconds that a warm shutdown waits, after the last task's code is over, for a result backend that takes no results.
#: Most programs that kill a worker which does not end wait for 30 seconds or longer.
BACKEND_SECONDS = 20.0

#: How names of threads begin that may be in C++ or Rust when the process ends, beside those of batches.
FOREIGN = ("legit-loader", "legit-tokenizer")


class Ending:
    """One pool's. Lives on the main thread."""

    def __init__(
        self,
        *,
        loop: Loop,
        running: Running,
        engine: Engine,
        intake: Intake,
        soft: SoftShutdown,
        reports: Reports,
        release: Callable[[], None],
    ) -> None:
        """`release` gives back what the pool has of the process, once no task runs."""
        self._loop = loop
        self._running = running
        self._engine = engine
        self._intake = intake
        self._soft = soft
        self._reports = reports
        self._release = release
        #: The hub, whose timers go on until the end, and the consumer, once there is one.
        self.hub: Any = None
        self.consumer: Any = None
        self._has_begun = False
        # Since when a shutdown waits for nothing but the result backend.
        self._waits_since: float | None = None

    def warm(self) -> None:
        """Let all tasks end that have started."""
        if not self._soft.is_called_by_handler():
            self._shut_down(until=inf)

    def cold(self) -> None:
        """End all tasks now, or after the time of a soft shutdown if the project has one."""
        self._shut_down(until=self._soft.until)

    def _shut_down(self, until: float) -> None:
        """The one way out. Each step stands where it does because an earlier place would lose something."""
        # No task may begin any more: Celery's remote command `shutdown` sets no flag. No consumer may be started.
        self._has_begun = True
        self._intake.close()
        # The consumer has stopped before the pool, so no task arrives any more. Those not started were not accepted:
        # the broker has them still, and gives them to another worker once this one's connection closes.
        self._loop.backlog.clear()
        # Those that started run to their end: in a warm shutdown all, in a soft one those that can in its time, in a
        # cold one none. A signal that comes meanwhile can turn the first into one of the others.
        while len(self._running) and monotonic() < min(until, self._soft.until_if_begun) and not self._waits_in_vain():
            self._reports.finishing([fiber.waits_for for fiber in self._running])
            self._drain()
        # Celery tells the rest that they are cancelled, before their ends, which would be wrong afterwards.
        self._soft.cancel_rest()
        # Whoever is left unwinds where it stands. Its message, acked late, goes back to the broker.
        self._unwind_all(keep=self._can_end)
        # A task whose own code is over must not run again, if its result can be stored at once.
        until = monotonic() + STORE_SECONDS
        while any(map(self._can_end, self._running)) and monotonic() < until:
            self._drain()
        self._unwind_all(keep=lambda _: False)
        # The hub may have stopped before it came round to the last acks.
        self._tend_hub()
        # A thread that computes a batch, or waits for the device, must not come back to an interpreter that is gone.
        self._engine.wait(FLIGHT_SECONDS)
        # Nor one that takes longer, or loads a model. Celery's worker decides on its exit code after this. If the
        # worker is a thread, as in a test's own process, the exit code is not the worker's.
        if threading.current_thread() is threading.main_thread():
            atexit.register(_leave, self._exit_code, self._is_in_foreign_code)
        # Only now does nobody need the way back from the loader thread, nor a place to park; and nobody is late.
        self._release()

    def _exit_code(self) -> int:
        """What Celery's worker ends with: 0 if it has no other code."""
        return os.EX_OK if self.consumer is None else int(self.consumer.controller.exitcode or os.EX_OK)

    def _is_in_foreign_code(self) -> bool:
        """Whether a thread may be in C++ or Rust."""
        return self._engine.is_computing or any(thread.name.startswith(FOREIGN) for thread in threading.enumerate())

    def _waits_in_vain(self) -> bool:
        """Whether all that still runs waits for a server that is away, and has for long enough.

        That is the result backend, or a broker that takes no envelopes. Other servers' envelopes become dead letters.
        """
        is_away = away_since() is not None or is_broker_down()
        is_waiting = is_away and all(map(self._running.is_around, self._running))
        self._waits_since = (self._waits_since or monotonic()) if is_waiting else None
        if self._waits_since is None or monotonic() < self._waits_since + BACKEND_SECONDS:
            return False
        logger.critical(
            "the result backend or the broker takes no results, so the worker ends, and the results of %d tasks are "
            "not stored: the tasks run again, unless they were acked early; then their results are lost",
            len(self._running),
        )
        return True

    def _can_end(self, fiber: Fiber) -> bool:
        """Whether only its result is left of a task, and the server takes it now."""
        if fiber in self._running.delivering:
            return not is_any_down()
        return self._running.is_over(fiber) and away_since() is None

    def _drain(self) -> None:
        """Do what the hub would do, once."""
        try:
            self._loop.turn(lambda: True)
        except DeviceLostError as error:
            self.give_up(error)
        except Exception:  # a callback that met a lost connection must not take the other tasks with it
            logger.exception("a task ended badly while the worker was stopping")
            self._loop.wait(LOOK)  # what fails again and again must not fill the log
        if len(self._running) and not self._loop.has_work:
            self._loop.wait(LOOK)
        # The hub no longer turns, and both must go on: what is done is acked before whoever stops us loses
        # patience and kills, and heartbeats keep the connection for the acks that follow.
        self._tend_hub()

    def _tend_hub(self) -> None:
        """What the hub does for Celery between two messages; as prefork does while it drains (5.7)."""
        if self.hub is None:
            return
        try:
            self.hub.fire_timers()
            for callback in self.hub._pop_ready():
                callback()
            flush_acks()
        except Exception:
            logger.warning("an ack or a heartbeat failed while the worker was stopping", exc_info=True)

    def _unwind_all(self, keep: Callable[[Fiber], bool]) -> None:
        for fiber in self._running:
            if not keep(fiber):
                self._unwind(fiber)
                self._loop.forget(fiber)

    @staticmethod
    def _unwind(fiber: Fiber, error: BaseException | None = None) -> None:
        """One that ends badly must not keep the others from their end."""
        try:
            fiber.terminate(error)
        except Exception:
            logger.exception("task %s ended badly", fiber.name)

    @property
    def is_near(self) -> bool:
        """Whether a task that began now would only be ended, or keep the worker from its end."""
        is_told = self._has_begun or is_set(state.should_stop)
        return is_told or self._loop.lost is not None or self._soft.has_begun

    def give_up(self, error: DeviceLostError) -> None:
        """End a process that is of no more use: hand back what it holds, and leave with an exit code that says so.

        Tasks whose messages were acked early can't be handed back. They fail with the error.
        """
        # First, so that whatever happens below, the worker ends.
        if state.should_stop == os.EX_SOFTWARE:
            return
        state.should_stop = os.EX_SOFTWARE
        if self.consumer is not None:  # in the middle of a warm shutdown, `should_stop` comes too late
            self.consumer.controller.exitcode = os.EX_SOFTWARE
        atexit.register(_leave, lambda: os.EX_SOFTWARE, lambda: True)
        self._loop.note_lost(error)
        logger.critical(
            "%s; the worker ends, and %d tasks go back to the broker",
            *(error, len(self._running)),
            exc_info=error.__cause__,
        )
        self._loop.backlog.clear()
        self._engine.forget()
        self._loop.resume_ready()  # the one whose item it was
        for fiber in self._running:
            if not (fiber in self._running.delivering or self._running.is_storing(fiber)):
                self._unwind(fiber, None if fiber.acks_late else DeviceLostError(*error.args))
                if fiber.dead:
                    self._loop.forget(fiber)


def _leave(exit_code: Callable[[], int], must: Callable[[], bool]) -> None:
    """If it must be so, end the process when nothing but Python's own end is left.

    That end would free tensors of a lost device, or unwind threads in C++: torch answers by an abort and another exit
    code, or the process never ends.
    """
    if not must():
        return
    atexit.unregister(_leave)
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(exit_code())
