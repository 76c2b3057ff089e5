"""Which models the current task's app may use.

In: the settings, from a worker's start, and aliases that tasks ask for. Out: `UnknownModelError` for a model outside
the app's fence. Without a worker there is no fence. Any pool has it: Celery knows the task of each thread and fiber.
"""

from __future__ import annotations

from legit_worker import apps
from legit_worker.errors import UnknownModelError
from legit_worker.settings import Settings, fold

#: The settings of this process's worker, if they have any fence.
_chosen: Settings | None = None


def use(chosen: Settings | None) -> None:
    """Have handles of this process, and of those that it forks, keep to the fences of these settings."""
    global _chosen
    is_fenced = chosen is not None and (
        chosen.no_app_models is not None or any(app.models is not None for app in chosen.apps.values())
    )
    _chosen = chosen if is_fenced else None


def check(alias: str) -> None:
    """Raise `UnknownModelError` if the current task's app may not use the model."""
    if _chosen is None:
        return
    app = apps.of_current_task(_chosen)
    allowed = _chosen.apps[app].models if app else _chosen.no_app_models
    if allowed is None or fold(alias) in map(fold, allowed):
        return
    who = f"app {app!r}" if app else "what names no app of this worker's settings"
    which = f"only {', '.join(allowed)}" if allowed else "nor any other"
    setting = f"APPS__{app.upper()}__MODELS" if app else "NO_APP_MODELS"
    raise UnknownModelError(f"{who} may not use model {alias!r}, {which}: see LEGIT_WORKER_{setting}")
