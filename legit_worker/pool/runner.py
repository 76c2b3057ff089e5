"""How a handle computes inside a ModelPool: the task parks, and its items share batches with other tasks'.

In: items, from a task's fiber. Out: their outputs, after however many turns of the loop that took.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

from greenlet import GreenletExit

from legit_worker import parking
from legit_worker.errors import DeviceLostError, UnknownModelError
from legit_worker.models.entry import Entry
from legit_worker.models.handle import REVIEW_SECONDS, DirectRunner
from legit_worker.models.methods import is_in_another_call
from legit_worker.models.protocol import Model
from legit_worker.models.residency import Request
from legit_worker.pool import fibers
from legit_worker.pool.calls import Call, Chunk
from legit_worker.pool.engine import Engine
from legit_worker.pool.fibers import Fiber
from legit_worker.pool.loop import Loop
from legit_worker.settings import fold

#: Items of one call that are prepared at a time. The rest stay as they came, so that a call of 10,000 items neither
#: fills memory nor keeps the thread while others wait; enough for the packer to find even lengths.
CHUNK = 256

#: Chunks of one call that the engine has at a time: while it computes one, the next is there.
CHUNKS = 2


class FiberRunner:
    """Runs handles of the fibers' thread; those of any other thread are computed directly, beside the engine."""

    def __init__(self, engine: Engine, loop: Loop, *, models_of: Callable[[str], tuple[str, ...] | None]) -> None:
        """`models_of` says which models an app may use, None for all."""
        self._engine = engine
        self._loop = loop
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
            request = entry.residency.request(entry, must=not fiber.may_park() or is_in_another_call())
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
        """Parks while the engine computes. Raises what the model raised for one of the items."""
        fiber = fibers.current()
        if fiber is None:
            return self._direct.run(entry, items)
        call = Call(app=fiber.app, clock=fiber.clock)
        chunks: list[Chunk] = []
        outputs: list[Any] = []
        try:
            for start in range(0, len(items), CHUNK):
                if len(chunks) == CHUNKS:
                    outputs += self._wait_for_first(fiber, chunks)
                part = [entry.preprocess(item) for item in items[start : start + CHUNK]]
                chunks.append(self._engine.submit(entry, call, part))
            while chunks:
                outputs += self._wait_for_first(fiber, chunks)
        finally:
            for chunk in chunks:  # the task ended early
                self._engine.drop(chunk)
        return outputs

    def _wait_for_first(self, fiber: Fiber, chunks: list[Chunk]) -> list[Any]:
        """The outputs of the first chunk, which leaves."""
        chunk = chunks[0]
        parking.wait(chunk.done, f"model {chunk.alias}", drive=partial(self._drive, fiber, chunk))
        outputs = chunk.done.result()
        del chunks[0]
        return outputs

    def _drive(self, fiber: Fiber, chunk: Chunk) -> None:
        """One batch of this chunk without letting other tasks run; their items may ride along."""
        try:
            self._engine.drive(chunk)
        except DeviceLostError as error:
            if not chunk.done.done():
                self._send_back(fiber, error)
            self._loop.note_lost(error)  # and this task is the one whose item it was

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
