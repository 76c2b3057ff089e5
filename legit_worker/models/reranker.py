"""The built-in kind `rerank`, on sentence-transformers' `CrossEncoder`.

In: pairs of texts. Out: their scores, with the shape and the dtype that the library gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import sentence_transformers
import torch

from legit_worker import golden
from legit_worker.errors import InvalidInputError
from legit_worker.models.features import check_text, what
from legit_worker.models.options import refuse
from legit_worker.models.protocol import Plan
from legit_worker.models.sentence import SentenceModel


class Reranker(SentenceModel):
    """Kind `rerank`: scores of pairs of texts, as `CrossEncoder.predict` gives them."""

    is_ranking = True

    def _open(self, path: str, **options: Any) -> Any:
        return sentence_transformers.CrossEncoder(path, **options)

    def _check(self, value: Any) -> None:
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise InvalidInputError(f"a reranker takes pairs of two texts, not {what(value)}")
        for part in value:
            check_text(part)

    def labels(self) -> list[str]:
        """The names of its scores, in their order."""
        names = self.library.config.id2label
        return [str(names.get(place, place)) for place in range(self.library.num_labels)]

    def trial_inputs(self) -> list[list[Any]]:
        """Pairs of a short text and any other one."""
        texts = golden.texts()
        return [[(min(texts[:8], key=len), text) for text in texts]]

    def sample(self, cost: int) -> Any:
        """A pair of about `cost` tokens."""
        return ("a " * (cost // 2), "a " * (cost // 2))

    def output(self, features: dict[str, Any]) -> torch.Tensor:
        """One row of logits per pair, shape `[n, labels]`."""
        scores: torch.Tensor = features["scores"].float()
        return scores.reshape(scores.shape[0], -1)

    def plan_predict(
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *,
        activation_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
        apply_softmax: bool = False,
        max_seq_length: int | None = None,
        activation_fct: Callable[[torch.Tensor], torch.Tensor] | None = None,
        **others: Any,
    ) -> Plan:
        """A float32 for one pair, shape `[n]` for several, `[n, labels]` if the model has several labels.

        `activation_fct` is the library's older name of `activation_fn`.
        """
        refuse(others, "predict", max_seq_length=max_seq_length)
        items, is_single = self._items(inputs, prompt_name, prompt, None, max_seq_length)

        def finish(rows: list[Any]) -> Any:
            if not rows:
                return np.array([])
            scores = (activation_fn or activation_fct or self.library.activation_fn)(torch.from_numpy(np.stack(rows)))
            if self.library.num_labels == 1:
                scores = scores.squeeze(-1)
            elif apply_softmax:
                scores = torch.nn.functional.softmax(scores, dim=1)
            return scores.numpy()[0] if is_single else scores.numpy()

        return items, finish
