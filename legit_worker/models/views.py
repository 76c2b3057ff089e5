"""Outputs that would keep the memory of their whole batch.

In: one output of a model. Out: the same, in memory of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

#: A row that is this part of the memory below it, or more, stays there.
LARGE = 0.5


def in_own_memory(output: Any) -> Any:
    """Return a copy of an array or a tensor that is a small part of another one; anything else as it is.

    A task that keeps one row would otherwise keep the rows of all tasks in its batch.
    """
    if isinstance(output, np.ndarray):
        return output.copy() if output.nbytes < LARGE * _bytes_below(output.base) else output
    # A tensor, without an import of torch. A sparse one has no storage, and a row of it is a copy anyway.
    if hasattr(output, "untyped_storage") and str(output.layout) == "torch.strided":
        return output.clone() if output.nbytes < LARGE * _bytes_below(output) else output
    return output


def _bytes_below(base: Any) -> int:
    """The memory that this object keeps; 0 if there is none, or nobody knows."""
    if hasattr(base, "untyped_storage"):  # an array that shares a tensor's memory
        return int(base.untyped_storage().nbytes())
    return int(getattr(base, "nbytes", 0))
