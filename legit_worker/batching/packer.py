"""Makes batches of waiting items. Pure: no clock, no I/O, nothing from Celery, torch or Redis.

In: the costs of the items that wait, a budget, and a cost model that predicts seconds. Out: lists of indexes.

`pick` chooses one batch for a queue that is filled again: 0.2 ms for 1,024 items. `pack` cuts all items into
batches, for a caller that has no others: 4 ms for as many. `fill` is for a model that computes no padding.

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


#: A model whose layers compute no padding still has padding in its input and output: at most this many times the cost.
SPREAD = 3


def padded(costs: Sequence[int]) -> int:
    """The size of one batch in cost units, padding included."""
    return len(costs) * max(costs, default=0)


def evened(costs: Sequence[int]) -> tuple[float, float]:
    """Find equal items with the same sum of costs, and the same sum of squared costs: how many, and the cost of each.

    A batch without padding takes as long as a batch of these.
    """
    total, squares = sum(costs), sum(cost * cost for cost in costs)
    return total * total / squares, squares / total


def fill(costs: Sequence[int], budget: int) -> list[int]:
    """Choose the first item, and of the others, in their order, those that fit into a batch without padding.

    Its cost is at most `budget`, but for a first item that is larger alone. Returns indexes into `costs`, ascending.
    """
    chosen, total, longest = [0], costs[0], costs[0]
    for index, cost in enumerate(costs[1:], 1):
        if total >= budget:
            break
        more, most = total + cost, max(longest, cost)
        if more <= budget and (len(chosen) + 1) * most <= SPREAD * more:
            chosen.append(index)
            total, longest = more, most
    return chosen


def pack(costs: Sequence[int], budget: int, model: CostModel) -> list[list[int]]:
    """Cut items into the batches that `model` predicts to take the least time together.

    `costs` are the items' costs, at least 1 each. Returns lists of indexes into `costs`, each sorted from the
    shortest item to the longest; every index is in exactly one. No batch is larger than `budget` when padded,
    except an item that is larger alone.
    """
    order = np.argsort(np.asarray(costs, dtype=np.int64), kind="stable")
    lengths = np.asarray(costs, dtype=np.int64)[order]
    return [order[start:end].tolist() for start, end in _cheapest_runs(lengths, budget, model)]


def pick(costs: Sequence[int], budget: int, model: CostModel) -> list[int]:
    """Choose the batch with the first item that has the fewest predicted seconds for each unit of its items' cost.

    Its other items are those that are next to the first one in length. Takes the same as `pack`, and returns one of
    its lists. Since a queue is filled again, which of its items are left behind matters little.
    """
    every = np.asarray(costs, dtype=np.int64)
    order = np.argsort(every, kind="stable")
    lengths = every[order]
    # As many items of one length are taken as fit. Only a few runs are then worth a look.
    begins = np.flatnonzero(np.diff(lengths, prepend=0))
    place = int(np.searchsorted(lengths, costs[0]))  # of the first item: the sort keeps it before its equals
    kind = int(np.searchsorted(begins, place))
    longest = lengths[begins[kind:]]
    most = np.maximum(1, budget // longest)
    fits = place + most > begins[kind:]
    longest, most = longest[fits], most[fits]
    ends = np.minimum(np.append(begins[kind + 1 :], len(lengths))[fits], place + most)
    lowest = max(0, int(np.searchsorted(begins, place + 1 - most[0], "right")) - 1)
    starts = np.maximum(begins[lowest : kind + 1, None], ends - most)
    costs_before = np.concatenate(([0], np.cumsum(lengths)))
    seconds = model.predict(ends - starts, longest) / (costs_before[ends] - costs_before[starts])
    row, column = divmod(int(seconds.argmin()), len(longest))
    start, end = _undivided(lengths, int(starts[row, column]), int(ends[column]), place, model)
    chosen: list[int] = order[start:end].tolist()
    return chosen


def _undivided(lengths: NDArray[np.int64], start: int, end: int, place: int, model: CostModel) -> tuple[int, int]:
    """The part of the run with the item at `place`, divided for as long as two parts take less time than one."""
    while end - start > 1:
        cuts = np.arange(start + 1, end)
        parts = model.predict(cuts - start, lengths[start : end - 1]) + model.predict(
            end - cuts, lengths[end - 1 : end]
        )
        if parts.min() >= model.predict(end - start, int(lengths[end - 1])):
            break
        cut = int(cuts[parts.argmin()])
        start, end = (cut, end) if cut <= place else (start, cut)
    return start, end


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
