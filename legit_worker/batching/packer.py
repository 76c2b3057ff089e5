"""Cuts waiting items into batches. Pure: no clock, no I/O, nothing from Celery, torch or Redis.

In: the costs of the items that wait, a budget, and a cost model that predicts seconds. Out: lists of indexes.

A batch is padded to its longest item, so its size is `count * longest`. Over all ways to cut items into batches
under a budget, some cheapest one consists of runs of the sorted items: given any other cut, sorting the batches by
their longest item and refilling them from the sorted items keeps each count and raises no longest. So it is enough
to search the sorted runs, which dynamic programming does exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from legit_worker.batching.costmodel import CostModel

#: Seconds that count for each batch besides what the model predicts: of equally good cuts, the one with fewer batches.
EACH = 1e-6

#: Sums of seconds that differ by this part of them are equal: they were added up in another order.
SAME = 1e-9


def padded(costs: Sequence[int]) -> int:
    """The size of one batch in cost units, padding included."""
    return len(costs) * max(costs, default=0)


def pack(costs: Sequence[int], budget: int, model: CostModel) -> list[list[int]]:
    """Cut items into the batches that `model` predicts to take the least time together.

    `costs` are the items' costs, at least 1 each. Returns lists of indexes into `costs`, each sorted from the
    shortest item to the longest; every index is in exactly one. No batch is larger than `budget` when padded,
    except an item that is larger alone.
    """
    order = np.argsort(np.asarray(costs, dtype=np.int64), kind="stable")
    lengths = np.asarray(costs, dtype=np.int64)[order]
    return [order[start:end].tolist() for start, end in _cheapest_runs(lengths, budget, model)]


def _cheapest_runs(lengths: NDArray[np.int64], budget: int, model: CostModel) -> list[tuple[int, int]]:
    """The runs `(start, end)` of the ascending `lengths` whose predicted seconds sum to the least."""
    total = len(lengths)
    best = np.zeros(total + 1)  # best[i]: the least seconds for the first i items
    cut = np.zeros(total + 1, dtype=np.int64)  # cut[i]: where the last of their batches starts
    starts = np.arange(float(total))
    for end, longest in enumerate(lengths.tolist(), 1):
        first = max(0, end - max(1, budget // longest))
        launch = model.predict(0, longest)
        each = model.predict(1, longest) - launch
        # `shared` is the same for all starts. The rest of the sum is linear in the start.
        shared = EACH + launch + end * each
        seconds = best[first:end] - each * starts[first:end]
        least = float(np.minimum.reduce(seconds))
        # Of equally good cuts the one whose last batch is the smallest: of equal items, the first batches are full.
        start = end - 1 - int((seconds[::-1] <= least + SAME * (shared + least)).argmax())
        best[end], cut[end] = shared + seconds[start - first], start
    return _walk_back(cut)


def _walk_back(cut: NDArray[np.int64]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    end = len(cut) - 1
    while end > 0:
        runs.append((int(cut[end]), end))
        end = int(cut[end])
    return runs[::-1]
