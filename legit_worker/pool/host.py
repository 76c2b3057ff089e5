"""How tasks wait in this pool: they park, and the loop goes on to others.

In: futures that tasks wait for (`legit_worker.parking`). Out: control to the loop, and back once a future is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from typing import Any

from legit_worker import parking
from legit_worker.errors import DeviceLostError
from legit_worker.pool import fibers
from legit_worker.pool.clock import work_of
from legit_worker.pool.engine import Engine
from legit_worker.pool.fibers import Fiber, Phase
from legit_worker.pool.loop import Loop
from legit_worker.pool.running import Running

#: Seconds between two looks at the time of a task that waits without parking.
LOOK = 0.25


class FiberHost(parking.Host):
    """Parks fibers. In a thread that has none, waits as the base class does. Lives as long as its pool."""

    def __init__(self, loop: Loop, engine: Engine, running: Running, *, is_inline: bool) -> None:
        self._loop = loop
        self._engine = engine
        self._running = running
        # Without an event loop nobody would come back to a parked task.
        self._is_inline = is_inline

    def wait(self, done: Future[Any], what: str, drive: parking.Drive | None, is_own: bool, loads: str | None) -> None:
        """Park, if the task may. If not, `drive` until then, or block: the task may hold what others would need."""
        fiber = fibers.current()
        if fiber is None:
            super().wait(done, what, drive, is_own, loads)
            return
        work = fiber.clock.following(work_of(done)) if is_own else nullcontext()
        expected = self._engine.expecting(loads) if loads else nullcontext()
        with work, expected, fiber.served():
            self._wait(fiber, done, what, drive)

    def _wait(self, fiber: Fiber, done: Future[Any], what: str, drive: parking.Drive | None) -> None:
        while not done.done():
            fiber.raise_due(what)
            if self._may_park(fiber):
                fiber.wait_for(done, what)
                return
            self._drive(fiber, done, drive)

    def _may_park(self, fiber: Fiber) -> bool:
        return not self._is_inline and fiber.may_park()

    @staticmethod
    def _drive(fiber: Fiber, done: Future[Any], drive: parking.Drive | None) -> None:
        with fiber.aside(), fiber.clock.stopped():  # others' batches may come first
            if drive is None:
                futures.wait([done], timeout=LOOK)
            else:
                drive()

    def park(self, done: Future[Any], what: str, counts: bool) -> bool:
        """Park a task. One that is over counts in the window meanwhile only if `counts` says so."""
        fiber = fibers.current()
        if done.done():
            return True
        if fiber is None or not self._may_park(fiber):
            return False
        if fiber.phase is Phase.ENDING and not counts:
            self._running.delivering.add(fiber)
        try:
            fiber.wait_for(done, what, in_own_code=fiber.phase is not Phase.ENDING)
        finally:
            self._running.delivering.discard(fiber)
        return True

    @property
    def is_around_task(self) -> bool:
        """Whether Celery's code around a task runs, in which others may have the thread."""
        fiber = fibers.current()
        return fiber is not None and fiber.phase in (Phase.NEW, Phase.ENDING) and self._may_park(fiber)

    def give_way(self, what: str) -> None:
        """Park until the loop comes round, if the task may."""
        fiber = fibers.current()
        if fiber is not None and self._may_park(fiber):
            fiber.give_way(what)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Keep what ends the task out of this package's code. A task whose device is lost ends, or goes back."""
        fiber = fibers.current()
        if fiber is None:
            yield
            return
        if self._loop.lost is not None:
            self._loop.send_back(fiber, self._loop.lost)
        with fiber.served():
            try:
                yield
            except DeviceLostError as error:
                self._loop.send_back(fiber, error)

    @property
    def is_pressing(self) -> bool:
        """Whether the caller keeps the thread, or another one, from what others need to go on."""
        fiber = fibers.current()
        return fiber is None or not self._may_park(fiber)
