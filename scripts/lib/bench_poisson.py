"""`poisson`: latency against throughput, while tasks come at random times, from 5 % to 120 % of what a worker can do.

In: a `Bench`. Out: a table, and `Point`s for the plot.

The load is open: a task is sent when its time has come, whether or not earlier ones are done, and its latency counts
from that time. Messages are made beforehand. A result counts when the backend publishes it: a client
sees it then.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from bench_contenders import OUR_MODELS, PATH
from bench_figures import OURS, STOCK, Point, Row, Spread, Table, Verdict, percentile, poisson_times
from bench_modes import Bench
from measure import QUEUE, STAGING, STUCK_SECONDS, StuckError, collect, lone_task, stage, warm_up
from services import Side, start_broker, start_side
from texts import short_titles

#: Parts of the capacity, in a quick and in a full run.
LOADS = ((0.2, 0.8), (0.05, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2))
#: Fixed waits to compare with, in seconds.
DELAYS = ("auto", "0", "0.01", "0.05")
#: Tasks and seconds of one run, at least: enough for a 99th percentile, and longer than a window of tasks takes.
TASKS, SECONDS = (100, 200), (3, 6)
#: At most so many seconds for a slow load, in a quick and in a full run.
LONGEST = (6, 15)
#: Tasks that tell the capacity, and lone tasks.
CAPACITY_TASKS, LONE_TASKS = 600, 50
#: At 80 % load, the 99th percentile takes at most this many times a lone task's time.
TARGET_LOAD, TARGET = 0.8, 5.0

Meter = tuple[Side, float]


def poisson(bench: Bench, mode: str) -> tuple[list[Table], list[Point]]:
    bench.stop_all()
    meters = _start(bench)
    lone = {name: _lone(side) for name, (side, _) in meters.items()}
    points = []
    with bench.progress() as progress:
        bar = progress.add_task(mode, total=bench.rounds * len(LOADS[bench.full]) * len(meters))
        for number in range(bench.rounds):
            for load in LOADS[bench.full]:
                for name, (side, capacity) in meters.items():
                    progress.update(bar, description=f"{name} at {load:.0%} of {capacity:.0f} tasks/s")
                    points.append(_point(bench, name, side, load, capacity, number))
                    progress.advance(bar)
    for side, _ in meters.values():
        side.worker.kill()
    return [_table(bench, points, lone)], points


def _start(bench: Bench) -> dict[str, Meter]:
    """Workers, each with its capacity. Those of this project have the same, so that their loads are the same."""
    broker = start_broker(bench.processes, "valkey-poisson")
    delays = DELAYS if bench.full else DELAYS[:2]
    meters: dict[str, Meter] = {}
    for number, delay in enumerate(delays):
        variables = OUR_MODELS | {"LEGIT_WORKER_MAX_QUEUE_DELAY": delay}
        name = OURS if delay == "auto" else f"{OURS}, delay {delay} s"
        side = start_side(bench.processes, f"{name} poisson", "legit_worker", f"{broker}/{number}", variables)
        meters[name] = side, meters[OURS][1] if meters else _capacity(bench, side)
        if number:
            warm_up(side, short_titles(CAPACITY_TASKS))
    stock = start_side(
        bench.processes, "stock poisson", "stock_project", f"{broker}/{len(delays)}", {"MODEL_PATH": PATH}
    )
    return meters | {STOCK: (stock, _capacity(bench, stock))}


def _capacity(bench: Bench, side: Side) -> float:
    """Tasks a second when all are there at once, with the client that listens beside: it shares the worker's cores."""
    with bench.console.status(f"poisson: what {side.name} can do"):
        titles = short_titles(bench.tasks or CAPACITY_TASKS)
        warm_up(side, titles)
        return statistics.median(len(titles) / open_loop(side, titles, [0.0] * len(titles))[1] for _ in range(3))


def _lone(side: Side) -> float:
    return statistics.median(lone_task(side, text) for text in short_titles(LONE_TASKS))


def _point(bench: Bench, name: str, side: Side, load: float, capacity: float, seed: int) -> Point:
    rate = load * capacity
    least, shortest, longest = TASKS[bench.full], SECONDS[bench.full], LONGEST[bench.full]
    count = bench.tasks or round(min(max(least, rate * shortest), max(rate * longest, 20)))
    times = poisson_times(rate, count, seed)
    latencies, seconds = open_loop(side, short_titles(count), times)
    p50, p99 = (percentile(latencies, share) for share in (0.5, 0.99))
    return Point(name=name, load=load, offered=rate, achieved=count / seconds, p50=p50, p99=p99)


def open_loop(side: Side, texts: Sequence[str], times: Sequence[float]) -> tuple[list[float], float]:
    """Each task's latency, and the seconds from the first one's time until the last one's end."""
    keys = stage(side, texts)
    store: Any = side.client.backend.client
    messages = store.lrange(STAGING, 0, -1)[::-1]
    store.delete(STAGING)
    with store.pubsub() as results:
        results.subscribe(*keys)
        started, ended = _send_and_listen(store, results, messages, times, set(keys), side)
    collect(side, keys)
    latencies = [ended[key] - started - when for key, when in zip(keys, times, strict=True)]
    return latencies, max(ended.values()) - started - times[0]


def _send_and_listen(
    store: Any, results: Any, messages: list[bytes], times: Sequence[float], keys: set[Any], side: Side
) -> tuple[float, dict[Any, float]]:
    """When it began, and when each key's result came."""
    started = heard = time.perf_counter()
    ended: dict[Any, float] = {}
    sent = 0
    while len(ended) < len(keys):
        now = time.perf_counter()
        first = sent
        while sent < len(times) and times[sent] <= now - started:
            sent += 1
        if sent > first:
            store.lpush(QUEUE, *messages[first:sent])
        wait = min(0.1, started + times[sent] - time.perf_counter()) if sent < len(times) else 0.1
        message = results.get_message(ignore_subscribe_messages=True, timeout=max(wait, 0.0001))
        if message and message["channel"] in keys:
            heard = time.perf_counter()
            ended.setdefault(message["channel"], heard)
        elif now - heard > STUCK_SECONDS:
            raise StuckError(f"{side.name}: no result for {STUCK_SECONDS} s. The end of its log:\n{side.worker.tail()}")
    return started, ended


def _table(bench: Bench, points: list[Point], lone: dict[str, float]) -> Table:
    rows = [
        Row(
            name=f"{name}, {load:.0%}",
            values=[1000 * point.p99 for point in these],
            more={
                "p50": 1000 * statistics.median(point.p50 for point in these),
                "tasks/s offered": these[0].offered,
                "achieved": statistics.median(point.achieved for point in these),
            },
        )
        for name in lone
        for load in LOADS[bench.full]
        if (these := [point for point in points if (point.name, point.load) == (name, load)])
    ]
    title = f"poisson: short titles, latency by load, {bench.rounds} rounds in turn"
    table = Table(name="poisson", title=title, unit="p99, ms", rows=rows, references=())
    loaded = Spread.of([point.p99 for point in points if (point.name, point.load) == (OURS, TARGET_LOAD)]).median
    told = f"p99 at {TARGET_LOAD:.0%} load is {loaded / lone[OURS]:.1f} times a lone task's {1000 * lone[OURS]:.1f} ms"
    table.verdicts.append(Verdict(reached=loaded <= TARGET * lone[OURS], told=told, target=f"≤ {TARGET:g}"))
    return table
