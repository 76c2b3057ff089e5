"""The project with tasks that say when they run, and one that kills its worker.

In: an item. Out: lines in the worker's log, and the item.
"""

from __future__ import annotations

import os
import socket

from project import app

import legit_worker

__all__ = ["app"]

if "PROJECT_HOST" in os.environ:  # a worker on another machine, as far as other workers can tell
    socket.gethostname = lambda: os.environ["PROJECT_HOST"]
if os.environ.get("PROJECT_RETRY_RESULTS") == "1":
    app.conf.result_backend_always_retry = True


@app.task(name="parks")
def parks(item: str, alias: str = "sim") -> str:
    """Waits for a model."""
    print(f"{item} begins", flush=True)
    legit_worker.model(alias).map([item])
    print(f"{item} ends", flush=True)
    return item


@app.task(name="dies")
def dies(item: str) -> None:
    """Takes its worker with it."""
    print(f"{item} begins", flush=True)
    os._exit(9)
