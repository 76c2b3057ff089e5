"""A target latency, kept by the sizes of batches: simulated arrivals, a simulated model, and a clock of its own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import ceil

import pytest
from letters import Letters

from legit_worker.batching.sizing import LAUNCHES, TARGET_SHARE, Sizing
from legit_worker.device.devices import Launch
from legit_worker.pool.calls import Call, Chunk
from legit_worker.pool.queue import ModelQueue

#: The device: seconds for each batch and each unit. A large batch lasts 20 launches, 0.16 s.
LAUNCH, EACH = 0.008, 0.0004

#: Units of an item, on average, and items of a large call that wait at least: a worker has up to twice as many.
COST, BULK = 10, 256


class Slow(Letters):
    """Takes as long as `LAUNCH` and `EACH` say, by the clock of `simulate`."""

    def launch(self, batch: Sequence[str]) -> Launch:
        return Launch(outputs=batch, seconds=LAUNCH + EACH * len(batch) * max(map(len, batch)))


def simulate(target: float | None, rate: float, seconds: float = 12.0) -> list[float]:
    """The latencies of single items that come at random, `rate` a second, beside a large call of the same app.

    Without the first quarter of them, in which the sizes are learned.
    """
    draw = random.Random(3)
    queue = ModelQueue(Slow(), max_batch_seconds=0.5, target_latency=target, weight_of=lambda app: 1.0)
    large = Call(app="")
    now, arrival = 0.0, 0.0
    waiting: list[tuple[float, Chunk]] = []
    latencies = []
    while now < seconds:
        if large.waiting < BULK:
            queue.submit(large, ["x" * draw.randint(COST // 2, COST + COST // 2) for _ in range(BULK)])
        while arrival <= now:
            waiting.append((arrival, queue.submit(Call(app=""), ["x" * COST])))
            arrival += draw.expovariate(rate)
        batch = queue.next_batch()
        launch = queue.launch(batch)
        now += launch.seconds
        queue.succeeded(batch, launch)
        latencies += [now - since for since, chunk in waiting if chunk.done.done()]
        waiting = [(since, chunk) for since, chunk in waiting if not chunk.done.done()]
    return latencies[len(latencies) // 4 :]


def p99(latencies: list[float]) -> float:
    return sorted(latencies)[ceil(0.99 * len(latencies)) - 1]


@pytest.mark.parametrize("target", [0.1, 0.2])
def test_beside_a_large_call_99_of_100_single_items_are_done_within_the_target(target: float) -> None:
    assert p99(simulate(None, rate=20)) > 0.25
    assert p99(simulate(target, rate=20)) <= target


def test_if_more_calls_wait_than_the_target_has_room_for_batches_are_as_large_as_without_one() -> None:
    """Small batches would let the queue grow."""
    assert len(simulate(0.1, rate=400)) >= 0.95 * len(simulate(None, rate=400))


def test_a_batch_takes_a_part_of_the_target_and_may_always_take_two_launches() -> None:
    bounded, free = Sizing(0.5, target=0.15), Sizing(0.5)
    for sizing in (bounded, free):
        for count in (1, 4, 16, 64, 256, 16):
            sizing.observe(count, 1, 0.001 + 0.001 * count)
    assert bounded.items(1) == pytest.approx(TARGET_SHARE * 0.15 / 0.001, abs=2)
    assert bounded.items(1, round_seconds=1.0) == free.items(1) > 100
    tight = Sizing(0.5, target=0.001)
    for count in (1, 4, 16, 64, 16):
        tight.observe(count, 1, 0.1 + 0.001 * count)
    assert tight.items(1) == pytest.approx((LAUNCHES - 1) * 0.1 / 0.001, abs=2)
