"""Infinity's engine in this process: one call per item, all at once. It stores nothing and acks nothing.

In: MODEL_PATH. Its torch engine in float32, batches of 32, which its documentation names for a CPU.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

from driver import Item, Peer, serve
from infinity_emb import AsyncEmbeddingEngine, EngineArgs


class Infinity(Peer):
    def __init__(self) -> None:
        arguments = EngineArgs(
            model_name_or_path=os.environ["MODEL_PATH"],
            engine="torch",
            device="cpu",
            dtype="float32",
            batch_size=32,
            bettertransformer=False,
        )
        self._loop = asyncio.new_event_loop()
        self._engine = AsyncEmbeddingEngine.from_args(arguments)
        self._loop.run_until_complete(self._engine.astart())

    def compute(self, items: Sequence[Item]) -> Any:
        return self._loop.run_until_complete(self._all(items))

    async def _all(self, items: Sequence[Item]) -> list[Any]:
        calls = (self._engine.embed([item] if isinstance(item, str) else item) for item in items)
        return [vector for vectors, _ in await asyncio.gather(*calls) for vector in vectors]


if __name__ == "__main__":
    serve(Infinity())
