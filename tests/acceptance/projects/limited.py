"""The project with tasks that run into time limits: in a model call, in their own code, and in an exclusive section.

In: how long to take. Out: what became of them; `PROJECT_JOURNAL` names a file for what a result can't tell.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from celery import signals
from celery.exceptions import SoftTimeLimitExceeded
from project import app

import legit_worker

__all__ = ["app"]

#: Seconds that nobody waits for.
LONG = 60.0


def note(line: str) -> None:
    """For the test to read."""
    with Path(os.environ["PROJECT_JOURNAL"]).open("a") as journal:
        journal.write(f"{line}\n")


@app.task(name="in_a_model_call")
def in_a_model_call(item: str, alias: str = "never") -> Any:
    """Waits for a model that does not come."""
    try:
        return legit_worker.model(alias).map([item])[0]
    finally:
        note(f"{item} cleaned up")


@app.task(name="in_its_own_code")
def in_its_own_code(item: str, seconds: float = LONG) -> str:
    """Sleeps, after it was parked."""
    try:
        legit_worker.model("sim").map([item])
        time.sleep(seconds)
    finally:
        note(f"{item} cleaned up")
    return item


@app.task(name="in_a_loop")
def in_a_loop(item: str) -> None:
    """Computes without a pause."""
    legit_worker.model("sim").map([item])
    until = time.monotonic() + LONG
    while time.monotonic() < until:
        pass


@app.task(name="in_an_exclusive_section")
def in_an_exclusive_section(item: str) -> None:
    """Calls a model again and again, alone."""
    with legit_worker.exclusive():
        for number in range(100_000):
            legit_worker.model("sim").map([f"{item} {number}"])


@app.task(name="saves_what_it_can")
def saves_what_it_can(item: str, alias: str = "never") -> str:
    """Takes the warning, and ends in its own way."""
    try:
        legit_worker.model(alias).map([item])
    except SoftTimeLimitExceeded:
        return f"{item} saved with {len(legit_worker.model('sim').map([item])[0])} numbers"
    return "never"


@app.task(name="ignores_the_warning")
def ignores_the_warning(item: str) -> None:
    """And so runs into the hard limit."""
    try:
        time.sleep(LONG)
    except SoftTimeLimitExceeded:
        time.sleep(LONG)


@app.task(name="limited_by_itself", soft_time_limit=0.5)
def limited_by_itself(item: str) -> Any:
    """As its decorator says."""
    return legit_worker.model("never").map([item])


@app.task(name="told")
def told(*args: Any) -> None:
    """An errback."""
    note("errback called")


@signals.worker_process_init.connect
def warm_up(**_: Any) -> None:
    """Loaders load one model after the other, and the one that never comes may be the first to be asked for."""
    legit_worker.model("sim").map(["warm"])


@signals.task_failure.connect
def failed(sender: Any = None, task_id: str = "", exception: Any = None, **_: Any) -> None:
    """As each worker process hears it."""
    note(f"signal {type(exception).__name__}")
