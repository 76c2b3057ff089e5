"""The project of routed results, and a task that tells how much the worker remembers.

In: as `routed`. Out: its tasks, and the number of blocks of memory that Python has in use.
"""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

from celery.worker import state
from routed import app

import legit_worker


@app.task(name="blocks")
def blocks() -> int:
    """Once what nobody refers to any more is gone."""
    while gc.collect():
        pass
    return sys.getallocatedblocks()


#: Celery's requests of the tasks that ran, which have their messages and so their payloads.
requests: list[weakref.ref[Any]] = []


@app.task(name="noted", bind=True)
def noted(self: Any, text: str) -> None:
    """Calls a model, with Python's collector off."""
    gc.disable()
    requests.extend(map(weakref.ref, state.active_requests))
    legit_worker.model("sim").map([text])


@app.task(name="requests_left")
def requests_left() -> int:
    """How many of them are still in memory, beside this task's own."""
    return sum(request() is not None for request in requests)
