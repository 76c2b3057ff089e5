"""Where a built-in task goes: to the queue of its model, so that a worker gets it which has the model.

In: a task that is sent, as Celery shows it to a router. Out: its queue, or None, and Celery's other routes decide.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from legit_worker import settings

#: By built-in task: the place of its argument `model`, and the kind of model that no model means.
BUILT_IN = {
    "embed_text": (1, "embed"),
    "embed_image": (1, "image"),
    "embed_sparse": (1, "sparse"),
    "embed_multi": (1, "multi"),
    "rerank": (2, "rerank"),
    "classify": (1, "rerank"),
    "prep_text": (1, "embed"),
    "prep_image": (1, "image"),
}


def by_model(
    name: str, args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None, options: Any, task: Any = None, **_: Any
) -> dict[str, str] | None:
    """Route a task. For `task_routes = ("legit_worker.routes:by_model", …)` of any project that has these settings."""
    chosen = _chosen()
    found = _built_in(chosen, name)
    if found is None or not chosen.workers:
        return None
    built_in, renames = found
    place, kind = BUILT_IN[built_in]
    named = next((caller for caller, own in renames.items() if own == "model"), "model")
    wanted = (kwargs or {}).get(named) or next(iter((args or ())[place : place + 1]), None)
    alias = _alias(chosen, wanted, kind)
    return None if alias is None else {"queue": settings.queue_of(chosen, alias)}


@functools.cache
def _chosen() -> settings.Settings:
    """Return the settings of all workers, which a client reads once: that takes longer than to send a task."""
    return settings.load(enabled_by_default=True, is_whole=True)


def _built_in(chosen: settings.Settings, name: str) -> tuple[str, Mapping[str, str | None]] | None:
    """Return the built-in task of this name or alias, and the arguments that callers name otherwise."""
    task = name.removeprefix("legit_worker.")
    if task in BUILT_IN:
        return task, {}
    return next(((task, names[name]) for task, names in chosen.tasks.items() if name in names), None)


def _alias(chosen: settings.Settings, wanted: Any, kind: str) -> str | None:
    """Return the model that a task means; None if it means none, or more than one."""
    fits = [
        alias
        for alias, spec in chosen.models.items()
        if (settings.fold(str(wanted)) == settings.fold(alias) if wanted else spec.kind == kind)
    ]
    return fits[0] if len(fits) == 1 else None
