"""Whether a model's rows depend on the padding beside them.

In: a few inputs of a loaded model of a built-in kind, and what computes them. Out: whether a text has another row in a
batch with a longer one. Most models mask the padding. A CNN behind a transformer does not. Neither does a model that
counts learned positions from the first column, if it is padded on the left.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from legit_worker.models.features import Prepared

logger = logging.getLogger(__name__)

#: The inputs that are tried: a few, of different lengths. On a CPU, a large model computes these in seconds.
TRIED = 8

#: The short ones that are computed alone, and once more beside the longest one. One score may be zero by chance.
SHORT = 3

#: How far rows may differ, relative to their own length. Rounding in bfloat16 gives a hundredth, another row a third.
ALLOWED = 0.1

#: Computes a batch: one row for each item.
Compute = Callable[[Sequence[Prepared]], Sequence[Any]]


def minds_padding(name: str, items: Sequence[Prepared], compute: Compute) -> bool:
    """Compare the rows of short inputs, alone and beside a longer one. `name`: the model's, for the log.

    A model whose rows are as long as its batch counts as one that masks. Raises what `compute` raises.
    """
    by_length = sorted(items, key=lambda item: item.cost)
    short = [item for item in by_length[:SHORT] if item.cost < by_length[-1].cost]
    if not short:
        return False
    alone = [_row(compute([item])[0]) for item in short]
    beside = list(map(_row, compute([*short, by_length[-1]])[: len(short)]))
    if alone[0].shape != beside[0].shape:
        return False
    expected = torch.stack(alone)
    difference = float((torch.stack(beside) - expected).norm() / expected.norm())
    minds = difference > ALLOWED
    if minds:
        logger.info(
            "model %s: a short text's row differs by %.0f %% beside a longer text, so a batch has texts of one length",
            *(name, 100 * difference),
        )
    return minds


def _row(output: Any) -> torch.Tensor:
    return torch.as_tensor(output).float()
