"""A model for the engine's tests, as the engine sees one, and what its futures have."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

from legit_worker.device.devices import Device, Launch
from legit_worker.pool.calls import Chunk


class PoisonError(Exception):
    pass


class Letters:
    """Counts letters, doubles each item, and chokes on `!`."""

    computes_beside = False

    def __init__(self, alias: str = "letters", broken: bool = False) -> None:
        self.alias = alias
        self.broken = broken
        self.batches: list[list[str]] = []
        #: What memory was freed for.
        self.freed: list[tuple[int, int, int]] = []

    def preprocess(self, item: str) -> str:
        return item

    def cost(self, item: str) -> int:
        return len(item)

    def pads(self, item: str) -> bool:
        return True

    def launch(self, batch: Sequence[str]) -> Launch:
        return Device("cpu").launch(lambda: self.forward(batch))

    def observe(self, count: int, longest: int, launch: Launch) -> None:
        pass

    def largest_cost(self, longest: int) -> int:
        return 16_384

    def make_room(self, count: int, longest: int, tries: int = 0) -> None:
        self.freed.append((count, longest, tries))

    def is_lost(self, error: BaseException) -> bool:
        return False

    def batch_key(self, item: str) -> Hashable:
        return item.isupper()

    def identity(self, item: str) -> Hashable:
        return None

    def postprocess(self, output: str) -> str:
        return output

    def forward(self, batch: Sequence[str]) -> list[str]:
        self.batches.append(list(batch))
        if self.broken or any("!" in item for item in batch):
            raise PoisonError(f"{len(batch)} items")
        return [item * 2 for item in batch]


class SmallLetters(Letters):
    """One whose device takes batches up to a padded cost, and now and then not even those."""

    def __init__(self, most: int, storm: float = 0.0) -> None:
        super().__init__()
        self.most = most
        self._draw = random.Random(5)
        self._storm = storm
        self.refused = 0

    def forward(self, batch: Sequence[str]) -> list[str]:
        if len(batch) * max(map(len, batch)) > self.most or self._draw.random() < self._storm:
            self.refused += 1
            raise MemoryError("CUDA out of memory")
        return super().forward(batch)


def outputs(chunk: Chunk) -> list[str]:
    """What was computed; it is done."""
    return chunk.done.result(timeout=0)


def error(chunk: Chunk) -> BaseException | None:
    """Why it could not be; None if it could, or is not done."""
    return chunk.done.exception(timeout=0) if chunk.done.done() else None
