"""The project with tasks that run into time limits: in a model call, in their own code, and in an exclusive section.

In: how long to take. Out: what became of them; `PROJECT_JOURNAL` names a file for what a result can't tell.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from celery import signals
from celery.exceptions import SoftTimeLimitExceeded
from custom_models import Upper
from project import app

import legit_worker
from legit_worker.prep import processes

__all__ = ["app"]

#: Seconds that nobody waits for.
LONG = 60.0


class Lengthy(Upper):
    """Takes longer for a batch than tasks may."""

    def forward(self, batch: Sequence[Any]) -> list[Any]:
        """As the others, later."""
        time.sleep(1.5)
        return super().forward(batch)


def note(line: str) -> None:
    """For the test to read."""
    with Path(os.environ["PROJECT_JOURNAL"]).open("a") as journal:
        journal.write(f"{line}\n")


@app.task(name="in_a_model_call")
def in_a_model_call(item: str, alias: str = "lengthy") -> Any:
    """Waits for a batch that takes long, or for another model."""
    try:
        return legit_worker.model(alias).map([item])[0]
    finally:
        note(f"{item} cleaned up")


for acks_late in (False, True):
    app.task(in_a_model_call.run, name=f"acked_{'late' if acks_late else 'early'}", acks_late=acks_late)


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
def saves_what_it_can(item: str) -> str:
    """Takes the warning, and ends in its own way."""
    try:
        legit_worker.model("lengthy").map([item])
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
    return [legit_worker.model("lengthy").map([f"{item} {number}"]) for number in range(2)]


@app.task(name="swallows_all")
def swallows_all(item: str) -> str:
    """Ends in its own time, whatever is raised in it."""
    until = time.monotonic() + 3
    while time.monotonic() < until:
        try:
            time.sleep(0.05)
        except BaseException:  # noqa: PERF203
            note(f"{item} swallowed it")
    return item


class BusyError(Exception):
    """Worth another try."""


def sleeps(item: str) -> str:
    """Has nothing but its own code."""
    time.sleep(LONG)
    return item


app.task(sleeps, name="retried_by_celery", autoretry_for=(BusyError,))
app.task(sleeps, name="checked_by_pydantic", pydantic=True)
app.task(sleeps, name="mapped")


class Called(app.Task):  # type: ignore[misc, name-defined]
    """A task with a call of its own around its `run`."""

    name = "called"

    def __call__(self, item: str) -> str:
        """Does what `run` does."""
        return super().__call__(item)

    def run(self, item: str) -> str:
        """As the others."""
        return sleeps(item)


app.register_task(Called())


@app.task(name="alone")
def alone(item: str, alias: str) -> Any:
    """Waits for a model without letting others run."""
    with legit_worker.exclusive():
        return legit_worker.model(alias).map([item])[0]


@app.task(name="prepared")
def prepared(seconds: float, is_alone: bool = False) -> float:
    """Has a helper process do its work."""
    with legit_worker.exclusive() if is_alone else nullcontext():
        processes.run(time.sleep, seconds, size=1)
    return seconds


@app.task(name="told")
def told(*args: Any) -> None:
    """An errback."""
    note("errback called")


@signals.worker_process_init.connect
def warm_up(**_: Any) -> None:
    """Under prefork, the first load counts in the first task's limit."""
    legit_worker.model("sim").map(["warm"])


@signals.task_failure.connect
def failed(sender: Any = None, task_id: str = "", exception: Any = None, **_: Any) -> None:
    """As each worker process hears it."""
    note(f"signal {type(exception).__name__}")
