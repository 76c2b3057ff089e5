"""Trial batches at a model's load, which measure the memory that batches take.

In: a model that makes samples, on a device that tells a batch's memory. Out: what a cost model of bytes learned.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

from legit_worker.batching.costmodel import CostModel
from legit_worker.device.devices import Launch
from legit_worker.device.memory import is_out_of_memory

logger = logging.getLogger(__name__)

#: The trial batches, as (items, cost of each): enough to tell what grows with the padded cost from what grows with the
#: length. The first is computed once more before, unmeasured: a library's workspace stays.
BATCHES = ((1, 32), (8, 32), (1, 128), (8, 128), (1, 256), (8, 256))

#: Seconds within which the trials must end; meanwhile, other loads wait. On a GPU they take one or two, and most of
#: that is the first one's.
MOST_SECONDS = 5.0


def calibrate(alias: str, model: Any, compute: Callable[[Sequence[Any]], Launch], activations: CostModel) -> bool:
    """Try batches, and teach `activations` their bytes. Whether the next load need not do it again.

    A batch is left out if the smaller ones predict that it ends too late. Raises what the model raises, but for a lack
    of memory: a device this full says by the smaller batches what it can take. If it had none for any of them, the next
    load tries again.
    """
    took, until, left_out = CostModel(), monotonic() + MOST_SECONDS, 0
    for number, (count, cost) in enumerate((BATCHES[0], *BATCHES)):
        start = monotonic()
        if start + took.at_most(count, cost) > until:
            left_out += 1
            continue
        batch = [model.trial(cost) for _ in range(count)]
        launch = _launch(compute, batch)
        if number and launch is not None:  # the first one has the library's beginning in its time, too
            took.observe(count, cost, monotonic() - start)
            if launch.peak:
                activations.observe(count, max(map(model.cost, batch)), launch.peak)
    if left_out:
        logger.warning(
            "model %r is slow: %d of %d trial batches were left out, since they would not end within %.0f s; the "
            "memory that large batches need is learned from those that run",
            alias,
            left_out,
            len(BATCHES) + 1,
            MOST_SECONDS,
        )
    return took.is_known or left_out > 0


def _launch(compute: Callable[[Sequence[Any]], Launch], batch: Sequence[Any]) -> Launch | None:
    """The batch, computed; None if there was no memory for it."""
    try:
        return compute(batch)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
