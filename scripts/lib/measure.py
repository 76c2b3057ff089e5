"""Runs the same tasks on a side, and times them in a way that is fair to both.

In: a `Side` and texts, one task each. Out: vectors in the texts' order, and seconds.

How a run is timed. There are few cores, and a client that publishes and collects while the worker computes takes some
of them. So everything is published first, to a list that no worker reads; one RENAME makes that list the worker's
queue, and the clock starts. It stops when every task's result is in the backend, asked for by one cheap EXISTS of a few
keys every `TICK_SECONDS`. Results are fetched and checked after that. The other side's worker is idle meanwhile.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from celery import Celery
from processes import Process, RunError
from services import Side

TASK = "legit_worker.embed_text"
#: Celery's own, which every worker has: it gives its arguments back.
NOOP = "celery.accumulate"
#: The queue of a worker that was not told another one.
QUEUE = "celery"
#: A list that no worker reads.
STAGING = "staging"
#: Seconds between two looks at the backend, and the keys of a look. A run of 400 short titles takes a second, so a long
#: tick would add to it. 100 looks of this size cost the machine about 1 % of one core.
TICK_SECONDS, LOOK_KEYS = 0.01, 64
#: Seconds without one more result after which a worker counts as stuck. Loading torch and the model takes 5 to 30 s.
STUCK_SECONDS = 180
#: Results fetched in one MGET: about 2 MB of JSON.
FETCHED_AT_ONCE = 256
#: Tasks that load the model and fill its caches before anything is timed.
WARM_UP_TASKS = 24


#: One text, or the texts of one task.
Item = str | list[str]
#: Keyword arguments of tasks, which take turns.
Options = Sequence[dict[str, Any]]
#: The model that both sides have.
MODEL: Options = ({"model": "minilm"},)


class StuckError(RunError):
    """Tasks were sent, and no result came."""


class TaskFailedError(RunError):
    """A task of a run ended with something else than a vector."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one timed run gave."""

    seconds: float
    #: What each task gave, in the texts' order: a vector.
    answers: list[Any]

    @property
    def tasks_per_second(self) -> float:
        return len(self.answers) / self.seconds


class Watch:
    """Notices that a worker died or makes no progress. Call it now and then with the number of results so far."""

    def __init__(self, worker: Process) -> None:
        self._worker, self._seen, self._since = worker, -1, time.monotonic()

    def __call__(self, results: int) -> None:
        self._worker.check()
        if results != self._seen:
            self._seen, self._since = results, time.monotonic()
        elif time.monotonic() - self._since > STUCK_SECONDS:
            tail = self._worker.tail()
            raise StuckError(f"{self._worker.name}: no result for {STUCK_SECONDS} s. The end of its log:\n{tail}")


def warm_up(side: Side, texts: Sequence[Item], options: Options = MODEL) -> None:
    """Waits until the worker is up, has loaded its model, and has answered some tasks."""
    timed_run(side, texts[:WARM_UP_TASKS], options=options)


def timed_run(side: Side, items: Sequence[Item], task: str = TASK, options: Options = MODEL) -> Run:
    """All items, one task each, at once. Raises when a task fails, or the worker dies or is stuck."""
    keys = stage(side, items, task, options)
    store = side.client.backend.client
    started = time.perf_counter()
    store.rename(STAGING, QUEUE)
    wait(store, keys, Watch(side.worker))
    seconds = time.perf_counter() - started
    return Run(seconds=seconds, answers=collect(side, keys))


def collect(side: Side, keys: list[str]) -> list[Any]:
    """What each task gave, which the backend then forgets. Raises when a task failed."""
    store = side.client.backend.client
    answers = [_answer(side.name, value) for value in _fetch(store, keys)]
    store.delete(*keys)
    return answers


def lone_task(side: Side, item: Item) -> float:
    """Seconds from sending one task to an idle worker until its result is here, as an ordinary client waits for it."""
    started = time.perf_counter()
    result = side.client.send_task(TASK, [item], MODEL[0])
    result.get(timeout=STUCK_SECONDS)
    seconds = time.perf_counter() - started
    result.forget()
    return seconds


def cosines(left: Iterable[Sequence[float]], right: Iterable[Sequence[float]]) -> list[float]:
    """The cosine of each pair of vectors."""
    pairs = zip(_normalized(left), _normalized(right), strict=True)
    return [float(one @ other) for one, other in pairs]


def _normalized(vectors: Iterable[Sequence[float]]) -> numpy.ndarray:
    matrix = numpy.asarray(list(vectors), dtype=numpy.float64)
    return numpy.asarray(matrix / numpy.linalg.norm(matrix, axis=1, keepdims=True))


def stage(side: Side, items: Sequence[Item], task: str = TASK, options: Options = MODEL, **sending: Any) -> list[str]:
    """One message per item, to the staging list. Returns their results' keys. Each item takes the next of `options`.

    The publisher has no result backend: it would subscribe to every single result.
    """
    with Celery(broker=side.url, set_as_current=False) as publisher:
        pairs = zip(items, itertools.cycle(options))
        ids = [publisher.send_task(task, [item], chosen, queue=STAGING, **sending).id for item, chosen in pairs]
    return [side.client.backend.get_key_for_task(task_id) for task_id in ids]


def wait(store: Any, keys: list[str], watch: Callable[[int], None]) -> None:
    """Until each of these keys has its result."""
    done = 0
    while asked := keys[done : done + LOOK_KEYS]:
        found = store.exists(*asked)
        if found == len(asked):
            done += found
        else:
            watch(done + found)
            time.sleep(TICK_SECONDS)


def _fetch(store: Any, keys: list[str]) -> Iterable[bytes]:
    for start in range(0, len(keys), FETCHED_AT_ONCE):
        yield from store.mget(keys[start : start + FETCHED_AT_ONCE])


def _answer(name: str, stored: bytes) -> list[float]:
    outcome = json.loads(stored)
    if outcome["status"] != "SUCCESS":
        raise TaskFailedError(
            f"{name}: a task ended as {outcome['status']}: {outcome['result']}\n{outcome['traceback']}"
        )
    return list(outcome["result"])
