"""Which app a task is for. Pure, but for `of_current_task`, which asks Celery which task that is.

In: the settings, and a task's request as Celery parsed it. Out: a name, or None. The settings may not have that app.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from legit_worker.settings import NAME, AppSource, Settings

#: The header that carries an app from a task to its children. It comes last: a child's own word counts more.
INHERITED = AppSource("header", "legit_worker_app")


def identify(chosen: Settings, request: Mapping[str, Any]) -> str | None:
    """Return the app that the first source names. `request` is `celery.worker.request.Request.request_dict`."""
    for source in (*chosen.app_from, INHERITED):
        name = _named(source, request, chosen)
        if isinstance(name, str) and name:
            return name.lower()
    return None


def of_current_task(chosen: Settings) -> str:
    """Return the app that this thread's or fiber's task is for; "" if the settings have no app of this name.

    A task that runs eagerly inside another one, and names no app, is for the app of the outer one.
    """
    from celery._state import _task_stack

    for task in reversed(_task_stack.stack):
        name = identify(chosen, vars(task.request))
        if name in chosen.apps:
            return name
    return ""


def header(name: str, request: Mapping[str, Any]) -> Any:
    """Return one of the sender's own headers, in any version of Celery's protocol; None if it is missing."""
    nested = request.get("headers")
    found = request.get(name)
    return nested.get(name) if found is None and isinstance(nested, Mapping) else found


def answer_queue(app: str, chosen: Settings, request: Mapping[str, Any]) -> str | None:
    """Return the queue that the message asks for, if this app lets messages name one."""
    queue, prefix = request.get("reply_to"), chosen.apps[app].reply_to_prefix
    by_message = any(source.kind == "reply_to" for source in chosen.app_from)
    if by_message and prefix and isinstance(queue, str) and queue.startswith(prefix) and re.fullmatch(NAME, queue):
        return queue
    return None


def carrier(chosen: Settings) -> str:
    """Return the header by which a task tells its children the app."""
    return next((source.value for source in (*chosen.app_from, INHERITED) if source.kind == "header"), INHERITED.value)


def _named(source: AppSource, request: Mapping[str, Any], chosen: Settings) -> Any:
    match source.kind:
        case "header":
            return header(source.value, request)
        case "kwarg":
            kwargs = request.get("kwargs")
            return kwargs.get(source.value) if isinstance(kwargs, Mapping) else None
        case "queue":
            info = request.get("delivery_info")
            key = info.get("routing_key") if isinstance(info, Mapping) else None
            found = re.fullmatch(source.value, key) if isinstance(key, str) and key else None
            return found["app"] if found else None
        case "reply_to":  # an app's name, or a queue under an app's prefix
            name = request.get("reply_to")
            if isinstance(name, str) and name.lower() in chosen.apps:
                return name
            return next((app for app in chosen.apps if answer_queue(app, chosen, request)), None)
