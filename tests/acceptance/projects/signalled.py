"""The project `life`, with an ear at each of Celery's signals.

In: as `life`. Out: in its journal, one line per signal: the task's id where it is about one, the signal's name, and the
types of its arguments by their names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from celery import signals
from life import Noted, app, call_model, note

#: A receiver of the first would have Celery set up no logging; the others are sent by the clock, not by events.
UNHEARD = ("setup_logging", "heartbeat_sent")


def task_of(arguments: dict[str, Any]) -> str | None:
    """The id of the task that a signal is about, wherever this signal has it."""
    if "headers" in arguments:
        return arguments["headers"]["id"]  # type: ignore[no-any-return]
    places = (arguments.get("request"), getattr(arguments.get("sender"), "request", None))
    named = arguments.get("task_id") or arguments.get("id")
    return named or next((place.id for place in places if hasattr(place, "id")), None)


def ear(name: str) -> Callable[..., None]:
    """A receiver that notes what it is given."""

    def hear(**arguments: Any) -> None:
        note(task_of(arguments), name, {key: type(value).__name__ for key, value in sorted(arguments.items())})

    return hear


for name in set(signals.__all__) - set(UNHEARD):
    getattr(signals, name).connect(ear(name), weak=False)


class Clumsy(Noted):
    """Its own hook fails, the first time for each task, which Celery calls an internal error."""

    clumsy_about: ClassVar[set[str]] = set()

    def on_failure(self, exc: Exception, task_id: str, *args: Any) -> None:
        """Raises `RuntimeError` once."""
        call_model()
        if task_id not in self.clumsy_about:
            self.clumsy_about.add(task_id)
            raise RuntimeError("the hook failed")


@app.task(name="fails_clumsily", base=Clumsy)
def fails_clumsily() -> None:
    """After a model call."""
    call_model()
    raise ValueError("an error of its own")
