"""How far the rows of a batch are from those that torch computes, when something else computed them.

In: both sides' rows. Out: a number, and what it may be at most.
"""

from __future__ import annotations

from math import inf

import torch

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
