"""The built-in kind `multi`, on sentence-transformers' `MultiVectorEncoder`: ColBERT and its like.

In: texts. Out: for each text one vector per token, as `encode(convert_to_numpy=True)` gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import sentence_transformers
import torch
from numpy.typing import NDArray

from legit_worker.models.features import dense_rows, to_numpy
from legit_worker.models.kinds import Embedding
from legit_worker.models.options import refuse
from legit_worker.models.protocol import Plan


class MultiVector(Embedding):
    """Kind `multi`: a vector for each token that counts."""

    def _open(self, path: str, **options: Any) -> Any:
        return sentence_transformers.MultiVectorEncoder(path, **options)

    def output(self, features: dict[str, Any]) -> torch.Tensor:
        """One padded tensor for all items: a last column tells which tokens count."""
        vectors: torch.Tensor = features["token_embeddings"]
        counts = features["attention_mask"].bool().unsqueeze(-1)
        return torch.cat((vectors, counts.to(vectors.dtype)), dim=-1)

    def postprocess(self, output: torch.Tensor) -> NDArray[Any]:
        """The vectors of the tokens that count, shape `[tokens, dim]`."""
        rows = to_numpy(output)
        return np.ascontiguousarray(rows[rows[:, -1] > 0, :-1])

    def plan_encode(
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *,
        normalize_embeddings: bool = False,
        task: str | None = None,
        max_seq_length: int | None = None,
        **others: Any,
    ) -> Plan:
        """Shape `[tokens, dim]` for one text, and a list of these for several: each has a length of its own."""
        others.pop("convert_to_numpy", None)  # False is the library's default, for a list of tensors
        if others.get("output_value") == "token_embeddings":
            del others["output_value"]
        refuse(others, "encode", max_seq_length=max_seq_length)
        items, is_single = self._items(inputs, prompt_name, prompt, task, max_seq_length)

        def finish(rows: list[Any]) -> Any:
            if normalize_embeddings:
                rows = [_normalized(row) for row in rows]
            return rows[0] if is_single else rows

        return items, finish

    def _dimensions(self, result: Any, options: Mapping[str, Any]) -> int | None:
        rows = result if isinstance(result, list) else [result]
        return next((int(row.shape[-1]) for row in rows if row is not None), None)


def _normalized(row: NDArray[Any]) -> NDArray[Any]:
    """Each vector with the length 1."""
    normalized: NDArray[Any] = dense_rows(list(row), None, normalize=True, precision=None) if len(row) else row
    return normalized
