"""The project with tasks that a worker's end meets: while their model loads, in a batch, and in their own code.

In: an item, and how long to take. Out: notes of when each began and ended, and the item in capitals.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from custom_models import Upper
from life import Noted, app, note

import legit_worker

__all__ = ["app"]


class Busy(Upper):
    """Takes long enough to load, and for each batch, to do something to the worker."""

    def load(self, device: str) -> None:
        """A second and a half."""
        time.sleep(1.5)

    def forward(self, batch: Sequence[Any]) -> list[Any]:
        """Says that it starts."""
        note(None, "computes")
        time.sleep(0.3)
        return super().forward(batch)


def work(task: Noted, item: str, seconds: float = 0.0, path: str = "") -> str:
    """A model call, and so many seconds of its own; or, where it has a path, until there is such a file."""
    note(task.request.id, "begins")
    try:
        output = str(legit_worker.model("busy").map([item])[0])
        note(task.request.id, "goes on")
        until = time.monotonic() + seconds
        while time.monotonic() < until or (path and not Path(path).exists()):
            time.sleep(0.01)
        note(task.request.id, "ends")
        return output
    finally:
        note(task.request.id, "cleans up")


app.task(work, name="late", bind=True, base=Noted, acks_late=True)
app.task(work, name="early", bind=True, base=Noted, acks_late=False)
