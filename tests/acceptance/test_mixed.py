"""A thousand tasks that succeed, fail, are retried and revoked, chains and chords among them: all end as they must.

The plan says how each ends, and both pools are held to it, so that their ends are the same.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord
from celery.result import AsyncResult
from celery.utils import uuid
from harness import SIDES, Broker, StartWorker, poll
from journal import Life, begin_life

#: What is sent, a chain or a chord counted as one.
TASKS = 1000

#: The part of all tasks that takes longer than its soft time limit. Stock solo has none, so there they succeed.
OVERTIME_SHARE = 0.05

#: Seconds of a soft time limit, and of the own time of the task that it is for.
LIMIT, OVERTIME = 0.05, 0.2

#: The parts of all tasks, by what becomes of them; the rest succeeds.
SHARES = {
    "fails": 0.15,
    "fails in a chain": 0.03,
    "fails in a chord": 0.02,
    "retries": 0.05,
    "retries in vain": 0.05,
    "is revoked": 0.05,
    "chain": 0.05,
    "chord": 0.05,
    "overtime": OVERTIME_SHARE,
}

#: Seconds for all of them. Stock solo takes ten; a machine that does much else takes longer.
ALL_SECONDS = 120

Send = Callable[[Life, int, str], Any]
End = tuple[str, str]


def task(name: str, *args: Any, **options: Any) -> Send:
    """Send one."""
    return lambda life, number, task_id: life.send(name, *args, task_id=task_id, **options)


def send_sum(life: Life, number: int, task_id: str) -> AsyncResult[Any]:
    return life.send("add", number, 1, task_id=task_id)


def send_chain(life: Life, number: int, task_id: str, middle: str = "add") -> Any:
    first, second, last = (life.worker.client.signature(name) for name in ("add", middle, "add"))
    return chain(first.clone([number, 1]), second.clone([2]), last.clone([3])).apply_async()


def send_chord(life: Life, number: int, task_id: str, third: str = "add") -> Any:
    client = life.worker.client
    header = [client.signature(name, [number, part]) for part, name in enumerate(("add", "add", third))]
    return chord(header, app=client)(client.signature("total"))


#: How to send each, and how it ends.
KINDS: dict[str, tuple[Send, Callable[[int], End]]] = {
    "succeeds": (send_sum, lambda n: ("SUCCESS", str(n + 1))),
    "fails": (task("ends", "raises", 2), lambda n: ("FAILURE", "an error of its own")),
    "fails in a chain": (
        lambda life, number, task_id: send_chain(life, number, task_id, middle="fails"),
        lambda n: ("FAILURE", "a step failed"),
    ),
    "fails in a chord": (
        lambda life, number, task_id: send_chord(life, number, task_id, third="fails"),
        lambda n: ("FAILURE", "Dependency … raised ValueError('a step failed')"),
    ),
    "retries": (task("ends", "retries_twice", 1), lambda n: ("SUCCESS", "after 2 retries")),
    "retries in vain": (task("ends", "retries_in_vain", 1), lambda n: ("FAILURE", "never")),
    "is revoked": (task("ends", "returns", 1), lambda n: ("REVOKED", "revoked")),
    "chain": (send_chain, lambda n: ("SUCCESS", str(n + 6))),
    "chord": (send_chord, lambda n: ("SUCCESS", str(3 * n + 3))),
    "overtime": (
        task("overruns", OVERTIME, soft_time_limit=LIMIT),
        lambda n: ("FAILURE", "SoftTimeLimitExceeded"),
    ),
}


def plan() -> list[str]:
    """What becomes of each task, in the order of sending."""
    kinds = [kind for kind, share in SHARES.items() for _ in range(round(share * TASKS))]
    kinds += ["succeeds"] * (TASKS - len(kinds))
    random.Random(7).shuffle(kinds)
    return kinds


@pytest.mark.parametrize("side", SIDES)
def test_a_thousand_tasks_of_all_kinds_end_as_they_must(
    start_worker: StartWorker, tmp_path: Path, broker: Broker, side: str
) -> None:
    check_ends(begin_life(start_worker, tmp_path, side, broker=broker))


@pytest.mark.parametrize("side", SIDES)
def test_a_thousand_tasks_of_all_kinds_end_as_they_must_under_rabbitmq(
    start_worker: StartWorker, tmp_path: Path, rabbitmq: Broker, side: str
) -> None:
    check_ends(begin_life(start_worker, tmp_path, side, broker=rabbitmq))


def check_ends(life: Life) -> None:
    """Each task by its kind, its state and its result."""
    life.worker.broker.needs_stored_results()
    kinds = plan()
    ids = [uuid() for _ in kinds]
    revoke(life, [task_id for task_id, kind in zip(ids, kinds, strict=True) if kind == "is revoked"])
    results = [
        KINDS[kind][0](life, number, task_id) for number, (kind, task_id) in enumerate(zip(kinds, ids, strict=True))
    ]
    life.worker.settle(results, ALL_SECONDS)
    ends = Counter((kind, *end_of(result)) for kind, result in zip(kinds, results, strict=True))
    assert ends == Counter((kind, *expected(life, kind, number)) for number, kind in enumerate(kinds))
    if life.side == "modelpool":
        assert life.worker.pool()["mean_batch"] > 2, "hardly any were parked together: this shows nothing"


def revoke(life: Life, ids: list[str]) -> None:
    """Before they are sent, so that none begins."""
    control = life.worker.client.control
    control.revoke(ids)
    poll(lambda: set(ids) <= set((control.inspect().revoked() or {}).get(life.worker.name, [])), "the worker to know")


def expected(life: Life, kind: str, number: int) -> End:
    if kind == "overtime" and life.side == "stock":
        return "SUCCESS", "nobody minded"
    return KINDS[kind][1](number)


def end_of(result: AsyncResult[Any]) -> End:
    """A task's state, and what it left, without another task's id and without a limit's seconds."""
    left = re.sub(r"Dependency \S+", "Dependency …", str(result.result))
    return result.state, re.sub(r"(?<=TimeLimitExceeded)\(.*\)", "", left)
