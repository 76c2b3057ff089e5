"""The project `life`, with a signal's handler that raises inside Celery's code, for each task that says where.

In: as `life`; a task's end, a place, and how often it rings there. Out: the same notes.
"""

from __future__ import annotations

import signal
from collections import Counter
from typing import Any

from life import ENDS, Noted, NotedRequest, app, call_model, note


class RungError(ValueError):
    """What the handler raises, as any code may."""


def ring(signum: int, frame: Any) -> None:
    """As a project's alarm would."""
    raise RungError("the handler raised")


signal.signal(signal.SIGUSR2, ring)

_rung: Counter[str] = Counter()


def ring_at(place: str, request: Any) -> None:
    """Let the signal come here, if the task says so, and as often as it says; or raise here, each time."""
    if request.kwargs.get("fails") == place:
        raise RuntimeError(f"it fails at {place}")
    if request.kwargs.get("place") == place and _rung[request.id] < request.kwargs.get("times", 1):
        _rung[request.id] += 1
        note(request.id, "rings")
        signal.raise_signal(signal.SIGUSR2)


class RungRequest(NotedRequest):
    """Where the worker's side of a task may be interrupted."""

    def on_accepted(self, *args: Any) -> None:
        """Before its own code, and before its message is acked early."""
        ring_at("accepted", self)
        super().on_accepted(*args)

    def on_failure(self, *args: Any, **kwargs: Any) -> None:
        """Its failure is stored."""
        ring_at("failure", self)
        super().on_failure(*args, **kwargs)

    def acknowledge(self) -> None:
        """Its result is stored."""
        ring_at("ack", self)
        super().acknowledge()


class Rung(Noted):
    """A task with such a request, and a hook that may fail."""

    Request = RungRequest

    def on_failure(self, exc: Exception, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """Raises, if the task says so."""
        super().on_failure(exc, task_id, args, kwargs, einfo)
        if kwargs.get("fails") == "hook":
            raise RuntimeError("the hook failed")


@app.task(name="rung", bind=True, base=Rung)
def rung(self: Rung, end: str, place: str = "", times: int = 1, fails: str = "") -> Any:
    """After a model call, this end."""
    call_model()
    return ENDS[end](self)
