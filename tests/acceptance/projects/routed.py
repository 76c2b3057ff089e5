"""The ordinary project, with tasks whose ends are of every kind that a result's receiver may meet.

In: as `project`, and `PROJECT_CONF`: JSON for more of a project's settings. Out: tasks that fail, send others,
take too long, or return what can't be sent.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from celery import current_task
from celery.exceptions import Ignore, Reject
from project import app

import legit_worker

app.conf.update(json.loads(os.environ.get("PROJECT_CONF", "{}")))


@app.task(name="double")
def double(number: int, **_: Any) -> int:
    """Calls no model."""
    return 2 * number


@app.task(name="total")
def total(numbers: list[int]) -> int:
    """A chord's body."""
    return sum(numbers)


@app.task(name="fails")
def fails(*_: Any, message: str = "it failed") -> None:
    """Always."""
    raise ValueError(message)


@app.task(name="work")
def work(number: int, **_: Any) -> int:
    """After a model call, one in twenty fails."""
    legit_worker.model("sim").map([number])
    if number % 20 == 7:
        raise ValueError(f"{number} is one of the twentieth")
    return 2 * number


@app.task(name="again", bind=True, max_retries=3, default_retry_delay=0)
def again(self: Any) -> str:
    """Succeeds when it is tried the third time."""
    if self.request.retries < 2:
        raise self.retry(exc=RuntimeError("not yet"))
    return f"after {self.request.retries}"


@app.task(name="gives_up", bind=True, max_retries=1, default_retry_delay=0)
def gives_up(self: Any) -> None:
    """Fails at last."""
    raise self.retry(exc=RuntimeError("never"))


@app.task(name="quiet", ignore_result=True)
def quiet(number: int) -> int:
    """Celery keeps no result of it."""
    return number + 1


@app.task(name="sends")
def sends(number: int) -> str:
    """Sends another task, and returns its id."""
    return str(app.send_task("double", [number]).id)


@app.task(name="delays")
def delays(number: int) -> str:
    """Sends a signature, and returns its id."""
    return str(double.delay(number).id)


@app.task(name="sends_to")
def sends_to(number: int, headers: dict[str, Any]) -> str:
    """Sends another task with headers of its own."""
    return str(app.send_task("double", [number], headers=headers).id)


@app.task(name="replaced", bind=True)
def replaced(self: Any, number: int) -> Any:
    """Becomes another task."""
    return self.replace(double.s(number))


@app.task(name="ignored")
def ignored() -> None:
    """Has no end that Celery would keep."""
    raise Ignore


@app.task(name="children")
def children() -> list[str]:
    """Sends two, and says what its request has of them."""
    for number in (1, 2):
        double.delay(number)
    return [str(child.id) for child in current_task.request.children]


@app.task(name="large")
def large(size: int) -> str:
    """A result of so many characters."""
    return "x" * size


@app.task(name="odd")
def odd(kind: str) -> Any:
    """What JSON has no word for, or no good one."""
    return {"nan": [float("nan"), 1.0], "set": {1}, "bytes": b"\xff", "complex": 1j}[kind]


@app.task(name="overtime")
def overtime() -> None:
    """Longer than any limit."""
    time.sleep(60)


@app.task(name="rejects", bind=True, acks_late=True)
def rejects(self: Any) -> None:
    """Is never to run again."""
    raise Reject("not for me", requeue=False)


@app.task(name="exits")
def exits() -> None:
    """Would end a process of prefork."""
    raise SystemExit(3)


@app.task(name="runs_another")
def runs_another() -> int:
    """Calls a model, and then a task that calls none, in itself."""
    legit_worker.model("sim").map([1])
    return int(double.apply([1]).get(disable_sync_subtasks=False))
