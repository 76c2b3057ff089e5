"""How a handle computes inside a ModelPool: the task parks, and its items share batches with other tasks'.

In: items, from a task's fiber. Out: their outputs, after however many turns of the loop that took.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from greenlet import GreenletExit

from legit_worker.device import modes
from legit_worker.errors import DeviceLostError, UnknownModelError
from legit_worker.models.entry import Entry
from legit_worker.models.handle import DirectRunner
from legit_worker.models.protocol import Model
from legit_worker.pool import fibers
from legit_worker.pool.calls import Call
from legit_worker.pool.engine import Engine
from legit_worker.pool.fibers import Fiber

#: Items of one call that are prepared at a time. The rest stay as they came, so that a call of 10,000 items neither
#: fills memory nor keeps the thread while others wait; enough for the packer to find even lengths.
CHUNK = 256


class FiberRunner:
    """Runs handles of the fibers' thread; those of any other thread are computed directly, beside the engine."""

    def __init__(
        self,
        engine: Engine,
        *,
        wake: Callable[[Fiber], None],
        give_up: Callable[[DeviceLostError], None],
        models_of: Callable[[str], tuple[str, ...] | None],
    ) -> None:
        self._engine = engine
        self._wake = wake
        self._give_up = give_up
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
        request = entry.residency.request(entry, must=not fiber.may_park())
        try:
            if not request.future.done() and fiber.may_park():
                request.future.add_done_callback(lambda _: self._wake(fiber))
                while not request.future.done():
                    fiber.park(f"model {entry.alias} to load")
            yield entry.outcome(request.future)
        finally:
            entry.residency.release(request)

    def run(self, entry: Entry, items: list[Any]) -> list[Any]:
        """Parks while the engine computes. Raises what `preprocess` or `forward` raised for one of the items."""
        fiber = fibers.current()
        if fiber is None:
            return self._direct.run(entry, items)
        call = Call(app=fiber.app, size=len(items), low_water=CHUNK // 2, on_progress=lambda: self._wake(fiber))
        try:
            self._compute(fiber, entry, call, items)
        finally:
            if call.queued:
                self._engine.drop(entry, call)
        return [entry.model_now.postprocess(output) for output in call.outputs]

    def _compute(self, fiber: Fiber, entry: Entry, call: Call, items: list[Any]) -> None:
        for start in range(0, len(items), CHUNK):
            self._wait(fiber, entry, call, lambda: call.needs_items)
            prepared = [entry.preprocess(item) for item in items[start : start + CHUNK]]
            self._engine.add(entry, call, start, prepared)
        self._wait(fiber, entry, call, lambda: call.computed == call.size)

    def _wait(self, fiber: Fiber, entry: Entry, call: Call, until: Callable[[], bool]) -> None:
        while call.error is None and not until():
            if fiber.may_park():
                fiber.park(f"model {entry.alias}")
            else:
                self._step_alone(entry, call)
        if call.error is not None:
            raise call.error

    def _step_alone(self, entry: Entry, call: Call) -> None:
        """One batch of this call without letting other tasks run; their items may ride along."""
        restore = modes.suspend()
        try:
            self._engine.step_for(entry, call)
        except DeviceLostError as error:
            if call.error is None:  # this task goes back with the others
                self._give_up(error)
                raise GreenletExit from error
            self._give_up(error)
        finally:
            restore()

    def _check_allowed(self, fiber: Fiber, entry: Entry) -> None:
        allowed = self._models_of(fiber.app)
        if allowed is not None and entry.alias not in allowed:
            raise UnknownModelError(
                f"app {fiber.app!r} may not use model {entry.alias!r}, only {', '.join(allowed)}: "
                f"see LEGIT_WORKER_APPS__{fiber.app.upper()}__MODELS"
            )
