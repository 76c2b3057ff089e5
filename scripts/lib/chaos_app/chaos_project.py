"""The project whose workers `scripts/chaos` hurts: each task notes its begin and its end in a file.

In: Celery's own environment variables, and `CHAOS_` ones: a folder, the queue, its type, transport options. Out: one
JSON line for each begin and each end in `notes`, a file that no server has to keep and no kill takes back.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celery import Celery

import legit_worker
from legit_worker.errors import DeviceOutOfMemoryError
from legit_worker.models.simulated import SimulatedModel

FOLDER = Path(os.environ["CHAOS_FOLDER"])
#: Opened to append, so that lines of several processes don't mix.
NOTES = os.open(FOLDER / "notes", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
#: While this file is there, memory is short.
SHORT_OF_MEMORY = FOLDER / "short-of-memory"
#: Items that fit while memory is short.
FITTING = 2
#: Deaths after which a task that kills its worker gives up: nobody has stopped it.
MOST_DEATHS = 12

#: Of the runs of this process. A task may run twice in one.
numbers = itertools.count()

app = Celery("chaos_project")
app.conf.update(
    task_default_queue=os.environ["CHAOS_QUEUE"],
    task_default_queue_type=os.environ["CHAOS_QUEUE_TYPE"],
    broker_transport_options=json.loads(os.environ["CHAOS_TRANSPORT_OPTIONS"]),
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
)
legit_worker.install(app)


class Tight(SimulatedModel):
    """A model whose batches run out of memory now and then."""

    def __init__(self, path: str | None = None, alias: str = "tight") -> None:
        super().__init__(path, alias)

    def forward(self, batch: Any) -> Any:
        """Two items fit at any time."""
        if len(batch) > FITTING and SHORT_OF_MEMORY.exists():
            raise DeviceOutOfMemoryError(f"{len(batch)} items don't fit, {FITTING} do")
        return super().forward(batch)


def noted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Note the task's begin, and its end with what it returned or raised."""

    @functools.wraps(function)
    def run(self: Any, *arguments: Any) -> Any:
        number = next(numbers)
        note(self.request, number, "begins", None)
        try:
            value = function(self, *arguments)
        except BaseException as error:
            note(self.request, number, "raises", type(error).__name__)
            raise
        note(self.request, number, "returns", value)
        return value

    return run


def note(request: Any, number: int, what: str, value: Any) -> None:
    """One line, in one write. It begins a line of its own: a killed worker may have written half of one."""
    line = [request.id, request.retries, os.getpid(), number, time.monotonic(), what, value]
    os.write(NOTES, b"\n" + json.dumps(line).encode() + b"\n")


def task(name: str, **options: Any) -> Callable[..., Any]:
    """A task of this name that is noted."""
    return lambda function: app.task(name=name, bind=True, **options)(noted(function))


@task("adds_one")
def adds_one(self: Any, number: int) -> int:
    return number + 1


@task("adds_up")
def adds_up(self: Any, numbers: list[int]) -> int:
    return sum(numbers)


@task("computes")
def computes(self: Any, number: int) -> Any:
    return legit_worker.model("sim").map([f"text {number}"])[0]


@task("computes_tightly")
def computes_tightly(self: Any, number: int) -> Any:
    return legit_worker.model("tight").map([f"text {number}"])[0]


@task("embeds")
def embeds(self: Any, number: int) -> float:
    return float(legit_worker.model("minilm").encode(f"text {number}")[0])


@task("sleeps")
def sleeps(self: Any, number: int) -> int:
    time.sleep(0.05)
    return number


@task("fails")
def fails(self: Any, number: int) -> None:
    legit_worker.model("sim").map([f"text {number}"])
    raise ValueError(number)


@task("retries", max_retries=3)
def retries(self: Any, number: int) -> int:
    if self.request.retries < 2:
        raise self.retry(countdown=self.request.retries)
    return number


@task("is_too_slow", soft_time_limit=0.3)
def is_too_slow(self: Any, number: int) -> None:
    time.sleep(30)


@task("is_much_too_slow", time_limit=0.5)
def is_much_too_slow(self: Any, number: int) -> None:
    legit_worker.model("sim").map([f"text {number}"])
    while True:
        time.sleep(0.01)


@task("kills")
def kills(self: Any, number: int) -> str:
    with (FOLDER / f"deaths-{self.request.id}").open("ab") as deaths:
        deaths.write(b".")
        deaths.flush()
        if deaths.tell() <= MOST_DEATHS:
            os._exit(9)
    return "has killed enough"
