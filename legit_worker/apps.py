"""Which app a task is for. Pure.

In: `LEGIT_WORKER_APP_FROM`, and a task's request as Celery parsed it. Out: a name, or None; whether such an app is
configured is the caller's question.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from legit_worker.settings import AppSource


def identify(sources: Iterable[AppSource], request: Mapping[str, Any]) -> str | None:
    """The app named by the first source that names one. `request` is `celery.worker.request.Request.request_dict`."""
    for source in sources:
        name = _READERS[source.kind](source.value, request)
        if isinstance(name, str) and name:
            return name.lower()
    return None


def _header(name: str, request: Mapping[str, Any]) -> Any:
    nested = request.get("headers")
    return request.get(name) or (nested.get(name) if isinstance(nested, Mapping) else None)


def _kwarg(name: str, request: Mapping[str, Any]) -> Any:
    kwargs = request.get("kwargs")
    return kwargs.get(name) if isinstance(kwargs, Mapping) else None


def _queue(pattern: str, request: Mapping[str, Any]) -> Any:
    info = request.get("delivery_info") or {}
    found = re.fullmatch(pattern, info.get("routing_key") or "")
    return found["app"] if found else None


def _reply_to(_: str, request: Mapping[str, Any]) -> Any:
    return request.get("reply_to")


_READERS = {"header": _header, "kwarg": _kwarg, "queue": _queue, "reply_to": _reply_to}
