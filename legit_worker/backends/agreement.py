"""How well another backend's results agree with torch's. Pure.

In: both sides' rows. Out: the worst cosine, and whether scores keep their order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.floating[Any]]

#: Two scores closer than this share of all scores' range have no order of their own: rounding may swap them.
SAME = 1e-3


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The result of a comparison."""

    worst_cosine: float
    #: Whether a ranking by these scores is torch's; True for vectors.
    keeps_order: bool = True


def of_vectors(expected: Rows, found: Rows) -> Agreement:
    """Compare rows of vectors, shape `[n, dim]`. A row that is not finite counts as a cosine of 0."""
    return Agreement(worst_cosine=float(_cosines(expected, found).min()))


def of_scores(expected: Rows, found: Rows) -> Agreement:
    """Compare scores, shape `[n, labels]`: for each label, the scores of all rows as one vector, and their order."""
    orders = [_keeps_order(*pair) for pair in zip(expected.T, found.T, strict=True)]
    return Agreement(worst_cosine=float(_cosines(expected.T, found.T).min()), keeps_order=all(orders))


def _cosines(expected: Rows, found: Rows) -> Rows:
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    lengths = np.linalg.norm(expected, axis=1) * np.linalg.norm(found, axis=1)
    are_zero = ~expected.any(axis=1) & ~found.any(axis=1)  # as a sparse vector without a word
    with np.errstate(all="ignore"):
        cosines = np.where(are_zero, 1.0, (expected * found).sum(axis=1) / lengths)
    return np.nan_to_num(cosines, nan=0.0, posinf=0.0, neginf=0.0)


def _keeps_order(expected: Rows, found: Rows) -> bool:
    order = np.argsort(-expected, kind="stable")
    least = float(np.ptp(expected)) * SAME
    # The largest of those that follow may not be above one that torch ranks clearly higher.
    ranked, true = found[order], expected[order]
    return not any(
        ranked[later] > ranked[place] and true[place] - true[later] > least
        for place in range(len(order))
        for later in range(place + 1, len(order))
    )
