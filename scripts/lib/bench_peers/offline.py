"""The library by itself, in one process, with all texts at hand: what a worker could reach if tasks cost nothing.

In, as the second argument: `32`, which is `encode`'s own batch size, or `best`, which tries several on the same texts.
`encode` sorts by length. MODEL_PATH names the model.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from driver import Item, Peer, flat, serve
from sentence_transformers import SentenceTransformer

#: Batch sizes that `best` tries.
SIZES = (8, 16, 32, 64, 128, 256)


class Offline(Peer):
    def __init__(self, choice: str) -> None:
        self._model = SentenceTransformer(os.environ["MODEL_PATH"], device="cpu")
        self._size, self._best = 32, choice == "best"

    def tune(self, items: Sequence[Item]) -> None:
        self._encode(items, 32)
        if self._best:
            self._size = min(SIZES, key=lambda size: self._seconds(items, size))

    def compute(self, items: Sequence[Item]) -> Any:
        return self._encode(items, self._size)

    def _encode(self, items: Sequence[Item], size: int) -> Any:
        return self._model.encode(flat(items), batch_size=size, show_progress_bar=False)

    def _seconds(self, items: Sequence[Item], size: int) -> float:
        started = time.perf_counter()
        self._encode(items, size)
        return time.perf_counter() - started


if __name__ == "__main__":
    serve(Offline(sys.argv[2]))
