"""Arguments of the library's `encode` and `predict` that change nothing here, and those that are refused.

In: what a task passed beside the arguments that a kind knows. Out: an error that says why, or nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: They say how to compute, which the engine decides.
IGNORED = frozenset({"batch_size", "show_progress_bar", "convert_to_numpy", "device"})


def refuse(options: Mapping[str, Any], method: str) -> None:
    """Raise `ValueError` or `TypeError`, with the reason, for what `method` can't do."""
    if options.get("convert_to_tensor") or options.get("convert_to_numpy") is False:
        raise ValueError(
            "tensors are refused: a task that keeps one would hold device memory that the engine counts as free; "
            "the result is a numpy array, and torch.from_numpy() makes it a CPU tensor without a copy"
        )
    if options.get("output_value", "sentence_embedding") != "sentence_embedding":
        raise ValueError(f"output_value={options['output_value']!r} is refused: only sentence embeddings are batched")
    unknown = sorted(set(options) - IGNORED - {"convert_to_tensor", "output_value"})
    if unknown:
        raise TypeError(f"{method}() takes no {', '.join(unknown)}")
