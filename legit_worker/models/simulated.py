"""A model that computes nothing, and takes the time and the memory that it is told to.

In: any strings or numbers. Out: a vector that depends on the item alone, so a test can tell whose result it got.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from time import sleep
from typing import Any

import numpy as np
from numpy.typing import NDArray

from legit_worker.errors import InvalidInputError

#: Length of the vectors.
DIMENSION = 8


class SimulatedModel:
    """A model for tests: `vector(item)` is its answer, `seconds_per_batch + seconds_per_cost * padded` its time.

    `path`, where given, is `"<seconds per batch>,<seconds per padded unit>"`, and where wanted
    `",<bytes of weights>,<seconds to load>"`.
    """

    def __init__(self, path: str | None = None) -> None:
        numbers = [float(part) for part in (path or "0,0").split(",")]
        self.seconds_per_batch, self.seconds_per_cost, self._bytes, self._load_seconds = (*numbers, 0, 0)[:4]
        #: The batches that ran, each a list of items: tests read it.
        self.batches: list[list[str]] = []

    def load(self, device: str) -> None:
        """Nothing to read, but it takes its time."""
        sleep(self._load_seconds)

    def memory(self) -> int:
        """Bytes of weights, as it was told."""
        return int(self._bytes)

    def preprocess(self, item: Any) -> str:
        """Strings and finite numbers only. Raises `InvalidInputError`."""
        if isinstance(item, bool) or not isinstance(item, str | int | float):
            raise InvalidInputError(f"the simulated model takes strings and numbers, not {type(item).__name__}")
        return str(item)

    def cost(self, item: str) -> int:
        """One per word, as if words were tokens."""
        return max(1, len(item.split()))

    def forward(self, batch: Sequence[str]) -> list[NDArray[np.float32]]:
        """Sleep as long as the batch would take, then answer."""
        self.batches.append(list(batch))
        sleep(self.seconds_per_batch + self.seconds_per_cost * len(batch) * max(map(self.cost, batch)))
        return [vector(item) for item in batch]

    def postprocess(self, output: NDArray[np.float32]) -> list[float]:
        """JSON-safe: a list of floats."""
        return [float(value) for value in output]

    def encode(self, run: Any, inputs: str | Sequence[str]) -> NDArray[np.float32]:
        """A vector of shape `[8]` for one string, an array of shape `[n, 8]` for several."""
        if isinstance(inputs, str):
            return np.asarray(run([inputs])[0], dtype=np.float32)
        return np.asarray(run(list(inputs)), dtype=np.float32).reshape(-1, DIMENSION)


def vector(item: str) -> NDArray[np.float32]:
    """The one answer for this item: float32 in [0, 1), shape `[8]`."""
    digest = hashlib.sha256(item.encode()).digest()
    return (np.frombuffer(digest, dtype="<u4").astype(np.float64) / 2**32).astype(np.float32)
