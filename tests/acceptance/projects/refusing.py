"""A result backend of a project's own, which refuses what the ids of tasks say.

In: the backend's URL, `refusing:Refusing+file://FOLDER`. Out: files, as Celery's own backend writes them.
"""

from __future__ import annotations

from typing import Any

from celery.backends.filesystem import FilesystemBackend

ERRORS: dict[str, type[Exception]] = {"value": ValueError, "runtime": RuntimeError}


class Refusing(FilesystemBackend):
    """Refuses the states that a task's id names: `value-SUCCESS-FAILURE`."""

    def _store_result(self, task_id: str, result: Any, state: str, *args: Any, **kwargs: Any) -> Any:
        kind, *states = task_id.split("-")
        if kind in ERRORS and state in states:
            raise ERRORS[kind](f"refused: {state} of {task_id}")
        return super()._store_result(task_id, result, state, *args, **kwargs)
