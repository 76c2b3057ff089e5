"""The bounds of apps' queues. Pure.

In: settings. Out: the same, with each app's bounds filled in.
"""

from __future__ import annotations

from legit_worker.settings.schema import AppSettings, Settings

#: The settings that bound an app's queues. An app without its own takes them from all apps.
BOUNDS = ("queue_max_length", "queue_max_seconds", "dead_max_length", "dead_max_seconds")


def with_bounds(chosen: Settings) -> Settings:
    """Give each app the bounds of all apps, if it has none of its own."""

    def filled(app: AppSettings) -> AppSettings:
        missing = [name for name in BOUNDS if getattr(app, name) is None]
        return app.model_copy(update={name: getattr(chosen, name) for name in missing})

    return chosen.model_copy(update={"apps": {name: filled(app) for name, app in chosen.apps.items()}})
