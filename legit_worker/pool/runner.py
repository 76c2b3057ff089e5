"""How a handle computes inside a ModelPool: the task parks, and its items share batches with other tasks'.

In: items, from a task's fiber. Out: their outputs, after however many turns of the loop that took.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any, NoReturn

from greenlet import GreenletExit

from legit_worker import parking
from legit_worker.device import modes
from legit_worker.errors import DeviceLostError, UnknownModelError
from legit_worker.models.entry import Entry
from legit_worker.models.handle import REVIEW_SECONDS, DirectRunner
from legit_worker.models.protocol import Model
from legit_worker.models.residency import Request
from legit_worker.pool import fibers
from legit_worker.pool.calls import Call
from legit_worker.pool.engine import Engine
from legit_worker.pool.fibers import Fiber
from legit_worker.pool.loop import Loop
from legit_worker.pool.running import Running
from legit_worker.settings import fold

#: Items of one call that are prepared at a time. The rest stay as they came, so that a call of 10,000 items neither
#: fills memory nor keeps the thread while others wait; enough for the packer to find even lengths.
CHUNK = 256


class FiberRunner:
    """Runs handles of the fibers' thread; those of any other thread are computed directly, beside the engine."""

    def __init__(
        self, engine: Engine, loop: Loop, running: Running, *, models_of: Callable[[str], tuple[str, ...] | None]
    ) -> None:
        """`models_of` says which models an app may use, None for all."""
        self._engine = engine
        self._loop = loop
        self._running = running
        self._models_of = models_of
        self._direct = DirectRunner(must=True)

    @contextmanager
    def hold(self, entry: Entry) -> Iterator[Model]:
        """Parks until the weights are there. Raises `ModelLoadError`, `UnknownModelError`."""
        fiber = fibers.current()
        if fiber is None:
            with self._direct.hold(entry) as model:
                yield model
            return
        self._check_allowed(fiber, entry)
        if self._loop.lost is not None:
            self._send_back(fiber, self._loop.lost)
        with fiber.served():
            request = entry.residency.request(entry, must=not fiber.may_park())
            try:
                with self._engine.expecting(entry):
                    self._wait_for_load(request)
                try:
                    model = entry.outcome(request.future)
                except DeviceLostError as error:
                    self._send_back(fiber, error)
                yield model
            finally:
                entry.residency.release(request)

    @staticmethod
    def _wait_for_load(request: Request) -> None:
        def look() -> None:
            futures.wait([request.future], timeout=REVIEW_SECONDS)
            request.entry.residency.review()

        parking.wait(request.future, f"model {request.entry.alias} to load", drive=look)

    def run(self, entry: Entry, items: list[Any]) -> list[Any]:
        """Parks while the engine computes. Raises what `preprocess` or `forward` raised for one of the items."""
        fiber = fibers.current()
        if fiber is None:
            return self._direct.run(entry, items)
        call = Call(
            app=fiber.app,
            size=len(items),
            low_water=CHUNK // 2,
            on_progress=lambda: self._loop.wake(fiber),
            clock=fiber.clock,
            postprocess=entry.model_now.postprocess,
        )
        try:
            self._compute(fiber, entry, call, items)
        finally:
            if call.queued:
                self._engine.drop(entry, call)
        return call.outputs

    def _compute(self, fiber: Fiber, entry: Entry, call: Call, items: list[Any]) -> None:
        for start in range(0, len(items), CHUNK):
            self._wait(fiber, entry, call, lambda: call.needs_items)
            prepared = [entry.preprocess(item) for item in items[start : start + CHUNK]]
            self._engine.add(entry, call, start, prepared)
        self._wait(fiber, entry, call, lambda: call.computed == call.size)

    def _wait(self, fiber: Fiber, entry: Entry, call: Call, until: Callable[[], bool]) -> None:
        while call.error is None and not until():
            fiber.raise_due(f"model {entry.alias}")
            if fiber.may_park():
                fiber.park(f"model {entry.alias}")
            else:
                self._step_alone(fiber, entry, call)
        if call.error is not None:
            raise call.error

    def _step_alone(self, fiber: Fiber, entry: Entry, call: Call) -> None:
        """One batch of this call without letting other tasks run; their items may ride along."""
        restore = modes.suspend()
        try:
            with fiber.clock.stopped():  # others' batches may come first
                self._engine.step_for(entry, call)
        except DeviceLostError as error:
            if call.error is None:
                self._send_back(fiber, error)
            self._loop.note_lost(error)  # and this task is the one whose item it was
        finally:
            restore()

    def _send_back(self, fiber: Fiber, error: DeviceLostError) -> NoReturn:
        """End a task whose device is gone: its message goes back, or, where it was acked early, it fails."""
        self._loop.note_lost(error)
        if fiber.acks_late:
            raise GreenletExit from error
        raise DeviceLostError(*error.args) from error

    def _check_allowed(self, fiber: Fiber, entry: Entry) -> None:
        allowed = self._models_of(fiber.app)
        if allowed is not None and fold(entry.alias) not in map(fold, allowed):
            raise UnknownModelError(
                f"app {fiber.app!r} may not use model {entry.alias!r}, only {', '.join(allowed)}: "
                f"see LEGIT_WORKER_APPS__{fiber.app.upper()}__MODELS"
            )
