"""A task as Celery hands it to a pool, without Celery."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from legit_worker.pool.jobs import Job


def job(target: Callable[..., Any], *args: Any, **callbacks: Callable[..., Any]) -> Job:
    """One whose end nobody is told, but for the callbacks that are given."""
    told: dict[str, Any] = {"callback": lambda _: None, "error_callback": lambda _: None, "accept_callback": None}
    return Job(target=target, args=args, kwargs={}, **told | callbacks)
