"""How long a small app's tasks take beside another app's flood: what weights give, and what the queue's order does not.

In: a worker with a simulated model. Out: seconds of the small app's tasks, one at a time: alone; with a queue of its
own beside the flood; and behind a part of the flood in one queue.
"""

from __future__ import annotations

import statistics
from time import monotonic
from typing import Any

from processes import Processes
from rich.console import Console
from services import Side, start_broker, start_side

#: Tasks of the flood; those that stand before the small app's only task in the shared queue; and the small app's.
FLOOD, AHEAD, SMALL = 50_000, 5_000, 300
#: The small app may take this many times what it takes alone, at the 99th percentile.
TARGET = 3.0
#: A batch takes 5 ms, and a tenth of a millisecond for each word.
MODEL = {
    "LEGIT_WORKER_MODELS__SIM__KIND": "simulated",
    "LEGIT_WORKER_MODELS__SIM__PATH": "0.005,0.0001",
    "LEGIT_WORKER_APPS__BIG__WEIGHT": "1",
    "LEGIT_WORKER_APPS__SMALL__WEIGHT": "1",
}
TASK = "legit_worker.embed_text"

console = Console(highlight=False)


def measure(processes: Processes) -> int:
    """Print the three. Returns 1 if the target is missed."""
    with console.status("Starting a worker with a simulated model"):
        side = start_side(processes, "legit_worker", "legit_worker", f"{start_broker(processes)}/0", MODEL)
        while not side.client.control.add_consumer("small", reply=True, timeout=2):
            pass  # it is not ready yet
        for _ in range(20):
            _one(side, "small")
    alone = [_one(side, "small") for _ in range(SMALL)]
    with console.status(f"Sending a flood of {FLOOD} tasks"):
        side.client.control.cancel_consumer("celery", reply=True, timeout=2)
        _send(side, FLOOD)
        side.client.control.add_consumer("celery", reply=True, timeout=2)
    beside = [_one(side, "small") for _ in range(SMALL)]
    left = side.client.connection_for_read().default_channel.client.llen("celery")
    side.client.control.purge()
    with console.status(f"Waiting behind {AHEAD} tasks in one queue"):
        _send(side, AHEAD)
        behind = _one(side, "celery")

    ratio = _p99(beside) / _p99(alone)
    for name, seconds in (("alone", alone), ("a queue of its own beside the flood", beside)):
        console.print(f"{name}: median {statistics.median(seconds) * 1e3:.0f} ms, p99 {_p99(seconds) * 1e3:.0f} ms")
    console.print(f"behind {AHEAD} tasks in one queue: {behind:.1f} s, which is the queue's order")
    console.print(
        f"{'✓' if ratio <= TARGET else '✗'} p99 beside the flood: {ratio:.2f} times alone (target ≤ {TARGET:g})"
    )
    if not left:
        console.print("the queue of the flood was empty at the end: this shows less")
    return int(ratio > TARGET)


def _one(side: Side, queue: str) -> float:
    start = monotonic()
    _task(side, queue=queue, headers={"app": "small"}).get(timeout=300)
    return monotonic() - start


def _task(side: Side, **options: Any) -> Any:
    return side.client.send_task(TASK, ["some words of a text"], {"model": "sim"}, **options)


def _send(side: Side, count: int) -> None:
    with side.client.pool.acquire() as connection, side.client.amqp.Producer(connection) as producer:
        for _ in range(count):
            _task(side, producer=producer, headers={"app": "big"}, ignore_result=True)


def _p99(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=100)[98]
