"""OpenVINO by itself, converted from the same module, with all texts at hand and sorted by length.

In: MODEL_PATH, a sentence-transformers folder whose vectors are normalised means, as all-MiniLM-L6-v2's. Its precision
is float32, its hint is throughput, and its batch size is the best of `SIZES` on the same texts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy
import openvino
import torch
from driver import Item, Peer, flat, serve
from sentence_transformers import SentenceTransformer

#: Texts in one batch.
SIZES = (8, 16, 32, 64)


class OpenVino(Peer):
    def __init__(self) -> None:
        library = SentenceTransformer(os.environ["MODEL_PATH"], device="cpu")
        self._tokenizer, self._longest = library.tokenizer, library.max_seq_length
        options = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "f32"}
        self._compiled = openvino.Core().compile_model(_converted(library), "CPU", options)
        self._size = SIZES[0]

    def tune(self, items: Sequence[Item]) -> None:
        self.compute(items)
        self._size = min(SIZES, key=lambda size: self._seconds(items, size))

    def compute(self, items: Sequence[Item]) -> Any:
        texts = flat(items)
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]), reverse=True)
        found: list[Any] = [None] * len(texts)
        queue = openvino.AsyncInferQueue(self._compiled)
        queue.set_callback(lambda request, places: _place(request.get_output_tensor(0).data, places, found))
        for start in range(0, len(order), self._size):
            places = order[start : start + self._size]
            queue.start_async(self._encoded([texts[place] for place in places]), places)
        queue.wait_all()
        return found

    def _encoded(self, texts: list[str]) -> dict[str, Any]:
        encoded = self._tokenizer(texts, padding=True, truncation=True, max_length=self._longest, return_tensors="np")
        return {name: encoded[name].astype(numpy.int64) for name in ("input_ids", "attention_mask")}

    def _seconds(self, items: Sequence[Item], size: int) -> float:
        self._size = size
        started = time.perf_counter()
        self.compute(items)
        return time.perf_counter() - started


class _Whole(torch.nn.Module):
    """Ids and mask in, vectors out."""

    def __init__(self, library: SentenceTransformer) -> None:
        super().__init__()
        self.library = library

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        vectors: torch.Tensor = self.library({"input_ids": input_ids, "attention_mask": attention_mask})[
            "sentence_embedding"
        ]
        return vectors


def _converted(library: SentenceTransformer) -> Any:
    example = {name: torch.ones((2, 16), dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    return openvino.convert_model(_Whole(library).eval(), example_input=example)


def _place(vectors: Any, places: list[int], found: list[Any]) -> None:
    for place, vector in zip(places, vectors.copy(), strict=True):
        found[place] = vector


if __name__ == "__main__":
    serve(OpenVino())
