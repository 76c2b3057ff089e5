"""The project with what an operator acts upon: tasks that can be told apart while they run, and commands of its own.

In: the same environment as `project`. Out: its tasks and a few more, and two remote control commands.
"""

from __future__ import annotations

import os
from typing import Any

from celery.exceptions import Reject
from celery.worker.control import control_command, inspect_command
from project import app

import legit_worker

__all__ = ["app"]

if "PROJECT_CANCEL" in os.environ:
    app.conf.worker_cancel_long_running_tasks_on_connection_loss = os.environ["PROJECT_CANCEL"] == "1"
if os.environ.get("PROJECT_RETRY_RESULTS") == "1":
    app.conf.result_backend_always_retry = True


@app.task(name="limited")
def limited(number: int) -> int:
    """Has a rate limit as soon as an operator gives it one."""
    return number


@app.task(name="tidies")
def tidies(item: str, alias: str) -> Any:
    """Says that it ends, however it does, and says otherwise if it got what it asked for."""
    try:
        output = legit_worker.model(alias).map([item])[0]
        print(f"{item} was computed", flush=True)
        return output
    finally:
        print(f"{item} tidied up", flush=True)


@app.task(name="works_on")
def works_on(item: str, times: int) -> None:
    """Calls a model again and again, with work of its own in between."""
    try:
        for number in range(times):
            legit_worker.model("sim").map([f"{item} {number}"])
            print(f"{item} did step {number}", flush=True)
    finally:
        print(f"{item} tidied up", flush=True)


@app.task(name="rejects", bind=True, acks_late=True)
def rejects(self: Any, item: str) -> None:
    """Wants to be heard of no more, after a model call."""
    legit_worker.model("sim").map([item])
    raise Reject("not for me", requeue=False)


@app.task(name="revokes_itself", bind=True)
def revokes_itself(self: Any, item: str) -> Any:
    """Asks to be terminated, and goes on until somebody hears it."""
    app.control.revoke(self.request.id, terminate=True)
    return legit_worker.model("slow_to_load").map([item])[0]


@control_command(args=[("factor", int)], signature="<factor>")
def set_factor(state: Any, factor: int) -> dict[str, Any]:
    """A project's own command, which changes something."""
    app.conf.factor = factor
    return {"ok": f"factor is {factor}"}


@inspect_command()
def get_factor(state: Any) -> int:
    """A project's own command, which tells something."""
    return int(app.conf.get("factor", 1))
