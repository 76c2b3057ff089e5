"""`fairness`: an app of 50 tasks beside an app of 50,000, each with a queue of its own, here and on stock solo.

In: a `Bench`. Out: how many times what it takes alone the small app waits: for all its tasks at once, and for one task
at a time.
"""

from __future__ import annotations

import itertools
import json
import time
import uuid
from typing import Any

from bench_contenders import OUR_MODELS, PATH
from bench_figures import OURS, STOCK, Row, Spread, Table, Verdict, percentile, ratios
from bench_modes import Bench
from measure import MODEL, QUEUE, STAGING, TASK, Watch, collect, stage, wait, warm_up
from services import Side, start_broker, start_side
from texts import short_titles

#: Tasks of the small app, and of the flood in a quick and in a full run: more than is done meanwhile.
SMALL, FLOOD = 50, (5_000, 50_000)
#: Messages that make the flood: copies of these, since sending 50,000 takes half a minute.
TEMPLATES = 500
#: The small app's queue; the flood has the worker's own.
SMALL_QUEUE = "small"
#: How a message says which app it is for.
SMALL_APP = {"app": "small"}
#: A lone task may take this many times what it takes alone, at the 99th percentile.
TARGET = 3.0
#: What is measured.
AT_ONCE, MEDIAN, P99 = "at once", "one at a time, median", "one at a time, p99"
SIDES = {
    OURS: ("legit_worker", OUR_MODELS | {f"LEGIT_WORKER_APPS__{app}__WEIGHT": "1" for app in ("SMALL", "BIG")}),
    STOCK: ("stock_project", {"MODEL_PATH": PATH}),
}


def fairness(bench: Bench, mode: str) -> list[Table]:
    """One side after the other: a flood leaves no core for the other one."""
    bench.stop_all()
    rows: dict[str, list[Row]] = {AT_ONCE: [], MEDIAN: [], P99: []}
    broker = start_broker(bench.processes, "valkey-fairness")
    options = ("--pool=solo", f"-Q{QUEUE},{SMALL_QUEUE}")
    for number, (name, (project, variables)) in enumerate(SIDES.items()):
        side = start_side(bench.processes, f"{name} {mode}", project, f"{broker}/{number}", variables, options)
        for what, row in _side(bench, name, side).items():
            rows[what].append(row)
        side.worker.kill()
    tables = [_table(bench, what, found) for what, found in rows.items()]
    worst = Spread.of(rows[P99][0].values).median
    told = f"a lone task's p99 beside a flood: {worst:.2f} times alone"
    tables[-1].verdicts.append(Verdict(reached=worst <= TARGET, told=told, target=f"≤ {TARGET:g}"))
    return tables


def _table(bench: Bench, what: str, rows: list[Row]) -> Table:
    title = f"fairness: {SMALL} tasks {what}, beside a flood of {FLOOD[bench.full]:,}, {bench.rounds} rounds"
    return Table(name=f"fairness, {what}", title=title, unit="times alone", rows=rows, references=())


def _side(bench: Bench, name: str, side: Side) -> dict[str, Row]:
    texts = short_titles(SMALL)
    with bench.console.status(f"fairness: {name}"):
        warm_up(side, texts)
        alone = [_turn(side, texts) for _ in range(bench.rounds)]
        _flood(side, FLOOD[bench.full])
        beside = [_turn(side, texts) for _ in range(bench.rounds)]
        left = side.client.backend.client.llen(QUEUE)
    if not left:
        bench.console.print(f"[yellow]{name}: the flood was over at the end, so this shows less than it should.[/]")
    return {what: _row(name, what, alone, beside) for what in alone[0]}


def _turn(side: Side, texts: list[str]) -> dict[str, float]:
    """Seconds until the small app's tasks, sent at once, are done, and seconds of a lone one."""
    burst, lone = _burst(side, texts), [_one(side, text) for text in texts]
    return {AT_ONCE: burst, MEDIAN: percentile(lone, 0.5), P99: percentile(lone, 0.99)}


def _row(name: str, what: str, alone: list[dict[str, float]], beside: list[dict[str, float]]) -> Row:
    before, after = ([turn[what] for turn in turns] for turns in (alone, beside))
    more = {"alone ms": 1000 * Spread.of(before).median, "beside ms": 1000 * Spread.of(after).median}
    return Row(name=name, values=ratios(after, before), more=more)


def _burst(side: Side, texts: list[str]) -> float:
    """Seconds until all tasks of the small app, sent at once, are done."""
    keys = stage(side, texts, headers=SMALL_APP)
    store: Any = side.client.backend.client
    started = time.perf_counter()
    store.rename(STAGING, SMALL_QUEUE)
    wait(store, keys, Watch(side.worker))
    seconds = time.perf_counter() - started
    collect(side, keys)
    return seconds


def _one(side: Side, text: str) -> float:
    started = time.perf_counter()
    result = side.client.send_task(TASK, [text], MODEL[0], queue=SMALL_QUEUE, headers=SMALL_APP)
    result.get(timeout=300)
    seconds = time.perf_counter() - started
    result.forget()
    return seconds


def _flood(side: Side, count: int) -> None:
    """So many messages at once, each for a task of its own."""
    stage(side, short_titles(TEMPLATES), headers={"app": "big"})
    store: Any = side.client.backend.client
    templates = [json.loads(message) for message in store.lrange(STAGING, 0, -1)]
    store.delete(STAGING)
    messages = map(_renamed, itertools.islice(itertools.cycle(templates), count))
    while chunk := list(itertools.islice(messages, TEMPLATES)):
        store.lpush("flood", *chunk)
    store.rename("flood", QUEUE)


def _renamed(message: dict[str, Any]) -> str:
    """The same message with the ids of another task and of another delivery."""
    task_id = str(uuid.uuid4())
    message["headers"] |= {"id": task_id, "root_id": task_id}
    message["properties"] |= {"correlation_id": task_id, "delivery_tag": str(uuid.uuid4())}
    return json.dumps(message)
