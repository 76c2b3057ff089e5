"""A model that computes nothing, and takes as much time and memory as its settings say.

In: strings or numbers. Out: a vector that depends on the item alone, so a test can tell whose result it got.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from time import sleep
from typing import Any

import numpy as np
from numpy.typing import NDArray

from legit_worker.device.simulated import Ledger, simulated_device
from legit_worker.errors import InvalidInputError
from legit_worker.models.options import refuse
from legit_worker.models.protocol import Plan

#: Length of the vectors.
DIMENSION = 8


class SimulatedModel:
    """A model for tests: its answer is `vector(item)`, its time `seconds_per_batch + seconds_per_cost * padded`.

    `path` is `"<seconds per batch>,<seconds per padded unit>,<bytes of weights>,<seconds to load>,<bytes per padded
    unit>"`; each number is 0 if it is left out. The model enters its bytes in a ledger, by default in the one of the
    process's simulated device.
    """

    def __init__(self, path: str | None = None, alias: str = "a model", ledger: Ledger | None = None) -> None:
        numbers = [float(part) for part in (path or "0,0").split(",")]
        self.seconds_per_batch, self.seconds_per_cost, weights, self._load_seconds, each = (*numbers, 0, 0, 0)[:5]
        self._weights, self._bytes_per_cost = int(weights), int(each)
        self._alias = alias
        self._ledger = ledger or simulated_device().ledger
        self._leave: Any = None

    def load(self, device: str) -> None:
        """Take the time of a load, then the memory of the weights. Raises `DeviceOutOfMemoryError`."""
        sleep(self._load_seconds)
        self.to(device)

    def to(self, device: str) -> None:
        """Enter the weights, or give them back if the device is the CPU. They also go when the model goes."""
        if device == "cpu":
            if self._leave is not None:
                self._leave()
        elif self._leave is None or not self._leave.alive:
            self._ledger.take(self._alias, self._weights)
            self._leave = weakref.finalize(self, self._ledger.give_back, self._alias, self._weights)
            self._leave.atexit = False

    def memory(self) -> int:
        """Bytes of weights, as `path` says."""
        return self._weights

    def sample(self, cost: int) -> str:
        """An item of that cost."""
        return "word " * cost

    def preprocess(self, item: Any) -> str:
        """Take strings and numbers only. Raises `InvalidInputError`."""
        if isinstance(item, bool) or not isinstance(item, str | int | float):
            raise InvalidInputError(f"the simulated model takes strings and numbers, not {type(item).__name__}")
        return str(item)

    def cost(self, item: str) -> int:
        """One unit per word, as if words were tokens."""
        return max(1, len(item.split()))

    def forward(self, batch: Sequence[str]) -> list[NDArray[np.float32]]:
        """Hold the batch's bytes and sleep for its time, then answer. Raises `DeviceOutOfMemoryError`."""
        padded = len(batch) * max(map(self.cost, batch))
        with self._ledger.held(self._alias, padded * self._bytes_per_cost):
            sleep(self.seconds_per_batch + self.seconds_per_cost * padded)
        return [vector(item) for item in batch]

    def postprocess(self, output: NDArray[np.float32]) -> list[float]:
        """JSON-safe: a list of floats."""
        return [float(value) for value in output]

    def plan_encode(
        self,
        inputs: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        *,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        **others: Any,
    ) -> Plan:
        """The result has shape `[8]` for one string, `[n, 8]` for several. A prompt changes nothing.

        Other options are taken or refused as the kinds of sentence-transformers do.
        """
        refuse(others, "encode", truncate_dim=truncate_dim)
        is_single = isinstance(inputs, str)

        def finish(rows: list[Any]) -> NDArray[np.float32]:
            vectors = np.asarray(rows, dtype=np.float32).reshape(-1, DIMENSION)[:, :truncate_dim]
            if normalize_embeddings:
                vectors = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
            return vectors[0] if is_single else vectors

        return [inputs] if is_single else list(inputs), finish

    # A model without prompts.
    plan_encode_query = plan_encode_document = plan_encode

    def similarity(self, embeddings1: Any, embeddings2: Any) -> NDArray[np.float32]:
        """Cosines, shape `[n, m]`."""
        cosines: NDArray[np.float32] = _directions(embeddings1) @ _directions(embeddings2).T
        return cosines

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> NDArray[np.float32]:
        """Cosines, shape `[n]`."""
        cosines: NDArray[np.float32] = (_directions(embeddings1) * _directions(embeddings2)).sum(axis=-1)
        return cosines

    def get_embedding_dimension(self) -> int:
        """Length of the vectors."""
        return DIMENSION


def _directions(vectors: Any) -> NDArray[np.float32]:
    rows = np.atleast_2d(np.asarray(vectors, dtype=np.float32))
    directions: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return directions


def vector(item: str) -> NDArray[np.float32]:
    """The one answer for this item: float32 in [0, 1), shape `[8]`."""
    digest = hashlib.sha256(item.encode()).digest()
    return (np.frombuffer(digest, dtype="<u4").astype(np.float64) / 2**32).astype(np.float32)
