"""How a call computes inside a ModelPool: the task parks, and its items share batches with other tasks'.

In: items, from a task's fiber. Out: their outputs, after however many turns of the loop that took.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from legit_worker import parking, tracing
from legit_worker.errors import DeviceLostError
from legit_worker.models.handle import compute_directly
from legit_worker.models.loaded import LoadedModel
from legit_worker.models.preparing import prepare
from legit_worker.pool import fibers
from legit_worker.pool.calls import Call, Chunk
from legit_worker.pool.engine import Engine
from legit_worker.pool.fibers import Fiber
from legit_worker.pool.loop import Loop

#: Items of one call that are prepared at a time. The rest stay as they came, so that a call of 10,000 items neither
#: fills memory nor keeps the thread while others wait; enough for the packer to find even lengths.
CHUNK = 256

#: Chunks of one call that the engine has at a time: while it computes one, the next is there.
CHUNKS = 2


class Computing:
    """Computes for fibers by the engine, and for any other thread directly, beside the engine."""

    def __init__(self, engine: Engine, loop: Loop) -> None:
        self._engine = engine
        self._loop = loop

    def compute(self, model: LoadedModel, items: list[Any]) -> list[Any]:
        """One output per item, in order. Parks. Raises what the model raised for one of the items."""
        fiber = fibers.current()
        if fiber is None:
            return compute_directly(model, items)
        call = Call(app=fiber.app, clock=fiber.clock, asker=tracing.asker())
        chunks: list[Chunk] = []
        outputs: list[Any] = []
        try:
            for start in range(0, len(items), CHUNK):
                if len(chunks) == CHUNKS:
                    outputs += self._outputs(fiber, chunks)
                chunks.append(self._engine.submit(model, call, prepare(model, items[start : start + CHUNK])))
            while chunks:
                outputs += self._outputs(fiber, chunks)
        finally:
            for chunk in chunks:  # the task ended early
                self._engine.drop(chunk)
        return outputs

    def _outputs(self, fiber: Fiber, chunks: list[Chunk]) -> list[Any]:
        """Wait for the first chunk, which leaves, and return its outputs."""
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
                self._loop.send_back(fiber, error)
            self._loop.note_lost(error)  # and this task is the one whose item it was
