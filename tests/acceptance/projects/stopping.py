"""The project with tasks that a worker's end meets: while their model loads, in a batch, and in their own code.

In: an item, and how long to take. Out: notes of when each began and ended, and the item in capitals.
"""

from __future__ import annotations

import sys
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


class Lingering:
    """Keeps Python's own end waiting, for as long as a thread needs to come back from C++."""

    def __del__(self) -> None:
        """Goes when the modules go."""
        time.sleep(1.0)


class Deep(Upper):
    """Loads for a minute, in short stays in C++ that let other threads run."""

    def load(self, device: str) -> None:
        """As a library does that reads weights."""
        import torch

        sys.modules["lingering"] = Lingering()  # type: ignore[assignment]
        note(None, "loads")
        until = time.monotonic() + 60
        matrix = torch.ones(500, 500)
        while time.monotonic() < until:
            torch.mm(matrix, matrix)


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
