"""How far the rows of a batch are from those that torch computes, when something else computed them.

In: both sides' rows. Out: a number, and what it may be at most.
"""

from __future__ import annotations

from math import inf

import torch

#: What an operator reads when a later comparison fails: the model, how many batches, and what differs.
LATE = "model %s: up to %d batches since the last comparison may have wrong results: %s"

#: How far rows may be from torch's, relative to the largest number, by the bytes of a number. Torch may take another
#: kernel for a batch without padding.
TOLERANCES = {8: 1e-3, 4: 1e-3, 2: 3e-2}


def tells(rows: torch.Tensor) -> bool:
    """Whether a comparison with these rows says something: they are finite, and not all zero. Waits for a GPU."""
    return bool(rows.isfinite().all() and rows.any())


def tolerance(rows: torch.Tensor) -> float:
    """The most that `difference` may be from these rows."""
    return TOLERANCES.get(rows.element_size(), TOLERANCES[2])


def difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    """The largest one, relative to the largest number; infinite if they have other shapes."""
    if expected.shape != found.shape:
        return inf
    expected, found = expected.detach().float(), found.detach().float()
    return float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-12))


def too_far(expected: torch.Tensor, found: torch.Tensor) -> float | None:
    """The difference, if it is more than may be; None if it is not, or if the rows expected tell nothing."""
    distance = difference(expected, found)
    return None if distance <= tolerance(expected) or not tells(expected) else distance
