"""Measures how even the packer's batches are, and what it takes to pick and to observe one. Needs no worker.

In: lengths as those of mixed texts (lognormal, mean 85, at most 256 tokens), from one app and from eight, and a device
that computes a batch of them in about 10 ms. Out: a line per window, in microseconds: the fastest of the batches, and
the median. Run it by `python scripts/lib/packing.py` in the project's environment.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import scipy.optimize  # noqa: F401  which a worker's libraries import, too

from legit_worker.batching.packer import padded
from legit_worker.device.devices import Launch
from legit_worker.pool.calls import Call
from legit_worker.pool.queue import ModelQueue

WINDOWS = (64, 256, 512, 1024, 4096)
APPS = (1, 8)
#: Batches that are measured, and those before them, from which the cost model learns.
BATCHES, BEFORE = 200, 100
#: The device: seconds for each batch and each token.
LAUNCH, TOKEN = 5e-4, 8e-6


class Tokens:
    """A model whose items are their own lengths."""

    alias = "tokens"

    def cost(self, item: int) -> int:
        return item

    def batch_key(self, item: int) -> str:
        return "text"

    def identity(self, item: int) -> None:
        return None

    def pads(self, item: int) -> bool:
        return True

    def largest_cost(self, longest: int) -> int:
        return 16_384

    def launch(self, batch: Sequence[int]) -> Launch:
        return Launch(outputs=batch, seconds=LAUNCH + TOKEN * len(batch) * max(batch))

    def observe(self, *_: Any) -> None:
        pass

    make_room = observe

    def is_lost(self, error: BaseException) -> bool:
        return False

    def postprocess(self, output: int) -> int:
        return output


def measure(window: int, apps: int) -> str:
    """Pick batches from a window that is always full."""
    model, draw = Tokens(), random.Random(20)
    queue = ModelQueue(model, max_batch_seconds=0.01, weight_of=lambda app: 1.0)
    picking, observing = [], []
    for number in range(BEFORE + BATCHES):
        while len(queue) < window:
            length = min(256, max(3, round(draw.lognormvariate(math.log(85) - 0.18, 0.6))))
            queue.submit(Call(app=f"app{draw.randrange(apps)}"), [length])
        start = perf_counter()
        batch = queue.next_batch()
        picking.append(perf_counter() - start)
        launch, costs = model.launch([item.prepared for item in batch]), [item.cost for item in batch]
        start = perf_counter()
        queue.sizing.observe(len(costs), max(costs), launch.seconds)
        observing.append(perf_counter() - start)
        if number >= BEFORE:
            queue.counters.note(costs, padded(costs), launch.seconds)
    each = "   ".join(
        f"{name} {1e6 * min(times[BEFORE:]):4.0f} {1e6 * statistics.median(times[BEFORE:]):4.0f}"
        for name, times in (("pick", picking), ("observe", observing))
    )
    seconds = 1e3 * queue.counters.forward_seconds / BATCHES
    return f"{apps} apps, window {window:4}   {each}   padding {queue.counters.waste:.1%}, batches of {seconds:.1f} ms"


if __name__ == "__main__":
    for apps in APPS:
        for window in WINDOWS:
            print(measure(window, apps))
