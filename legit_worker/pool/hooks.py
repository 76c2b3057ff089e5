"""Errors in Celery's code around a task that are no failure of a server or a network: a message's, or a project's.

A project's hooks are the methods of its `Task` and its `Request`, which Celery calls around a task.

In: errors, and whose methods are asked for. Out: yes or no.
"""

from __future__ import annotations

import traceback
from typing import Any

from legit_worker.broker.refusals import DATA_ERRORS
from legit_worker.results.backend import is_refused


def is_raised_by(owner: Any, error: BaseException) -> bool:
    """Whether a method of the project's raised it, and not one of Celery's which that method called.

    What Celery's methods raise may be a server's failure.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [frame.f_globals.get("__name__", "") for frame in frames if frame.f_locals.get("self") is owner]
    return owner is not None and bool(modules) and not modules[-1].startswith("celery.")


def is_of_one_message(request: Any, error: BaseException) -> bool:
    """Whether it would come again with this message, and with no other: the worker goes on without the message."""
    return isinstance(error, DATA_ERRORS) or is_raised_by(request, error) or is_refused(error)
