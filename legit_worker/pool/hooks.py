"""Errors of a project's own hooks, which Celery calls around a task: methods of its `Task` and its `Request`.

In: errors, and whose methods are asked for. Out: yes or no.
"""

from __future__ import annotations

import traceback
from typing import Any


def is_raised_by(owner: Any, error: BaseException) -> bool:
    """Whether a method of the project's raised it, and not one of Celery's which that method called.

    What Celery's methods raise may be a server's failure.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [frame.f_globals.get("__name__", "") for frame in frames if frame.f_locals.get("self") is owner]
    return owner is not None and bool(modules) and not modules[-1].startswith("celery.")
